"""NF4 here, in qwix and in bitsandbytes: dequantizing, a forward pass and a QLoRA step, on CPU.

    python experiments/bench_nf4.py --out experiments/results

Two feed-forward blocks of nn.Dense (1024 -> 4096 -> 1024), float32, every kernel in NF4 in blocks
of 64, LoRA of rank 16. At many tokens the products outweigh all else, for every side; with several
threads CPU time also counts how they wait for each other. Functions take turns in one process, one
for each row of the table, and CPU times are compared pair by pair. bitsandbytes runs Linear4bit
with LoRA beside it.

Needs torch, bitsandbytes and qwix.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib

# Idle torch threads would otherwise spin, and their CPU time would be charged to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from reporting import write
from timing import alternate, ratio

import pelt_jax as pelt
from pelt_jax import training

WIDTH, INNER, BLOCKS, RANK, LR = 1024, 4096, 2, 16, 1e-3
RUNS = ("dequantize", "forward", "step")


class Blocks(nn.Module):
  """x + down(gelu(up(x))), several times."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(BLOCKS):
      h = nn.gelu(nn.Dense(INNER, name=f"up_{i}", use_bias=False)(x))
      x = x + nn.Dense(WIDTH, name=f"down_{i}", use_bias=False)(h)
    return x


def data(tokens: int) -> tuple[dict, np.ndarray]:
  """Kernels by module, and the input."""
  rng = np.random.default_rng(0)
  drawn = lambda a, b: rng.normal(0, 0.02, (a, b)).astype(np.float32)
  sizes = {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}
  kernels = {f"{n}_{i}": drawn(*s) for i in range(BLOCKS) for n, s in sizes.items()}
  return kernels, rng.normal(size=(tokens, WIDTH)).astype(np.float32)


def stepped(apply, params, split, x):
  """A jitted forward pass, an AdamW step on what trains, and the step's temporary bytes."""
  trainable, frozen = split(params)
  tx = optax.adamw(LR)
  join = pelt.combine

  @jax.jit
  def step(trainable, state, frozen, x):
    loss = lambda t: jnp.mean(apply(join(t, frozen), x) ** 2)
    value, grads = jax.value_and_grad(loss)(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value

  forward = jax.jit(lambda params, x: apply(params, x))
  held = [trainable, tx.init(trainable)]
  compiled = step.lower(*held, frozen, x).compile()

  def run() -> float:
    held[0], held[1], value = compiled(held[0], held[1], frozen, x)
    return float(value)

  temporary = compiled.memory_analysis().temp_size_in_bytes
  return lambda: forward(params, x).block_until_ready(), run, temporary


def here(kernels: dict, x: jax.Array) -> dict:
  model = Blocks()
  params = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()}
  method = pelt.chain(pelt.nf4(targets="kernel"), pelt.lora(RANK, RANK, targets="kernel"))
  params = method.init(jax.random.key(0), params, pelt.sites(model, x))
  apply = pelt.bypass(model.apply)
  nodes = [params[name]["kernel"].base for name in kernels]
  whole = jax.jit(lambda nodes: [n.materialize() for n in nodes])
  forward, step, temporary = stepped(
    lambda p, x: apply({"params": p}, x), params, pelt.partition, x
  )
  return {
    "dequantize": lambda: jax.block_until_ready(whole(nodes)),
    "forward": forward,
    "step": step,
    "temporary": temporary,
    "values": whole(nodes),
    "bytes": sum(x.nbytes for x in jax.tree.leaves(nodes)),
  }


