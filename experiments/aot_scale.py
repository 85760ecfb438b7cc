"""What a training step takes on 1 to 256 TPU chips that need not be there.

    python experiments/aot_scale.py [--models llama-7b ...] [--targets v5e ...] [--chips 1 4 ...]

Compiles the step of `aot.py` (AdamW, LoRA of rank 16 in float32 on all linear layers) for a global
batch of 64 rows of 1024 tokens, whatever the number of chips: `fsdp=N`, the larger models also on
`fsdp=N/4,model=4`. A chip takes few rows at a time (`AT_ONCE`) and accumulates their gradients.

Memory is the compiler's. FLOPs are counted instruction by instruction in the compiled program's
text (`hlo.py`), loops as often as they run, and held against two other counts: with every loop
once, `cost_analysis()`'s; and of matrix products alone, `closed_form`. Where a step does not fit,
its FLOPs come from 2 and 4 layers, in which they are linear, and the memory from the compiler's
refusal. Collective bytes are those of results on one chip (`collectives.py`).

XLA searches little for a fast schedule here (--effort -1): a compilation takes a sixth of the time,
with the same FLOPs. Its memory differs a little; rows of --effort 0 show by how much.

Rows are written as they are made; those already there are kept. Needs what `aot.py` needs.
"""

import argparse
import datetime
import json
import math
import pathlib
import re
import time
from collections.abc import Iterable, Iterator

import aot  # first: it sets the platform
import hlo
import jax
from collectives import Move, collectives
from reporting import save_figure, write

ROWS, LENGTH, RANK = 64, 1024, 16
AT_ONCE = {"llama-405b": 1}  # rows of a chip (of a group that shares matrices) at a time, else 2
MEMORY = {"v5e": 16.9, "v5p": 95}  # GB of a chip; of v5e what the compiler grants, 15.75 GiB
CHIPS = (1, 4, 16, 64)
SAME = ("model", "method", "target", "mesh", "effort")


def plan(args: argparse.Namespace) -> Iterator[dict]:
  """What to compile, the most telling first."""
  for model in args.models:
    for method in args.methods:
      for target in args.targets:
        for chips in args.chips:
          meshes = [f"fsdp={chips}"]
          if model != "llama-7b" and chips > 1:
            meshes.append(f"fsdp={chips // 4},model=4")
          for mesh in args.meshes or meshes:
            named = (model, method, target, mesh, args.effort)
            yield dict(zip(SAME, named, strict=True))


def closed_form(model: str) -> int:
  """FLOPs of the step's matrix products, of all chips together.

  A layer's matrices W meet each token forwards, in the gradient of their input, and once more when
  the layer is run again for the backward pass, but for the last one's product, which nothing needs
  then. No frozen matrix has a gradient. Of attention, two products forwards, two again, four
  backwards. LoRA's two products forwards, four backwards, two again but for the last's second. The
  head forwards and in the gradient of its input.
  """
  hidden, inner, layers, heads, kv, vocabulary = aot.SHAPES[model]
  width = hidden // heads * kv
  matrices = [(hidden, hidden), (hidden, width), (hidden, width), (hidden, hidden)]
  matrices += [(hidden, inner), (hidden, inner), (inner, hidden)]
  weights = sum(i * o for i, o in matrices)
  lora = 8 * RANK * sum(i + o for i, o in matrices) - 2 * RANK * hidden
  products = 2 * (3 * weights - inner * hidden) + 8 * 2 * LENGTH * hidden + lora
  return ROWS * LENGTH * (layers * products + 4 * vocabulary * hidden)


def measure(case: dict) -> dict:
  start = time.perf_counter()
  sizes = {k: int(v) for k, _, v in (part.partition("=") for part in case["mesh"].split(","))}
  chips, parts = math.prod(sizes.values()), sizes["fsdp"]
  row = case | {
    "chips": chips,
    "accumulate": max(1, ROWS // (parts * AT_ONCE.get(case["model"], 2))),
  }
  try:
    found = compiled(row)
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r"Used ([\d.]+)([MGT]) of|\(([\d.]+)([MGT])\) exceeds", str(error))
    if not used:
      raise
    size, unit = used[1] or used[3], used[2] or used[4]
    needs = float(size) * {"M": 2**20, "G": 2**30, "T": 2**40}[unit]
    few, more = compiled(row, 2), compiled(row, 4)
    depth = aot.SHAPES[case["model"]][2]
    line = lambda a, b: a + (b - a) * (depth - 2) // 2
    found = few | {
      "flops": {k: line(few["flops"][k], more["flops"][k]) for k in few["flops"]},
      "bytes": {"device": int(needs)},
      "moved": None,
      "layers": [2, 4],
    }
  form = closed_form(case["model"])
  return row | found | {"closed_form": form, "compile_s": time.perf_counter() - start}


