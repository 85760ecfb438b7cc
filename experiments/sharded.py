"""Training on meshes of eight virtual devices, against one device: losses, and what travels.

    taskset -c 0 python experiments/sharded.py [--methods lora ...] [--meshes data=2,model=4 ...]

A tiny Llama, 20 steps of Adam, for every method and mesh, its layers looped and scanned. From each
compiled step it reads what moves between devices (bytes of results, on one device, per step) and
looks among it for gradients of frozen matrices and for weights that 4-bit codes stand for. The bank
trains at a lower rate than the rest: of eight rows each member has two or three, and at 5e-3 its
losses are so unsteady that rounding grows hundredfold within 20 steps (in float64 they differ by
4e-15 as they should).

For LoRA and QLoRA the traffic is held against what it should be, `base + added`:

- base is the traffic of the same step without the method. Something has to train, or there is no
  backward pass: here vectors that scale the outputs of the same matrices (IA3), since gradients
  then reach the same places. What they themselves add is subtracted, by the same closed form.
- added is, with D devices splitting the batch's B rows of T tokens and M splitting matrices: the
  gradients of what trains, each device's part of them, if D > 1; and if M > 1 one (B / D, T, rank)
  per adapted matrix that is split, where a sum over the split features passes the rank (for a
  column-parallel matrix going back, for a row-parallel one going forward), and a number per array
  that is split, for the norm of the gradients.

Writes sharded.json and sharded.md. Rows that the JSON file has are kept where they are not asked
for; so a run may do a part.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

# Else most of the time goes into LLVM, for programs that run 20 steps; the same arrays move.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # what XLA cannot move well is in the table
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from collectives import Move, collectives, traffic
from reporting import write

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax._walk import every_node

BATCH, LENGTH, STEPS, LAYERS = 8, 11, 20, 2
RATE, RATES = 5e-3, {"bank": 1e-3}
# No shape or size of a frozen matrix, or of its shard, is one of an activation (whose tokens are
# 11 to a row) or of what a method adds.
SIZES = dict(
  model_type="llama",
  vocab_size=112,
  hidden_size=64,
  intermediate_size=320,
  num_hidden_layers=LAYERS,
  num_attention_heads=8,
  num_key_value_heads=8,
  head_dim=24,
  initializer_range=0.1,
)
RANK, BOTTLENECK, PREFIX, HIDDEN, BLOCK = 5, 6, 7, 20, 32
MESHES = (
  "data=8",
  "model=8",
  "data=2,model=4",
  "data=4,model=2",
  "fsdp=8",
  "data=2,fsdp=2,model=2",
)
BOUNDS = {"qlora": 1e-4}
BOUND, MOST = 1e-5, 1.05  # of other methods' losses; of traffic


def layout(scan: bool) -> str:
  """Of codes: each form of the model has one of those that serve tensor parallelism."""
  return "words" if scan else "rows"


def adapters(style: str) -> pelt.Transform:
  return pelt.adapter(style, bottleneck=BOTTLENECK, train_norms=False)


def moved(params: Any, seed: int, by: float = 0.1) -> Any:
  """Params whose additions are no longer what they start as."""
  random = np.random.default_rng(seed)
  trainable, frozen = pelt.partition(params)
  move = lambda x: x + by * jnp.asarray(random.normal(size=x.shape), x.dtype)
  return pelt.combine(jax.tree.map(move, trainable), frozen)


def fusion(key: jax.Array, params: dict, sites: tuple) -> dict:
  start = lambda: adapters("pfeiffer").init(key, params, sites)
  tasks = {name: moved(start(), seed) for seed, name in enumerate(("one", "two", "three"))}
  return pelt.adapter_fusion(tasks).init(key, params, sites)


def bank(key: jax.Array, params: dict, sites: tuple) -> dict:
  method = pelt.lora(rank=RANK, targets="all-linear")
  return pelt.bank([method.init(k, params, sites) for k in jax.random.split(key, 3)])


def methods(scan: bool) -> dict[str, pelt.Transform]:
  """By name; codes are packed as `scan` says."""
  return {
    "lora": pelt.lora(rank=RANK, targets="all-linear"),
    "qlora": pelt.qlora(rank=RANK, block=BLOCK, layout=layout(scan)),
    "houlsby": adapters("houlsby"),
    "pfeiffer": adapters("pfeiffer"),
    "fusion": pelt.Transform(fusion),
    "prefix": pelt.prefix_tuning(PREFIX, hidden=HIDDEN),
    "adalora": pelt.adalora(STEPS, RANK, 3, warmup=2, final=6, interval=3),
    "unipelt": pelt.unipelt(
      PREFIX, rank=RANK, bottleneck=BOTTLENECK, hidden=HIDDEN, gate_pool="token"
    ),
    "bank": pelt.Transform(bank),
  }


def base_of(name: str, scan: bool) -> pelt.Transform:
  """What stands for the step without the method: see the top."""
  vectors = pelt.ia3("all-linear", feedforward=())
  if name == "qlora":
    return pelt.chain(pelt.nf4(block=BLOCK, double_quant=True, layout=layout(scan)), vectors)
  return vectors


def loss(apply: Any, params: Any, batch: dict, key: jax.Array) -> jax.Array:
  banked = any(isinstance(node, pelt.nodes.BankWeight) for node in every_node(params))
  routed = {"rows": batch["rows"]} if banked else {}
  logits = apply({"params": params}, batch["input_ids"], deterministic=False, **routed)
  return models.token_losses(logits, batch["labels"]).mean()


def batches():
  """Something to learn: to count upwards."""
  random, vocab = np.random.default_rng(0), SIZES["vocab_size"]
  for _ in range(STEPS):
    ids = (random.integers(vocab, size=(BATCH, 1)) + np.arange(LENGTH + 1)) % vocab
    ids = ids.astype(np.int32)
    rows = (np.arange(BATCH, dtype=np.int32) * 2) % 3
    yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "rows": rows}


class Built(NamedTuple):
  """A model under a method, with its params on the host."""

  model: Any
  method: pelt.Transform
  sites: tuple
  params: Any


def build(method: pelt.Transform, scan: bool, remat: bool = False) -> Built:
  """The model and its params, the additions where they start."""
  model = models.from_config(SIZES, scan=scan, remat=remat)
  ids = jnp.zeros((BATCH, LENGTH), jnp.int32)
  base = model.init(jax.random.key(0), ids)["params"]
  sites = pelt.sites(model, ids)
  params = jax.jit(lambda base: method.init(jax.random.key(1), base, sites))(base)
  # NumPy: placing may alias, and a donated alias would delete the original.
  return Built(model, method, sites, jax.tree.map(np.asarray, params))


class Run(NamedTuple):
  """What came of the steps; without running them, no losses."""

  losses: np.ndarray
  trainable: Any
  frozen: Any
  state: Any
  moves: list[Move]


def train(
  built: Built,
  mesh: jax.sharding.Mesh | None = None,
  *,
  gather: bool = True,
  run: bool = True,
  tx: Any = None,
  moments: tuple[str, ...] = (),
) -> Run:
  """Trains on a mesh, or on one device."""
  where, place, params = None, lambda batch: batch, jax.tree.map(jnp.asarray, built.params)
  if mesh is not None:
    specs = training.base_specs(built.sites, mesh)
    where = pelt.gathered(params, specs, mesh) if gather else None
    params = jax.device_put(built.params, pelt.shardings(params, specs, mesh))
    place = lambda batch: training.place_batch(batch, mesh)
  apply = pelt.bypass(built.model.apply, gathered=where)
  step = training.train_step(apply, loss, tx or optax.adam(RATE), built.method)
  step = step if mesh is None else training.on_mesh(step, mesh, moments=moments)
  trainable, frozen, state = step.init(params)
  kept = jax.tree.map(lambda x: x.sharding, (trainable, state))
  program = jax.jit(step.step, donate_argnums=(0, 2), out_shardings=(*kept, None))
  key, values = jax.random.key(2), []
  with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
    first = place(next(batches()))
    compiled = program.lower(trainable, frozen, state, first, key).compile()
    for number, batch in enumerate(batches() if run else ()):
      trainable, state, metrics = compiled(
        trainable, frozen, state, place(batch), jax.random.fold_in(key, number)
      )
      values.append(metrics["loss"])
  moves = collectives(compiled.as_text())
  return Run(np.array(jax.device_get(values)), trainable, frozen, state, moves)


def matrices(frozen: Any) -> set[tuple[int, ...]]:
  """Shapes of frozen matrices as devices may see them: each axis whole or one shard of it."""
  shapes, coded = set(), lambda x: isinstance(x, pelt.quantization.NF4Weight)
  for x in jax.tree.leaves(frozen, is_leaf=coded):
    if coded(x):
      axes = [[size // n for n in (1, 2, 4, 8)] for size in x.sizes]
    else:
      axes = list(zip(x.shape, x.sharding.shard_shape(x.shape), strict=True))
      axes = axes[1:] if x.shape[:1] == (LAYERS,) else axes
    if len(axes) == 2:
      shapes |= {s for shape in itertools.product(*axes) for s in (shape, shape[::-1])}
  return shapes


def reduced(run: Run) -> set[tuple[int, ...]]:
  """Shapes of frozen matrices among what is summed over devices: their gradients."""
  known = matrices(run.frozen)
  sums = (m.shape for m in run.moves if m.operation in ("all-reduce", "reduce-scatter"))
  return {s[-2:] for s in sums if s[-2:] in known and math.prod(s[:-2]) in (1, LAYERS)}


def unpacked(run: Run) -> set[str]:
  """Dtypes of what moves and has the size of a quantized matrix, or of a shard of it.

  Codes count as the numbers that they stand for: uint8 and uint32 alone are as it should be.
  """
  nodes = [n for n in every_node(run.frozen) if isinstance(n, pelt.quantization.NF4Weight)]
  sizes = {math.prod(n.sizes) for n in nodes}
  shards = {size // n for size in sizes for n in (1, 2, 4, 8)}
  packed = {"u8": 2, "u32": 8}
  each = lambda m: math.prod(m.shape[1:] if m.shape[:1] == (LAYERS,) else m.shape)
  return {m.dtype for m in run.moves if each(m) * packed.get(m.dtype, 1) in shards}


def added(run: Run, mesh: jax.sharding.Mesh) -> int:
  """Bytes that LoRA, or IA3, moves of its own: the closed form at the top."""
  size = lambda *names: math.prod(mesh.shape.get(n, 1) for n in names)
  split, parts = size("data", "fsdp"), size("model")
  leaves = jax.tree.leaves(run.trainable)
  local = [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
  total = 4 * sum(local) if split > 1 else 0
  total += 4 * sum(n < x.size for n, x in zip(local, leaves, strict=True))
  for node in every_node(run.trainable):
    if isinstance(node, pelt.nodes.LoraWeight) and parts > 1:
      layers = node.a.shape[0] if node.stacked else 1
      total += 4 * layers * (BATCH // split) * LENGTH * node.a.shape[-1]
  return total


def measure(name: str, mesh_text: str, built: Built, wanted: np.ndarray, tx: Any) -> dict:
  """A row of the table."""
  start, scan = time.perf_counter(), built.model.scan
  mesh = training.make_mesh(mesh_text)
  run = train(built, mesh, tx=tx)
  row: dict[str, Any] = {
    "method": name,
    "mesh": mesh_text,
    "scan": scan,
    "loss": [float(wanted[0]), float(wanted[-1])],
    "difference": float(np.abs(run.losses - wanted).max()),
    "traffic": traffic(run.moves),
    "frozen_gradients": sorted(map(list, reduced(run))),
    "unpacked": sorted(unpacked(run) - {"u8", "u32"}),
  }
  if name in ("lora", "qlora"):
    plain = train(build(base_of(name, scan), scan), mesh, run=False)
    row["base"] = sum(traffic(plain.moves).values()) - added(plain, mesh)
    row["added"] = added(run, mesh)
    row["ratio"] = sum(row["traffic"].values()) / (row["base"] + row["added"])
  return row | {"seconds": round(time.perf_counter() - start, 1)}


def failures(row: dict) -> list[str]:
  """What does not hold of a row."""
  found = []
  if not row["difference"] <= BOUNDS.get(row["method"], BOUND):
    found.append(f"losses differ by {row['difference']:.1e}")
  if row["frozen_gradients"]:
    found.append(f"gradients of frozen matrices {row['frozen_gradients']}")
  if row["unpacked"]:
    found.append(f"weights of codes in {row['unpacked']}")
  if row.get("ratio", 0) > MOST:
    found.append(f"{row['ratio']:.3f} times the traffic")
  return found


def as_markdown(report: dict) -> str:
  """The report as a table, a line for each method and mesh."""
  lines = [
    "# Training on eight virtual devices\n",
    f"A Llama of {LAYERS} layers, {STEPS} steps of Adam, looped / scanned. Difference: the largest",
    "of the losses from one device's. Traffic: kB per step and device, of results. Ratio: traffic",
    f"to base + added (see the script); {MOST} at most. {report['date']}, jax {report['jax']}.\n",
    "| method | mesh | difference | all-reduce | all-gather | others | ratio | does not hold |",
    "|---|---|---|---|---|---|---|---|",
  ]
  rows = {(r["method"], r["mesh"], r["scan"]): r for r in report["rows"]}
  for method, mesh in dict.fromkeys((m, at) for m, at, _ in rows):
    two = [r for scan in (False, True) if (r := rows.get((method, mesh, scan)))]
    cells = zip(*map(_cells, two), strict=True)
    wrong = "; ".join(dict.fromkeys(f for r in two for f in failures(r)))
    lines.append(f"| {method} | {mesh} | {' | '.join(map(' / '.join, cells))} | {wrong} |")
  return "\n".join([*lines, ""])


def _cells(row: dict) -> list[str]:
  """What the table says of a row; the other form of the model stands beside it."""
  moved = dict(row["traffic"])
  each = [moved.pop(name, 0) for name in ("all-reduce", "all-gather")]
  kilo = [f"{size / 1e3:.1f}" for size in (*each, sum(moved.values()))]
  return [f"{row['difference']:.1e}", *kilo, f"{row['ratio']:.3f}" if "ratio" in row else "–"]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = tuple(methods(False))
  parser.add_argument("--methods", nargs="+", default=names, choices=names)
  parser.add_argument("--meshes", nargs="+", default=MESHES)
  parser.add_argument("--forms", nargs="+", default=("looped", "scanned"))
  here = pathlib.Path(__file__).parent
  parser.add_argument("--out", type=pathlib.Path, default=here / "results")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  file, rows = args.out / "sharded.json", {}
  if file.is_file():
    rows = {(r["method"], r["mesh"], r["scan"]): r for r in json.loads(file.read_text())["rows"]}
  today = datetime.date.today().isoformat()
  for name, form in itertools.product(args.methods, args.forms):
    scan = form == "scanned"
    built = build(methods(scan)[name], scan)
    tx = optax.adam(RATES.get(name, RATE))
    wanted = train(built, tx=tx).losses
    for mesh in args.meshes:
      row = rows[name, mesh, scan] = measure(name, mesh, built, wanted, tx)
      print(name, mesh, form, f"{row['difference']:.1e}", row.get("ratio"), row["traffic"])
      print(f"  {row['seconds']} s", "; ".join(failures(row)), flush=True)
      done = sorted(rows.values(), key=lambda r: (names.index(r["method"]), r["mesh"], r["scan"]))
      settings = {"batch": BATCH, "length": LENGTH, "steps": STEPS, "rate": RATE, "rates": RATES}
      settings["model"] = SIZES
      versions = {m.__name__: m.__version__ for m in (jax, flax, optax)}
      report = {"date": today, **versions, **settings, "rows": done}
      write(file, json.dumps(report, indent=1) + "\n")
      write(args.out / "sharded.md", as_markdown(report))


if __name__ == "__main__":
  main()
