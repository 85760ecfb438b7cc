"""NF4 here, in qwix and in bitsandbytes: dequantizing, a forward pass and a QLoRA step, on CPU.

    python experiments/bench_nf4.py --out experiments/results

Two feed-forward blocks of nn.Dense (1024 -> 4096 -> 1024), float32, every kernel in NF4 in blocks
of 64, LoRA of rank 16, all cores. At many tokens the products outweigh all else, for every side.
Functions take turns in one process, and CPU times are compared pair by pair. bitsandbytes runs
Linear4bit with LoRA beside it.

Needs torch, bitsandbytes and qwix.
"""

import argparse
import datetime
import importlib.metadata
import json
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
  """A jitted AdamW step on what trains, that keeps its own state, and a jitted forward pass."""
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

  def run() -> float:
    held[0], held[1], value = step(held[0], held[1], frozen, x)
    return float(value)

  return lambda: forward(params, x).block_until_ready(), run


def here(kernels: dict, x: jax.Array) -> dict:
  model = Blocks()
  params = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()}
  method = pelt.chain(pelt.nf4(targets="kernel"), pelt.lora(RANK, RANK, targets="kernel"))
  params = method.init(jax.random.key(0), params, pelt.sites(model, x))
  apply = pelt.bypass(model.apply)
  nodes = [params[name]["kernel"].base for name in kernels]
  whole = jax.jit(lambda nodes: [n.materialize() for n in nodes])
  forward, step = stepped(lambda p, x: apply({"params": p}, x), params, pelt.partition, x)
  return {
    "dequantize": lambda: jax.block_until_ready(whole(nodes)),
    "forward": forward,
    "step": step,
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

  forward, step = stepped(lambda p, x: model.apply({"params": p}, x), params, split, x)
  size = lambda a: a.qvalue.on_device_size_in_bytes() + a.scale.on_device_size_in_bytes()
  return {
    "dequantize": lambda: jax.block_until_ready(whole(arrays)),
    "forward": forward,
    "step": step,
    "values": whole(arrays),
    "bytes": sum(map(size, arrays)),
  }


def in_bitsandbytes(kernels: dict, x: np.ndarray) -> dict:
  import bitsandbytes as bnb
  import torch

  torch.set_num_threads(os.cpu_count() or 1)
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
  results: dict = {"loss_step_1": losses, "bytes": {n: s["bytes"] for n, s in sides.items()}}
  for what in RUNS:
    cpu = alternate({n: s[what] for n, s in sides.items()}, pairs)["cpu"]
    results[what] = {
      name: {"cpu_seconds_median": float(np.median(times))}
      | ({} if name == "pelt_jax" else ratio(cpu["pelt_jax"], times))
      for name, times in cpu.items()
    }
  return results


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--pairs", type=int, default=30)
  parser.add_argument("--tokens", type=int, nargs="+", default=[256, 16])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  training.keep_freed_memory()  # as the main job does; it serves all sides
  by_tokens = {tokens: measured(tokens, args.pairs) for tokens in args.tokens}
  names = ("jax", "flax", "qwix", "torch", "bitsandbytes")
  versions = {n: importlib.metadata.version(n) for n in names}
  today = datetime.date.today().isoformat()
  results = {"date": today, "pairs": args.pairs, "cpus": os.cpu_count(), "versions": versions}
  write(args.out / "bench_nf4.json", json.dumps(results | {"tokens": by_tokens}, indent=1) + "\n")
  lines = [
    "# NF4 on CPU: CPU time against qwix and bitsandbytes\n",
    "Made by `experiments/bench_nf4.py`; below 1 means that pelt_jax is faster (95 % interval).\n",
    "| | tokens | CPU s | over qwix's | over bitsandbytes' |",
    "|---|---|---|---|---|",
  ]
  for tokens, found in by_tokens.items():
    for what in RUNS:
      cells = [f"{found[what]['pelt_jax']['cpu_seconds_median']:.4f}"]
      for other in ("qwix", "bitsandbytes"):
        r = found[what][other]
        cells.append("{:.3f} ({:.3f}–{:.3f})".format(r["ratio"], *r["95 %"]))
      lines.append(f"| {what} | {tokens} | {' | '.join(cells)} |")
  found = by_tokens[args.tokens[0]]
  shown = ", ".join(f"{n} {b:,}" for n, b in found["bytes"].items())
  count = BLOCKS * 2 * WIDTH * INNER
  lines.append(f"\nResident bytes: {shown}, of {count:,} numbers.")
  lines.append("; ".join(f"{k} {v}" for k, v in versions.items()))
  lines.append(f"{args.pairs} pairs each, {today}, {os.cpu_count()} cores.")
  write(args.out / "bench_nf4.md", "\n".join(lines) + "\n")
  print("\n".join(lines))


if __name__ == "__main__":
  main()
