"""What a sharded QLoRA step moves between devices that need not be there.

    python experiments/aot_collectives.py [--targets v5p h100] [--mesh fsdp=4 ...]

Compiles the step of `aot_memory.py` for four devices, on shapes alone, and lists what travels: with
the codes gathered as the main job does it, and as XLA would do it by itself. Writes
aot_collectives.json and aot_collectives.md. Needs what that script needs.
"""

import argparse
import collections
import datetime
import json
import math
import pathlib
import re

import aot_memory as aot  # first: it sets the platform
import jax
import numpy as np
import optax
from reporting import write

import pelt_jax as pelt

MOVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "bf16": 16, "f16": 16}


def moved(text: str) -> dict[str, dict]:
  """By operation and dtype: how many there are, and the bytes of the largest result."""
  found, seen = collections.defaultdict(list), set()
  for line in text.splitlines():
    match = re.search(rf"= (.*?) ({'|'.join(MOVES)})(-start)?\(", line)
    channel = re.search(r"channel_id=(\d+)", line)
    if not match or (channel and channel[1] in seen):  # a chain of steps shares a channel
      continue
    seen |= {channel[1]} if channel else set()
    results = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])
    results = [(d, sizes) for d, sizes in results if d in BITS or re.search(r"\d", d)]
    for dtype, sizes in results[len(results) // 2 :] if match[3] else results:  # operands first
      bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
      count = math.prod(map(int, filter(None, sizes.split(","))))
      found[f"{match[2]} {dtype}"].append(count * bits // 8)
  return {n: {"count": len(sizes), "largest": max(sizes)} for n, sizes in sorted(found.items())}


def measure(target: str, mesh_text: str, gather: bool, args: argparse.Namespace) -> dict:
  sizes = {k: int(v) for k, _, v in (part.partition("=") for part in mesh_text.split(","))}
  chips = aot.devices(target, math.prod(sizes.values()))
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  mesh = jax.sharding.Mesh(np.array(chips).reshape(*sizes.values()), tuple(sizes), axis_types=auto)
  P = jax.sharding.PartitionSpec
  whole = jax.sharding.NamedSharding(mesh, P())
  rows = jax.sharding.NamedSharding(mesh, P(tuple(n for n in sizes if n != "model")))
  layout = "words" if chips[0].platform == "tpu" else "rows"
  step, given, places = aot.abstract_step(args.model, args, layout, mesh, gather)
  trainable, frozen, state, batch, key = given
  at, below = pelt.partition(places)
  put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  optimizer = optax.tree.map_params(
    optax.adamw(1e-4), lambda _, s: s, state.optimizer, at, transform_non_params=lambda _: whole
  )
  placed = (
    jax.tree.map(put, trainable, at),
    jax.tree.map(put, frozen, below),
    state._replace(optimizer=jax.tree.map(put, state.optimizer, optimizer)),
    jax.tree.map(lambda x: put(x, rows), batch),
    put(key, whole),
  )
  out = (at, state._replace(optimizer=optimizer), whole)
  jitted = jax.jit(step, donate_argnums=(0, 2), out_shardings=out)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # activations keep to their rows
    compiled = jitted.lower(*placed).compile()
  text = compiled.as_text()
  if args.keep:
    (args.out / f"{target}-{mesh_text}-{gather}.hlo.txt").write_text(text)
  return {"target": target, "mesh": mesh_text, "gathered": gather, "moved": moved(text)}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="llama-7b", choices=aot.SHAPES)
  parser.add_argument("--layers", type=int, default=4, help="a scan compiles one of them")
  parser.add_argument("--targets", nargs="+", default=["v5p"], choices=aot.CARDS)
  parser.add_argument("--mesh", nargs="+", default=["fsdp=4", "fsdp=2,model=2"])
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--rank", type=int, default=64)
  parser.add_argument("--keep", action="store_true", help="the compiled programs' text too")
  parser.add_argument("--out", type=pathlib.Path, default=aot.HERE / "results")
  args = parser.parse_args()
  args.naive, args.paged, args.lora = False, False, "bfloat16"
  args.out.mkdir(parents=True, exist_ok=True)
  rows = [
    measure(target, mesh, gather, args)
    for target in args.targets
    for mesh in args.mesh
    for gather in (True, False)
  ]
  file = args.out / "aot_collectives.json"
  today = datetime.date.today().isoformat()
  settings = {n: getattr(args, n) for n in ("model", "layers", "length", "rank")}
  write(file, json.dumps({"date": today, **settings, "rows": rows}, indent=1) + "\n")
  lines = [
    f"# What a QLoRA step of {args.model} moves between four devices\n",
    "The largest array of each kind, in MB, and how many there are in the compiled program (a loop",
    "over layers counts once).\n",
    "| target | mesh | codes gathered | moved |",
    "|---|---|---|---|",
  ]
  for row in rows:
    shown = "; ".join(
      f"{name} {m['largest'] / 1e6:.2f} ({m['count']})" for name, m in row["moved"].items()
    )
    lines.append(
      f"| {row['target']} | {row['mesh']} | {'yes' if row['gathered'] else 'no'} | {shown} |"
    )
  write(
    args.out / "aot_collectives.md", "\n".join([*lines, "", f"{today}, jax {jax.__version__}.", ""])
  )


if __name__ == "__main__":
  main()
