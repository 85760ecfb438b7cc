"""What a QLoRA step of large models takes on cards that need not be there.

    python experiments/aot_memory.py [--models llama-65b ...] [--targets a6000 ...] [--out FOLDER]

Compiles the training step of `aot.py` ahead of time, on shapes alone: NF4 under double
quantization, LoRA of rank 64, batch 1, AdamW with its state paged to the host. Writes
aot_memory.json and aot_memory.md; with --naive one row more, of the same step on bfloat16 weights
without any of it. Needs what `aot.py` needs.
"""

import argparse
import datetime
import json
import pathlib
import time

import aot  # first: it sets the platform
import jax
from reporting import write

CARDS = {"a6000": 48, "h100": 80, "v5p": 95}  # GB of memory
LIMIT = 100_000  # elements from which on optimizer state lies in the host's memory


def longest(name: str, target: str, args: argparse.Namespace) -> dict:
  """The row of the longest context whose step fits into `args.fit` GB, to 256 tokens."""
  low, high, found = 0, None, None
  length = 2048
  while high is None or high - low > 256:
    args.length = length
    row = measure(name, target, args)
    print(name, target, length, f"{row['bytes']['device'] / 1e9:.2f} GB", flush=True)
    if row["bytes"]["device"] <= args.fit * 1e9:
      low, found = length, row
    else:
      high = length
    length = 2 * low if high is None else (low + high) // 512 * 256
    if high is not None and length <= low:
      break
  if found is None:
    raise SystemExit(f"{name}: not even {high} tokens fit into {args.fit} GB on {target}")
  return found | {"fit": args.fit}


def measure(name: str, target: str, args: argparse.Namespace) -> dict:
  (chip,) = aot.devices(target)
  here = jax.sharding.SingleDeviceSharding(chip)
  host = jax.sharding.SingleDeviceSharding(chip, memory_kind="pinned_host")
  # The layout follows the platform; the default one would follow this machine's.
  step, given, _ = aot.abstract_step(
    name,
    "words" if chip.platform == "tpu" else "rows",
    length=args.length,
    rank=args.rank,
    kind=args.lora,
    quantized=not args.naive,
    layers=args.layers,
    paged=LIMIT if args.paged else None,
    remat="offload" if args.offload else True,
  )
  at = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
  away = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=host if x.size >= LIMIT and args.paged else here
  )
  trainable, frozen, state, batch, key = given
  placed = (
    *jax.tree.map(at, (trainable, frozen)),
    jax.tree.map(away, state),
    *jax.tree.map(at, (batch, key)),
  )
  results = jax.tree.map(lambda x: x.sharding, (placed[0], placed[2]))
  start = time.perf_counter()
  jitted = jax.jit(step, donate_argnums=(0, 2), out_shardings=(*results, here))
  compiled = jitted.lower(*placed).compile()
  seconds = time.perf_counter() - start
  large = [x for x in jax.tree.leaves(state.optimizer) if x.size >= LIMIT]
  return {
    "model": name,
    "target": target,
    "length": args.length,
    "rank": args.rank,
    "naive": args.naive,
    "fit": None,
    "offload": args.offload,
    "dtypes": {
      "lora": sorted({str(x.dtype) for x in jax.tree.leaves(trainable)}),
      "moments": sorted({str(x.dtype) for x in large}),
    },
    "bytes": aot.sizes_of(compiled),
    "paged": sum(x.size * x.dtype.itemsize for x in large) if args.paged else 0,
    "flops": (compiled.cost_analysis() or {}).get("flops"),
    "compile_s": seconds,
  }


def markdown(results: dict) -> str:
  lines = ["# Memory of a QLoRA step, compiled ahead of time\n"]
  lines.append(
    "Made by `experiments/aot_memory.py`; GB are 1e9 bytes. Device memory is arguments +"
  )
  lines.append(
    "results + temporaries, donated arguments counted once; host memory is what is paged, and the"
  )
  lines.append('layers\' inputs where `remat="offload"` keeps them there for the backward pass.\n')
  lines.append(
    "| model | length | target | LoRA, moments | device | of it temporary | host | compiled in |"
  )
  lines.append("|---|---|---|---|---|---|---|---|")
  for r in sorted(results["rows"], key=lambda r: (r["fit"] or 0, r["target"], r["model"])):
    sizes, kinds = r["bytes"], r["dtypes"]
    how = ", ".join(dict.fromkeys([*kinds["lora"], *kinds["moments"]]))
    how += f", rank {r['rank']}" + (", naive" if r["naive"] else ", unpaged" * (not r["paged"]))
    how += ", layers' inputs on the host" * r.get("offload", False)
    device, temp = sizes["device"] / 1e9, sizes["temp"] / 1e9
    host = (sizes["host_argument"] + sizes["host_temp"]) / 1e9
    room = f"longest for {r['fit']:g} GB" if r["fit"] else f"{CARDS[r['target']]} GB"
    lines.append(
      f"| {r['model']} | {r['length']:,} | {r['target']}, {room} | {how} "
      f"| {device:.2f} | {temp:.2f} | {host:.2f} | {r['compile_s']:.0f} s |"
    )
  lines.append("\nLongest contexts of QLoRA of rank 32 as others published them: 70B parameters")
  lines.append(
    "12,106 tokens in 48 GB and 89,389 in 80 GB, 8B 78,475 in 24 GB (Unsloth, with kernels of"
  )
  lines.append(
    "its own). Those were run on cards; these are what the compiler says that it needs, of which"
  )
  lines.append(
    "most is one layer's activations, and the mask of attention, the length squared in bytes."
  )
  versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
  return "\n".join([*lines, "", f"{results['date']}; {versions}.", ""])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=["llama-65b"], choices=aot.SHAPES)
  parser.add_argument("--targets", nargs="+", default=list(CARDS), choices=CARDS)
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--rank", type=int, default=64)
  parser.add_argument("--layers", type=int, help="fewer than the model has, to try it out")
  parser.add_argument("--lora", default="bfloat16", choices=("bfloat16", "float32"))
  parser.add_argument("--naive", action="store_true", help="LoRA on bfloat16, nothing paged")
  parser.add_argument("--offload", action="store_true", help="layers' inputs on the host")
  parser.add_argument("--fit", type=float, help="search the longest context for so many GB")
  parser.add_argument("--out", type=pathlib.Path, default=aot.HERE / "results")
  parser.add_argument("--unpaged", dest="paged", action="store_false", help="state on the device")
  args = parser.parse_args()
  args.paged &= not args.naive
  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / "aot_memory.json"
  results = json.loads(file.read_text()) if file.is_file() else {"rows": []}
  results["versions"] = aot.versions()
  results["date"] = datetime.date.today().isoformat()
  same = ("model", "target", "rank", "naive", "dtypes", "fit", "offload")
  for name in args.models:
    for target in args.targets:
      row = (longest if args.fit else measure)(name, target, args)
      again = (*same, *(() if args.fit else ("length",)))
      others = [
        r
        for r in results["rows"]
        if any(r.get(k, False) != row[k] for k in again) or bool(r["paged"]) != args.paged
      ]
      results["rows"] = [*others, row]
      print(json.dumps(row), flush=True)
      if not args.layers:
        write(file, json.dumps(results, indent=1) + "\n")
        write(args.out / "aot_memory.md", markdown(results))


if __name__ == "__main__":
  main()
