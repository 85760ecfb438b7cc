"""What a sharded QLoRA step moves between devices that need not be there.

    python experiments/aot_collectives.py [--targets v5p h100] [--mesh fsdp=4 ...]

Compiles the step of `aot_memory.py` for four devices, on shapes alone, and lists what travels: with
the codes gathered as the main job does it, and as XLA would do it by itself. Writes
aot_collectives.json and aot_collectives.md. Needs what that script needs.
"""

import argparse
import datetime
import json
import math
import pathlib

import aot_memory as aot  # first: it sets the platform
import jax
import numpy as np
from collectives import collectives, largest
from reporting import write

import pelt_jax as pelt
from pelt_jax import training


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
  above, below = pelt.partition(places)
  put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  trainable = jax.tree.map(put, trainable, above)
  kept = training.state_shardings(trainable, state, mesh)
  placed = (
    trainable,
    jax.tree.map(put, frozen, below),
    jax.tree.map(put, state, kept[1]),
    jax.tree.map(lambda x: put(x, rows), batch),
    put(key, whole),
  )
  jitted = jax.jit(step, donate_argnums=(0, 2), out_shardings=(*kept, whole))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # activations keep to their rows
    compiled = jitted.lower(*placed).compile()
  text = compiled.as_text()
  if args.keep:
    (args.out / f"{target}-{mesh_text}-{gather}.hlo.txt").write_text(text)
  moved = largest(collectives(text))
  return {"target": target, "mesh": mesh_text, "gathered": gather, "moved": moved}


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