def compiled(row: dict, layers: int | None = None) -> dict:
  """Memory, FLOPs and traffic of the compiled step."""
  mesh = aot.mesh_of(row["target"], row["mesh"])
  step, given, places = aot.abstract_step(
    row["model"],
    "words",
    length=LENGTH,
    rank=RANK,
    kind="float32",
    quantized=row["method"] == "qlora",
    layers=layers,
    rows=ROWS,
    accumulate=row["accumulate"],
    mesh=mesh,
  )
  options = {"exec_time_optimization_effort": row["effort"]}
  program = aot.compile_on(mesh, step, given, places, options)
  text = program.as_text()
  once = sum(hlo.flops(text, loops=False).values())
  return {
    "layers": None,
    "bytes": aot.sizes_of(program),
    "flops": hlo.flops(text),
    "once": {"here": once, "cost_analysis": (program.cost_analysis() or {})["flops"]},
    "moved": moved(collectives(text)),
  }


def moved(moves: Iterable[Move]) -> dict[str, dict[str, int]]:
  """By operation and dtype: how many arrays a run moves, their bytes, and the largest's."""
  found: dict[str, dict[str, int]] = {}
  for m in moves:
    name = f"{'gathering-sum' if m.gathers else m.operation} {m.dtype}"
    row = found.setdefault(name, {"count": 0, "bytes": 0, "largest": 0})
    row["count"] += m.times
    row["bytes"] += m.times * m.bytes
    row["largest"] = max(row["largest"], m.bytes)
  return dict(sorted(found.items()))


def flops_of(row: dict) -> int:
  return sum(row["flops"].values())


def fewest(row: dict, rows: list[dict]) -> dict:
  """The row of the fewest chips among those that differ from this one in the mesh alone."""
  same = [r for r in rows if all(r[k] == row[k] for k in ("model", "method", "target"))]
  return min(same, key=lambda r: r["chips"])


def fits(row: dict) -> bool:
  """The compiler refuses much of what does not fit, but not all of it."""
  return row["layers"] is None and row["bytes"]["device"] <= MEMORY[row["target"]] * 1e9


def traffic(row: dict) -> dict[str, float]:
  """GB of the results of a chip's collectives in a step, by what they are."""
  found = {"weights": 0.0, "sums": 0.0, "all-to-all": 0.0}
  for name, size in row["moved"].items():
    operation = name.split()[0]
    kinds = {"all-reduce": "sums", "reduce-scatter": "sums", "all-to-all": "all-to-all"}
    found[kinds.get(operation, "weights")] += size["bytes"] / 1e9
  return found


def markdown(results: dict) -> str:
  rows = results["rows"]
  furthest = lambda ratios: max(abs(ratio - 1) for ratio in ratios)
  even, form = furthest(even_of(r, rows) for r in rows), furthest(form_of(r) for r in rows)
  counted = furthest(r["once"]["here"] / r["once"]["cost_analysis"] for r in rows)
  lines = [
    "# A training step on 1 to 256 TPU chips, compiled ahead of time\n",
    f"Made by `experiments/aot_scale.py`; {ROWS} rows of {LENGTH} tokens in every step, LoRA of",
    f"rank {RANK} in float32 on all linear layers, AdamW, bfloat16 activations, layers scanned and",
    "rematerialized. GB are 1e9 bytes, TFLOP 1e12, each of one chip and one step. FLOPs are the",
    "compiled program's, loops counted as often as they run: in all, and of matrix products.\n",
    "- *parts*: how many the batch is taken in, one after another.",
    "- *even*: FLOPs times chips, over the same of the row with the fewest chips.",
    "- *form*: products times chips, over the closed form (`closed_form`).",
    "- *moved*: results of collectives: weights brought together (all-gather, collective-permute,",
    "  and all-reduce of shards that lie among zeros), sums (all other all-reduces), all-to-all.",
    "- Gradients are summed once per part, in bfloat16 as activations are. LoRA on bfloat16 brings",
    "  the base together twice a part, and three square kernels of each layer once more (7B).",
    "- Where the compiler refuses a step, memory is the least it asked for, and FLOPs those of 2",
    "  and 4 layers, in which they are linear.",
    "- XLA searched little for a fast schedule (effort -1) but where the table says otherwise.\n",
    f"Furthest from even: {even:.2%}. Products furthest from the closed form: {form:.2%}. With",
    f"every loop once, this count and `cost_analysis()` differ by at most {counted:.0e} of it.\n",
  ]
  for r in rows:
    if r["model"] == "llama-405b" and fits(r):
      limit, size = MEMORY[r["target"]], r["bytes"]["device"] / 1e9
      lines.append(
        f"405B parameters, {r['method']}, on {r['chips']} chips of {r['target']} ({r['mesh']}"
        f"{effort_of(r)}): {size:.1f} GB of {limit}, {1 - size / limit:.0%} to spare.\n"
      )
  lines.append(
    "| model | method | target | mesh | parts | memory, GB | arguments | temporary | fits | TFLOP "
    "| products | even | form | moved, GB: weights | sums | all-to-all | compiled in |"
  )
  lines.append("|---" * 17 + "|")
  lines += [f"| {' | '.join(cells(r, rows))} |" for r in rows]
  versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
  return "\n".join([*lines, "\n![scale](aot_scale.png)", f"\n{results['date']}; {versions}.", ""])


