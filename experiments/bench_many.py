"""Many adapters in one program, served and trained, against one at a time, on CPU.

    taskset -c 0 python experiments/bench_many.py --config SMOLLM2_CONFIG --out experiments/results

A Llama with SmolLM2-135M's layers, fewer of them and a small vocabulary, float32, LoRA of rank 8 on
query and value. Serving: a batch of 8 rows, each of its own adapter, against the same batch under
one adapter. Training: N jobs of two rows each, with learning rates of their own, one step of all
against a step of each (the same program for all of them, AdamW, clipping); their losses must be
those of the separate runs. What a run of its own also costs, in a process of its own, is tracing
and compiling its step: this is measured apart, several times. CPU times are compared, pair by pair.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import write
from timing import alternate, ratio

import pelt_jax as pelt
from pelt_jax import models, training

VOCAB, RANK, CLIP = 2048, 8, 1.0
SERVED, SERVED_LENGTH = 8, 64
ROWS, LENGTH = 2, 32  # of a job's batch
LOSS_STEPS, COMPILATIONS = 3, 3


def built(config: pathlib.Path, layers: int):
  """The model, its params, its sites, and what makes the adapter of a number."""
  sizes = json.loads(config.read_text()) | {"num_hidden_layers": layers, "vocab_size": VOCAB}
  model = models.from_config(sizes | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
  ids = jnp.zeros((2, 8), jnp.int32)
  base = jax.jit(model.init)(jax.random.key(0), ids)["params"]
  sites, method = pelt.sites(model, ids), pelt.lora(RANK, 2 * RANK)

  def member(number: int) -> dict:
    own, rest = pelt.partition(method.init(jax.random.key(number), base, sites))
    rng = np.random.default_rng(number)  # b is zero at first, which would tell no two apart
    moved = lambda x: x + jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype)
    return pelt.combine(jax.tree.map(moved, own), rest)

  return pelt.bypass(model.apply), member


def flops(program) -> float:
  cost = program.cost_analysis()
  return (cost[0] if isinstance(cost, list) else cost)["flops"]


def served(apply, members: list[dict], pairs: int) -> dict:
  """A mixed batch against a batch of one adapter."""
  rng = np.random.default_rng(0)
  ids = rng.integers(3, VOCAB, (SERVED, SERVED_LENGTH)).astype(np.int32)
  rows = rng.permutation(SERVED).astype(np.int32)
  mixed = jax.jit(lambda params, ids, rows: apply({"params": params}, ids, rows=rows))
  alone = jax.jit(lambda params, ids: apply({"params": params}, ids))
  banks = {n: pelt.bank([members[i % len(members)] for i in range(n)]) for n in (8, 64)}
  programs = {n: mixed.lower(b, ids, rows).compile() for n, b in banks.items()}
  single = alone.lower(members[0], ids).compile()
  got = programs[8](banks[8], ids, rows)
  apart = [single(members[row], ids)[i] for i, row in enumerate(rows)]
  worst = float(np.abs(np.asarray(got) - np.stack(apart)).max())
  if worst > 1e-4:
    raise SystemExit(f"a mixed batch computes something else, by {worst}")
  runs = {
    "single": lambda: single(members[0], ids).block_until_ready(),
    "mixed of 8": lambda: programs[8](banks[8], ids, rows).block_until_ready(),
    "mixed of 64": lambda: programs[64](banks[64], ids, rows).block_until_ready(),
  }
  times = alternate(runs, pairs)
  cost = {"single": flops(single)} | {f"mixed of {n}": flops(p) for n, p in programs.items()}
  return {
    name: {
      "cpu_seconds_median": float(np.median(times["cpu"][name])),
      "over_single": ratio(times["cpu"][name], times["cpu"]["single"]),
      "over_single_wall": ratio(times["wall"][name], times["wall"]["single"]),
      "flops": cost[name],
    }
    for name in runs
  } | {"largest_difference": worst}


def trained(apply, members: list[dict], pairs: int) -> dict:
  """One step of all jobs against a step of each."""
  count, rng = len(members), np.random.default_rng(1)
  data = rng.integers(3, VOCAB, (LOSS_STEPS, count, ROWS, LENGTH)).astype(np.int32)
  rates = np.geomspace(1e-4, 1e-2, count).astype(np.float32)
  key, loss = jax.random.key(0), training.next_token
  batch_of = lambda ids: {"input_ids": ids, "labels": np.roll(ids, -1, axis=-1)}
  rows = np.repeat(np.arange(count, dtype=np.int32), ROWS)
  all_rows = lambda i: batch_of(data[i].reshape(-1, LENGTH)) | {"rows": rows}

  # One at a time.
  tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1.0)
  train = training.train_step(apply, loss, tx, clip=CLIP)
  runs = [list(train.init(m)) for m in members]
  for run in runs:
    run[0] = jax.tree.map(jnp.copy, run[0])  # a step donates it
  for run, rate in zip(runs, rates, strict=True):
    run[2].optimizer.hyperparams["learning_rate"] = jnp.asarray(rate)
  step = jax.jit(train.step, donate_argnums=(0, 2))
  compiled, alone = [], None
  for _ in range(COMPILATIONS):
    jax.clear_caches()
    began = time.process_time()
    alone = step.lower(*runs[0], batch_of(data[0, 0]), key).compile()
    compiled.append(time.process_time() - began)

  def each(i: int) -> list[float]:
    found = []
    for number, run in enumerate(runs):
      run[0], run[2], metrics = alone(*run, batch_of(data[i, number]), key)
      found.append(metrics["loss"])
    return np.array(jax.device_get(found))

  # All at once: the whole batch, and in parts of as many rows as are served.
  runs_at_once, compiled_at_once = {}, {}
  for parts in sorted({1, max(1, count * ROWS // 16)}):
    jobs = training.jobs_step(apply, loss, tx, clip=CLIP, accumulate=parts)
    many = list(jobs.init(members, learning_rate=rates))
    jax.clear_caches()
    began = time.process_time()
    program = jax.jit(jobs.step, donate_argnums=(0, 2)).lower(*many, all_rows(0), key).compile()
    compiled_at_once[parts] = time.process_time() - began

    def together(i: int, many: list = many, program=program) -> np.ndarray:
      many[0], many[2], metrics = program(*many, all_rows(i), key)
      return np.asarray(metrics["loss"])

    runs_at_once[parts] = together
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  bytes_of = {"jobs": size(many[2].optimizer), "one separate run": size(runs[0][2])}
  worst = 0.0
  for i in range(LOSS_STEPS):
    apart = each(i)
    found = [together(i) for together in runs_at_once.values()]
    worst = max(worst, *(float(np.abs(f / apart - 1).max()) for f in found))
  if worst > 1e-5:
    raise SystemExit(f"losses of jobs and of separate runs differ by {worst:.1e}")
  sides = {parts: lambda run=run: run(0) for parts, run in runs_at_once.items()}
  times = alternate(sides | {"separate": lambda: each(0)}, pairs)
  cpu = {name: float(np.median(v)) for name, v in times["cpu"].items()}
  one = float(np.mean(compiled))

  def over_separate(parts: int) -> dict:
    whole = lambda steps: (
      (compiled_at_once[parts] + steps * cpu[parts]) / (count * one + steps * cpu["separate"])
    )
    return {
      "step_cpu_seconds_median": cpu[parts],
      "compile_cpu_seconds": compiled_at_once[parts],
      "step": ratio(times["cpu"][parts], times["cpu"]["separate"]),
      "step_wall": ratio(times["wall"][parts], times["wall"]["separate"]),
      "with_compilation": {steps: whole(steps) for steps in (10, 30, 100, 300)},
    }

  print(f"{count} jobs: done", flush=True)
  return {
    "jobs": count,
    "largest_relative_difference_of_losses": worst,
    "separate": {"steps_cpu_seconds_median": cpu["separate"], "compile_cpu_seconds": compiled},
    "by_parts": {parts: over_separate(parts) for parts in runs_at_once},
    "optimizer_bytes": bytes_of,
  }


def cell(found: dict) -> str:
  return "{:.3f} ({:.3f}–{:.3f})".format(found["ratio"], *found["95 %"])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", type=pathlib.Path, required=True, help="SmolLM2's config.json")
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--pairs", type=int, default=30, help="of forward passes")
  parser.add_argument("--jobs", type=int, nargs="+", default=[8, 64])
  parser.add_argument("--step-pairs", type=int, nargs="+", default=[20, 5], help="for each of jobs")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  training.keep_freed_memory()  # as the main job does; it serves all sides
  load = [os.getloadavg()[0]]
  apply, member = built(args.config, args.layers)
  members = [member(i) for i in range(max(args.jobs))]
  serving = served(apply, members[:SERVED], args.pairs)
  each = [
    trained(apply, members[:n], pairs) for n, pairs in zip(args.jobs, args.step_pairs, strict=True)
  ]
  load.append(os.getloadavg()[0])
  today = datetime.date.today().isoformat()
  cores = len(os.sched_getaffinity(0))
  versions = {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax")}
  about = {"date": today, "cores": cores, "layers": args.layers, "load": load, "versions": versions}
  results = about | {"pairs": args.pairs, "serving": serving, "training": each}
  write(args.out / "bench_many.json", json.dumps(results, indent=1) + "\n")
  lines = [
    "# Many adapters in one program, on CPU\n",
    f"Made by `experiments/bench_many.py`: SmolLM2's layers, {args.layers} of them, vocabulary "
    f"{VOCAB}, LoRA of rank {RANK}. Ratios of CPU time with 95 % intervals.\n",
    f"## Forward pass of {SERVED} rows of {SERVED_LENGTH} tokens, {args.pairs} pairs\n",
    "| | CPU s | over one adapter | GFLOPs |",
    "|---|---|---|---|",
  ]
  for name, found in serving.items():
    if name != "largest_difference":
      seconds, gflops = found["cpu_seconds_median"], found["flops"] / 1e9
      lines.append(f"| {name} | {seconds:.4f} | {cell(found['over_single'])} | {gflops:.4f} |")
  many, few = (serving[f"mixed of {n}"]["flops"] for n in (64, 8))
  lines.append(f"\n64 members cost {many / few - 1:+.3%} FLOPs over 8.\n")
  lines += [
    f"## Training, each job {ROWS} rows of {LENGTH} tokens\n",
    "| jobs | parts | losses differ by | step over separate steps | with compilation, 30 steps "
    "| 300 steps | compiling: jobs | one run |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for found in each:
    one = np.mean(found["separate"]["compile_cpu_seconds"])
    for parts, jobs in found["by_parts"].items():
      whole = jobs["with_compilation"]
      lines.append(
        f"| {found['jobs']} | {parts} | {found['largest_relative_difference_of_losses']:.0e} | "
        f"{cell(jobs['step'])} | {whole[30]:.3f} | {whole[300]:.3f} | "
        f"{jobs['compile_cpu_seconds']:.1f} s | {one:.1f} s |"
      )
  lines.append(
    "\nWith compilation: all jobs' program once, against a compilation for each separate run (mean "
    f"of {COMPILATIONS}), steps at their median time. Parts: `accumulate`; activations of a large "
    "batch do not fit the cache."
  )
  lines.append("; ".join(f"{k} {v}" for k, v in versions.items()))
  lines.append(
    f"{today}, {cores} core{'s' * (cores > 1)}; load on the machine {load[0]:.0f}–{load[1]:.0f}."
  )
  write(args.out / "bench_many.md", "\n".join(lines) + "\n")
  print("\n".join(lines))


if __name__ == "__main__":
  main()
