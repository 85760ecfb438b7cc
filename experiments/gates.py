"""UniPELT's gates, layer by layer, on three tasks.

  python experiments/gates.py --model MINILM_FOLDER --data DATA_FOLDER --out runs/gates

Trains UniPELT by the main job on SST-2, TREC and WNUT-17 and averages the gates over the task's
test file. Writes results.json, results.md and gates.png; a run that is done already is not run
again.
"""

import json
import pathlib

import numpy as np
import trained
from recipes import LENGTHS, RECIPES, tasks
from reporting import save_figure, write

PARTS = {"query": "LoRA, query", "value": "LoRA, value", "core": "prefix"}  # else the adapter


def gates(run: trained.Trained) -> dict[str, list[float]]:
  """Mean gates over the rows by part, one per layer."""
  totals, rows = {}, 0
  for seen, mask in trained.recorded(run, "gates"):
    real = mask.any(1)  # not those that fill a batch
    rows += int(real.sum())
    for path, values in seen.items():
      each = np.asarray(values["gates"], np.float64).reshape(len(mask), -1).mean(1)
      totals[path] = totals.get(path, 0.0) + float(each[real].sum())
  parts: dict[str, dict[int, float]] = {}
  for path, total in totals.items():
    layer = next(int(name) for name in path.split("/") if name.isdigit())
    part = PARTS.get(path.rpartition("/")[2], "adapter")
    parts.setdefault(part, {})[layer] = total / rows
  return {part: [by[layer] for layer in sorted(by)] for part, by in sorted(parts.items())}


def plot(path: pathlib.Path, results: dict) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(3.4 * len(results), 3.4), layout="constrained")
  for axes, (name, r) in zip(
    figure.subplots(1, len(results), sharey=True), results.items(), strict=True
  ):
    for part, values in r["gates"].items():
      axes.plot(range(len(values)), values, "o-", linewidth=1, label=part)
    axes.axhline(0.5, color="0.8", linewidth=1, zorder=0)
    axes.set(title=f"{name}: {r['metric']} {r['after']:.3f}", xlabel="layer", ylim=(0, 1))
  figure.axes[0].set_ylabel("mean gate")
  figure.axes[-1].legend(fontsize=8)
  save_figure(figure, path)


def main() -> None:
  args = trained.parser(__doc__, "runs/gates").parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  results = {}
  for name, files in tasks(args.data).items():
    job = ["--model", args.model, *files, *RECIPES["unipelt"].arguments()]
    job += ["--length", str(LENGTHS[name]), "--epochs", str(args.epochs), "--batch", "32"]
    report = trained.run(args.out / name, job)
    metric = {k: report["metric"][v] for k, v in (("metric", "name"), ("after", "after"))}
    results[name] = metric | {"gates": gates(trained.load(args.out / name))}
    write(args.out / "results.json", json.dumps(results, indent=1) + "\n")
  plot(args.out / "gates.png", results)
  lines = ["# UniPELT's gates, MiniLM\n", "| task | score | part | mean gate by layer |"]
  lines.append("|---|---|---|---|")
  for name, r in results.items():
    for part, values in r["gates"].items():
      each = ", ".join(f"{v:.2f}" for v in values)
      lines.append(f"| {name} | {r['metric']} {r['after']:.4f} | {part} | {each} |")
  lines.append("\nThe gates start near 0.5.\n\n![mean gates by layer](gates.png)")
  write(args.out / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