def in_qwix(kernels: dict, x: jax.Array) -> dict:
  import qwix

  options = {"weight_qtype": "nf4", "tile_size": 64, "rank": RANK, "alpha": RANK}
  model = qwix.apply_lora_to_model(Blocks(), qwix.LoraProvider(module_path=".*", **options))
  params = model.init(jax.random.key(0), x)["params"]
  for name, kernel in kernels.items():
    how = params[name]["kernel"].how
    made = qwix.quantize(
      jnp.asarray(kernel),
      how.qtype,
      channelwise_axes=how.channelwise_axes,
      tiled_axes=how.tiled_axes,
    )
    params[name]["kernel"] = params[name]["kernel"].replace(array=made)
  is_array = lambda v: hasattr(v, "how")
  arrays = [params[name]["kernel"].array for name in kernels]
  whole = jax.jit(lambda arrays: [qwix.dequantize(a) for a in arrays])

  def split(params):
    lora = lambda path: "lora" in jax.tree_util.keystr(path)
    pick = lambda want: jax.tree_util.tree_map_with_path(
      lambda p, v: v if lora(p) == want else optax.MaskedNode(), params, is_leaf=is_array
    )
    return pick(True), pick(False)

  forward, step, temporary = stepped(lambda p, x: model.apply({"params": p}, x), params, split, x)
  size = lambda a: a.qvalue.on_device_size_in_bytes() + a.scale.on_device_size_in_bytes()
  return {
    "dequantize": lambda: jax.block_until_ready(whole(arrays)),
    "forward": forward,
    "step": step,
    "temporary": temporary,
    "values": whole(arrays),
    "bytes": sum(map(size, arrays)),
  }


