"""AdapterFusion on three tasks: what each task takes from whose adapter, layer by layer.

  python experiments/fusion.py --model MINILM_FOLDER --data DATA_FOLDER --out runs/fusion

First a Pfeiffer adapter per task (ST-A: SST-2, TREC, WNUT-17), then for every task a fusion of all
three with a head of its own, both by the main job. Writes results.json, results.md and fusion.png,
the weights averaged over the real tokens of the task's test file; a run that is done already is
not run again.
"""

import json
import pathlib

import numpy as np
import trained
from recipes import LENGTHS, RECIPES, tasks
from reporting import save_figure, write

import pelt_jax as pelt


def plot(path: pathlib.Path, results: dict) -> None:
  from matplotlib.figure import Figure

  tables = {name: np.array(list(r["weights"].values())) for name, r in results.items()}
  figure = Figure(figsize=(3.2 * len(tables), 3.6), layout="constrained")
  for axes, (name, table) in zip(figure.subplots(1, len(tables)), tables.items(), strict=True):
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (layer, member), value in np.ndenumerate(table):
      ink = "black" if value > 0.6 else "white"
      axes.text(member, layer, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set(title=f"fusion for {name}", xlabel="adapter of", ylabel="layer")
    axes.set_xticks(range(len(tables)), list(tables))
    axes.set_yticks(range(len(table)))
  figure.colorbar(image, ax=figure.axes, label="mean weight")
  save_figure(figure, path)


def main() -> None:
  args = trained.parser(__doc__, "runs/fusion").parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  jobs = {
    name: ["--model", args.model, *files, "--length", str(LENGTHS[name])]
    + ["--epochs", str(args.epochs), "--batch", "32"]
    for name, files in tasks(args.data).items()
  }
  alone = RECIPES["pfeiffer"].arguments()
  singles = {name: trained.run(args.out / name, [*job, *alone]) for name, job in jobs.items()}
  folders = ",".join(f"{name}={args.out / name / 'adapter'}" for name in jobs)
  results = {}
  for name, job in jobs.items():
    folder = args.out / f"fusion-{name}"
    report = trained.run(folder, [*job, "--method", "adapter_fusion", "--adapters", folders])
    usage = pelt.fusion_usage(trained.recorded(trained.load(folder), "fusion"))
    results[name] = {
      "metric": report["metric"]["name"],
      "single": singles[name]["metric"]["after"],
      "fusion": report["metric"]["after"],
      "trainable": report["parameters"]["trainable"],
      "weights": {place: used.tolist() for place, used in usage.items()},
    }
    write(args.out / "results.json", json.dumps(results, indent=1) + "\n")
  plot(args.out / "fusion.png", results)
  lines = ["# AdapterFusion, MiniLM: one adapter against the fusion of all\n"]
  lines += ["| task | score | own adapter | fusion | trained |", "|---|---|---|---|---|"]
  for name, r in results.items():
    lines.append(
      f"| {name} | {r['metric']} | {r['single']:.4f} | {r['fusion']:.4f} | {r['trainable']:,} |"
    )
  lines.append("\n![mean fusion weights by layer](fusion.png)")
  write(args.out / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
