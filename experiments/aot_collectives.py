"""What a sharded QLoRA step moves between devices that need not be there.

    python experiments/aot_collectives.py [--targets v5p h100] [--mesh fsdp=4 ...]

Compiles the step of `aot.py` for four devices, on shapes alone, and lists what travels: with
the codes gathered as the main job does it, and as XLA would do it by itself. Writes
aot_collectives.json and aot_collectives.md. Needs what that script needs.
"""

import argparse
import datetime
import json
import pathlib

import aot  # first: it sets the platform
import jax
from aot_memory import CARDS
from collectives import collectives, largest
from reporting import write


def measure(target: str, mesh_text: str, gather: bool, args: argparse.Namespace) -> dict:
  mesh = aot.mesh_of(target, mesh_text)
  layout = "words" if mesh.devices.flat[0].platform == "tpu" else "rows"
  step, given, places = aot.abstract_step(
    args.model,
    layout,
    length=args.length,
    rank=args.rank,
    kind="bfloat16",
    layers=args.layers,
    mesh=mesh,
    gather=gather,
  )
  compiled = aot.compile_on(mesh, step, given, places)
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
  parser.add_argument("--targets", nargs="+", default=["v5p"], choices=CARDS)
  parser.add_argument("--mesh", nargs="+", default=["fsdp=4", "fsdp=2,model=2"])
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--rank", type=int, default=64)
  parser.add_argument("--keep", action="store_true", help="the compiled programs' text too")
  parser.add_argument("--out", type=pathlib.Path, default=aot.HERE / "results")
  args = parser.parse_args()
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