def cells(r: dict, rows: list[dict]) -> list[str]:
  """A row of the table."""
  sizes = [r["bytes"].get(k) for k in ("device", "argument", "temp")]
  sent = ("", "", "") if r["moved"] is None else (f"{x:.2f}" for x in traffic(r).values())
  return [
    *(r["model"], r["method"], r["target"], r["mesh"] + effort_of(r), str(r["accumulate"])),
    *("" if size is None else f"{size / 1e9:.2f}" for size in sizes),
    "yes" if fits(r) else "no",
    *(f"{count / 1e12:.1f}" for count in (flops_of(r), r["flops"]["products"])),
    *(f"{even_of(r, rows):.4f}", f"{form_of(r):.4f}"),
    *sent,
    f"{r['compile_s']:.0f} s",
  ]


def effort_of(row: dict) -> str:
  return "" if row["effort"] < 0 else ", full effort"


def even_of(row: dict, rows: list[dict]) -> float:
  """FLOPs times chips over the same of the fewest chips: 1 if a chip's are 1/N."""
  one = fewest(row, rows)
  return flops_of(row) * row["chips"] / (flops_of(one) * one["chips"])


def form_of(row: dict) -> float:
  return row["flops"]["products"] * row["chips"] / row["closed_form"]


def plot(path: pathlib.Path, rows: list[dict]) -> None:
  """FLOPs, memory and traffic of a chip against chips, with the line of 1/N."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(13, 4.5), layout="constrained")
  panels = figure.subplots(1, 3)
  rows = [r for r in rows if r["mesh"].startswith(f"fsdp={r['chips']}") and r["effort"] < 0]
  for key in dict.fromkeys((r["model"], r["method"], r["target"]) for r in rows):
    mine = sorted(
      (r for r in rows if (r["model"], r["method"], r["target"]) == key), key=lambda r: r["chips"]
    )
    if len(mine) < 2:
      continue
    model, method, target = key
    style = {
      "color": {"llama-7b": "C0", "llama-65b": "C1"}.get(model, "C2"),
      "linestyle": "-" if method == "lora" else "--",
      "marker": "o" if target == "v5e" else "s",
      "fillstyle": "none",
      "label": f"{model.removeprefix('llama-').upper()} {method}, {target}",
    }
    inside = [r for r in mine if r["moved"] is not None and r["chips"] > 1]
    panels[0].plot([r["chips"] for r in mine], [flops_of(r) for r in mine], **style)
    panels[1].plot([r["chips"] for r in mine], [r["bytes"]["device"] for r in mine], **style)
    sizes = [sum(m["bytes"] for m in r["moved"].values()) for r in inside]
    panels[2].plot([r["chips"] for r in inside], sizes, **style)
  for model in dict.fromkeys(r["model"] for r in rows):
    form = closed_form(model)
    panels[0].plot(CHIPS, [form / n for n in CHIPS], color="0.6", linewidth=4, zorder=0)
  for target, size in MEMORY.items():
    panels[1].axhline(size * 1e9, color="0.6", linewidth=1)
    panels[1].annotate(f"{target}'s memory", (1, size * 1e9), va="bottom", fontsize=8)
  titles = ("FLOPs per chip and step; grey: 1/N", "bytes per chip", "collective bytes per step")
  for axes, title in zip(panels, titles, strict=True):
    axes.set(xscale="log", yscale="log", xlabel="chips (fully sharded)", title=title)
    axes.set_xticks(CHIPS, [str(n) for n in CHIPS])
    axes.minorticks_off()
  panels[2].legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="lower left")
  save_figure(figure, path)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=["llama-7b", "llama-65b"], choices=aot.SHAPES)
  parser.add_argument("--methods", nargs="+", default=["lora", "qlora"], choices=("lora", "qlora"))
  parser.add_argument("--targets", nargs="+", default=["v5e", "v5p"], choices=aot.TPUS)
  parser.add_argument("--chips", nargs="+", type=int, default=CHIPS)
  parser.add_argument("--meshes", nargs="+", help="these alone, such as fsdp=16,model=4")
  parser.add_argument("--effort", type=float, default=-1.0, help="XLA's, from -1 to 1")
  parser.add_argument("--out", type=pathlib.Path, default=aot.HERE / "results")
  args = parser.parse_args()
  if args.meshes:
    args.chips = args.chips[:1]
  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / "aot_scale.json"
  results = json.loads(file.read_text()) if file.is_file() else {"rows": []}
  done = [[r[k] for k in SAME] for r in results["rows"]]
  for case in plan(args):
    if list(case.values()) in done:
      continue
    row = measure(case)
    results["rows"].append(row)
    results["rows"].sort(key=order)
    results["date"] = datetime.date.today().isoformat()
    results["versions"] = aot.versions()
    print(json.dumps(row), flush=True)
    write(file, json.dumps(results, indent=1) + "\n")
  write(args.out / "aot_scale.md", markdown(results))
  plot(args.out / "aot_scale.png", results["rows"])


def order(row: dict) -> tuple:
  models = list(aot.SHAPES)
  return models.index(row["model"]), row["method"], row["target"], row["chips"], row["mesh"]


if __name__ == "__main__":
  main()
