"""What a QLoRA step of large models takes on cards that need not be there.

    python experiments/aot_memory.py [--models llama-65b ...] [--targets a6000 ...] [--out FOLDER]

Compiles the training step ahead of time, on shapes alone: Llama with scanned, rematerialized
layers, bfloat16 activations, NF4 under double quantization, LoRA of rank 64 on all linear layers,
batch 1, AdamW with its state paged to the host. Writes aot_memory.json and aot_memory.md; with
--naive one row more, of the same step on bfloat16 weights without any of it.

TPU targets need libtpu (`pip install "jax[tpu]"`), CUDA targets `jax-cuda12-plugin` and
`jax-cuda12-pjrt` of jax's version. No accelerator is needed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from reporting import write

import pelt_jax as pelt
from pelt_jax import models, training

HERE = pathlib.Path(__file__).parent
# Hidden size, inner size, layers, heads, heads of keys, vocabulary.
SHAPES = {
  "llama-7b": (4096, 11008, 32, 32, 32, 32000),
  "llama-8b": (4096, 14336, 32, 32, 8, 128256),
  "llama-13b": (5120, 13824, 40, 40, 40, 32000),
  "llama-33b": (6656, 17920, 60, 52, 52, 32000),
  "llama-65b": (8192, 22016, 80, 64, 64, 32000),
  "llama-70b": (8192, 28672, 80, 64, 8, 32000),
}
CARDS = {"a6000": 48, "h100": 80, "v5p": 95}  # GB of memory
LIMIT = 100_000  # elements from which on optimizer state lies in the host's memory


def devices(target: str, count: int = 1) -> list[jax.Device]:
  """That many of a kind; the TPU's topology has four."""
  if target == "v5p":
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
  else:
    text = (HERE / "targets" / f"{target}.txtpb").read_text()
    found = topologies.get_topology_desc(
      platform="cuda", topology_name=target, topology=f"1x1x{count}", target_config=text
    )
  return list(found.devices)[:count]


