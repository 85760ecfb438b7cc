"""What a trained QLoRA model is worth once merged: into floats, into 4 bits.

  python experiments/merge_4bit.py RUN_FOLDER ... --out experiments/results/merge_4bit

Evaluates each finished run of the main job on its evaluation file: as it was trained, merged into
floats, and merged into the codes again. Writes results.json and results.md, the losses of the
merge (`pelt.quantization.requantize`) as means over the weights.
"""

import argparse
import json
import pathlib
import statistics

import trained
from reporting import as_names, write

import pelt_jax as pelt
from pelt_jax import training

FORMS = ("trained", "floats", "4 bits")


def measured(folder: pathlib.Path) -> dict:
  """Metrics of the three forms of a run, and what the merge lost."""
  run = trained.load(folder)
  settings, task = run.report["settings"], run.report["task"]
  codes, losses = pelt.quantization.requantize(run.params)
  params = dict(zip(FORMS, (run.params, pelt.merge(run.params), codes), strict=True))
  names = dict.fromkeys(("loss", training.MAIN_METRIC[task][0]))
  scores = {
    form: training.Evaluator(run.apply, run.rows, settings["batch"])(tree)
    for form, tree in params.items()
  }
  mean = lambda name: statistics.mean(getattr(loss, name) for loss in losses.values())
  return {
    "scores": {form: {n: score[n] for n in names} for form, score in scores.items()},
    "merge": {name: mean(name) for name in pelt.quantization.Loss._fields},
    "settings": as_names(settings),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", type=pathlib.Path, nargs="+", help="folders of QLoRA runs")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  results = {folder.name: measured(folder) for folder in args.runs}
  write(args.out / "results.json", json.dumps(results, indent=2) + "\n")
  lines = [
    "# Merged into floats and into 4 bits: held-out loss (and metric)\n",
    "| run | trained | merged into floats | merged into 4 bits | change | error | kept | codes |",
    "|---" * 8 + "|",
  ]
  for name, found in results.items():
    cells = [
      f"{s.pop('loss'):.4f}" + "".join(f" ({n} {v:.4f})" for n, v in s.items())
      for s in map(dict, found["scores"].values())
    ]
    cells += [f"{found['merge'][name]:.3f}" for name in pelt.quantization.Loss._fields]
    lines.append(f"| {' | '.join([name, *cells])} |")
  lines.append(
    "\nChange: norm of what was trained over that of the weight. Error: what rounding adds, over "
    "the change. Kept: the share of the change that the codes hold. Codes: the share that differs."
  )
  write(args.out / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