def in_bitsandbytes(kernels: dict, x: np.ndarray) -> dict:
  import bitsandbytes as bnb
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  layers, factors = {}, {}
  for name, kernel in kernels.items():
    a, b = kernel.shape
    layer = bnb.nn.Linear4bit(a, b, bias=False, quant_type="nf4", compress_statistics=False)
    weight = torch.tensor(kernel.T.copy())
    layer.weight = bnb.nn.Params4bit(
      weight, requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    layers[name] = layer.to("cpu")
    factors[name] = [
      torch.nn.Parameter(torch.randn(a, RANK) / RANK),
      torch.nn.Parameter(torch.zeros(RANK, b)),
    ]
  given = torch.tensor(np.asarray(x))
  tx = torch.optim.AdamW([f for pair in factors.values() for f in pair], LR, weight_decay=1e-4)

  def dense(name, x):
    a, b = factors[name]
    return layers[name](x) + (x @ a) @ b

  def forward():
    x = given
    for i in range(BLOCKS):
      x = x + dense(f"down_{i}", torch.nn.functional.gelu(dense(f"up_{i}", x), approximate="tanh"))
    return x

  def step() -> float:
    tx.zero_grad(set_to_none=True)
    loss = (forward() ** 2).mean()
    loss.backward()
    tx.step()
    return loss.item()

  weights = [layer.weight for layer in layers.values()]
  whole = lambda: [bnb.functional.dequantize_4bit(w.data, w.quant_state) for w in weights]

  def quiet():
    with torch.no_grad():
      return forward()

  # Every matrix has a code book of its own; ours is in the program, once.
  size = lambda w: w.data.nbytes + w.quant_state.absmax.nbytes + w.quant_state.code.nbytes
  return {
    "dequantize": whole,
    "forward": quiet,
    "step": step,
    "values": [v.numpy().T for v in whole()],
    "bytes": sum(map(size, weights)),
  }


def measured(tokens: int, pairs: int) -> dict:
  """Times and ratios at a number of tokens, after all sides were found to do the same."""
  training.keep_freed_memory()  # as the main job does; it serves all sides
  kernels, x = data(tokens)
  sides = {
    "pelt_jax": here(kernels, jnp.asarray(x)),
    "qwix": in_qwix(kernels, jnp.asarray(x)),
    "bitsandbytes": in_bitsandbytes(kernels, x),
  }
  for name, side in sides.items():
    pairs_of = zip(side["values"], sides["pelt_jax"]["values"], strict=True)
    same = [float(np.isclose(a, b, rtol=0, atol=1e-5).mean()) for a, b in pairs_of]
    if min(same) < 0.999:  # a middle between two codes may go either way
      raise SystemExit(f"{name} stands for other kernels, so this compares nothing: {same}")
  losses = {name: side["step"]() for name, side in sides.items()}
  if any(abs(v / losses["pelt_jax"] - 1) > 1e-3 for v in losses.values()):
    raise SystemExit(f"the losses of step 1 differ, so this compares nothing: {losses}")
  of = lambda what: {n: side[what] for n, side in sides.items() if what in side}
  results: dict = {"loss_step_1": losses, "bytes": of("bytes"), "temporary": of("temporary")}
  for what in RUNS:
    cpu = alternate({n: s[what] for n, s in sides.items()}, pairs)["cpu"]
    results[what] = {
      name: {"cpu_seconds_median": float(np.median(times))}
      | ({} if name == "pelt_jax" else ratio(cpu["pelt_jax"], times))
      for name, times in cpu.items()
    }
  return results


def on_cores(cores: int, *args: int) -> dict:
  """`measured` in a process of its own, whose threads are as many as its cores."""
  everywhere = os.sched_getaffinity(0)
  os.sched_setaffinity(0, sorted(everywhere)[:cores])
  try:
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawned) as pool:
      return pool.submit(measured, *args).result()
  finally:
    os.sched_setaffinity(0, everywhere)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--pairs", type=int, default=30)
  parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256])
  parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  rows = [
    {"cores": cores, "tokens": tokens} | on_cores(cores, tokens, args.pairs)
    for cores in args.cores
    for tokens in args.tokens
  ]
  names = ("jax", "flax", "qwix", "torch", "bitsandbytes")
  versions = {n: importlib.metadata.version(n) for n in names}
  today, model = datetime.date.today().isoformat(), processor()
  results = {"date": today, "pairs": args.pairs, "processor": model, "versions": versions}
  write(args.out / "bench_nf4.json", json.dumps(results | {"rows": rows}, indent=1) + "\n")
  lines = [
    "# NF4 on CPU: CPU time against qwix and bitsandbytes\n",
    "Made by `experiments/bench_nf4.py`; below 1 means that pelt_jax is faster (95 % interval).",
    "MB beside: temporary memory of the compiled step, pelt_jax's and qwix's.\n",
    "| | tokens | cores | CPU s | over qwix's | over bitsandbytes' | MB beside | qwix |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    for what in RUNS:
      cells = [f"{row[what]['pelt_jax']['cpu_seconds_median']:.4f}"]
      for other in ("qwix", "bitsandbytes"):
        r = row[what][other]
        cells.append("{:.3f} ({:.3f}–{:.3f})".format(r["ratio"], *r["95 %"]))
      beside = [f"{row['temporary'][n] / 1e6:.1f}" for n in ("pelt_jax", "qwix")]
      cells += beside if what == "step" else ["", ""]
      lines.append(f"| {what} | {row['tokens']} | {row['cores']} | {' | '.join(cells)} |")
  shown = ", ".join(f"{n} {b:,}" for n, b in rows[0]["bytes"].items())
  count = BLOCKS * 2 * WIDTH * INNER
  lines.append(f"\nResident bytes: {shown}, of {count:,} numbers.")
  lines.append("; ".join(f"{k} {v}" for k, v in versions.items()))
  lines.append(f"{args.pairs} pairs each, {today}, {model}.")
  write(args.out / "bench_nf4.md", "\n".join(lines) + "\n")
  print("\n".join(lines))


def processor() -> str:
  """The machine's, by the kernel's word: which side is faster depends on it."""
  known = [v.split(":", 1) for v in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if v]
  found = {name.strip(): value.strip() for name, *rest in known for value in rest}
  vectors = "AVX-512" if "avx512f" in found.get("flags", "") else "no AVX-512"
  return f"{found.get('model name', 'unknown')} ({vectors})"


if __name__ == "__main__":
  main()