def abstract_step(name: str, args: argparse.Namespace, layout: str, mesh=None, gather: bool = True):
  """The step and its arguments as shapes; on a mesh, how params lie there and its batch's rows."""
  hidden, inner, layers, heads, kv, vocabulary = SHAPES[name]
  model = models.from_config(
    {
      "model_type": "llama",
      "vocab_size": vocabulary,
      "hidden_size": hidden,
      "intermediate_size": inner,
      "num_hidden_layers": args.layers or layers,
      "num_attention_heads": heads,
      "num_key_value_heads": kv,
      "max_position_embeddings": args.length,
      "tie_word_embeddings": False,
    },
    scan=True,
    remat=True,
    dtype=jnp.bfloat16,
  )
  ids = jax.ShapeDtypeStruct((mesh.size if mesh else 1, args.length), jnp.int32)
  half = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
  base = jax.tree.map(half, jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
  sites = pelt.sites(model, ids)
  kind = jnp.dtype(args.lora)
  if args.naive:
    method = pelt.lora(rank=args.rank, alpha=16, targets="all-linear", dtype=kind)
  else:
    method = pelt.qlora(rank=args.rank, alpha=16, dtype=kind, layout=layout)
  params = jax.eval_shape(lambda key, p: method.init(key, p, sites), jax.random.key(1), base)
  trainable, frozen = pelt.partition(params)
  tx = optax.adamw(1e-4, b2=0.999)
  tx = pelt.paged(tx, LIMIT) if args.paged else tx
  where, places = None, None
  if mesh is not None:
    specs = training.base_specs(sites, mesh)
    where, places = pelt.gathered(params, specs, mesh), pelt.shardings(params, specs, mesh)
  apply = pelt.bypass(model.apply, gathered=where if gather else None)
  _, step = training.train_step(apply, training.next_token, tx, clip=0.3)
  state = training.State(jax.eval_shape(tx.init, trainable), ())
  batch = {"input_ids": ids, "labels": ids}
  key = jax.eval_shape(lambda: jax.random.key(0))
  return step, (trainable, frozen, state, batch, key), places


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
  (chip,) = devices(target)
  here = jax.sharding.SingleDeviceSharding(chip)
  host = jax.sharding.SingleDeviceSharding(chip, memory_kind="pinned_host")
  # The layout follows the platform; the default one would follow this machine's.
  step, given, _ = abstract_step(name, args, "words" if chip.platform == "tpu" else "rows")
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
  memory = compiled.memory_analysis()
  fields = ("argument", "output", "temp", "alias")
  sizes = {f: getattr(memory, f"{f}_size_in_bytes") for f in fields}
  sizes |= {f"host_{f}": getattr(memory, f"host_{f}_size_in_bytes") for f in fields}
  total = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
  large = [x for x in jax.tree.leaves(state.optimizer) if x.size >= LIMIT]
  return {
    "model": name,
    "target": target,
    "length": args.length,
    "rank": args.rank,
    "naive": args.naive,
    "fit": None,
    "dtypes": {
      "lora": sorted({str(x.dtype) for x in jax.tree.leaves(trainable)}),
      "moments": sorted({str(x.dtype) for x in large}),
    },
    "bytes": sizes | {"device": total},
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
    "results + temporaries, donated arguments counted once; host memory is what is paged.\n"
  )
  lines.append(
    "| model | length | target | LoRA, moments | device | of it temporary | host | compiled in |"
  )
  lines.append("|---|---|---|---|---|---|---|---|")
  for r in sorted(results["rows"], key=lambda r: (r["fit"] or 0, r["target"], r["model"])):
    sizes, kinds = r["bytes"], r["dtypes"]
    how = ", ".join(dict.fromkeys([*kinds["lora"], *kinds["moments"]]))
    how += f", rank {r['rank']}" + (", naive" if r["naive"] else ", unpaged" * (not r["paged"]))
    device, temp, host = (sizes[k] / 1e9 for k in ("device", "temp", "host_argument"))
    room = f"longest for {r['fit']:g} GB" if r["fit"] else f"{CARDS[r['target']]} GB"
    lines.append(
      f"| {r['model']} | {r['length']:,} | {r['target']}, {room} | {how} "
      f"| {device:.2f} | {temp:.2f} | {host:.2f} | {r['compile_s']:.0f} s |"
    )
  versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
  return "\n".join([*lines, "", f"{results['date']}; {versions}.", ""])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=["llama-65b"], choices=SHAPES)
  parser.add_argument("--targets", nargs="+", default=list(CARDS), choices=CARDS)
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--rank", type=int, default=64)
  parser.add_argument("--layers", type=int, help="fewer than the model has, to try it out")
  parser.add_argument("--lora", default="bfloat16", choices=("bfloat16", "float32"))
  parser.add_argument("--naive", action="store_true", help="LoRA on bfloat16, nothing paged")
  parser.add_argument("--fit", type=float, help="search the longest context for so many GB")
  parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
  parser.add_argument("--unpaged", dest="paged", action="store_false", help="state on the device")
  args = parser.parse_args()
  args.paged &= not args.naive
  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / "aot_memory.json"
  results = json.loads(file.read_text()) if file.is_file() else {"rows": []}
  names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
  found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
  results["versions"] = {n: importlib.metadata.version(n) for n in names if n in found}
  results["date"] = datetime.date.today().isoformat()
  same = ("model", "target", "rank", "naive", "dtypes", "fit")
  for name in args.models:
    for target in args.targets:
      row = (longest if args.fit else measure)(name, target, args)
      again = (*same, *(() if args.fit else ("length",)))
      others = [
        r
        for r in results["rows"]
        if any(r[k] != row[k] for k in again) or bool(r["paged"]) != args.paged
      ]
      results["rows"] = [*others, row]
      print(json.dumps(row), flush=True)
      if not args.layers:
        write(file, json.dumps(results, indent=1) + "\n")
        write(args.out / "aot_memory.md", markdown(results))


if __name__ == "__main__":
  main()
