"""Every relative of LoRA once: MiniLM on TREC, all linear layers, one epoch, one seed.

  python experiments/family.py --model MINILM_FOLDER --data DATA_FOLDER --out runs/family

Trains each with the main job at its own default rates, LoRA beside them. Writes results.json and
results.md; a run that is done already is not run again.
"""

import json

import recipes
import trained
from reporting import write

RECIPES = {"lora": recipes.QUANTIZED["lora_all"]} | recipes.FAMILY


def main() -> None:
  parser = trained.parser(__doc__, "runs/family")
  parser.set_defaults(epochs=1)
  parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=RECIPES)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  for name in args.methods:
    job = ["--model", args.model, *recipes.tasks(args.data)["trec"], *RECIPES[name].arguments()]
    job += ["--length", str(recipes.LENGTHS["trec"]), "--epochs", str(args.epochs)]
    trained.run(args.out / name, [*job, "--batch", "32"])
  reports = {
    name: json.loads(file.read_text())
    for name in RECIPES
    if (file := args.out / name / "report.json").is_file()
  }
  write(args.out / "results.json", json.dumps(table(reports), indent=1) + "\n")
  write(args.out / "results.md", as_markdown(table(reports)))


def table(reports: dict[str, dict]) -> dict[str, dict]:
  """What the runs found and cost."""
  return {
    name: {
      "accuracy": r["metric"]["after"],
      "loss": r["scores"]["after"]["loss"],
      **{k: r["parameters"][k] for k in ("trainable", "stored", "rank")},
      "rate": r["settings"]["lr"],
      "head_rate": r["settings"]["head_lr"],
      "set": r["settings"]["set"],
      "step_gflop": r["flops"]["step"] / 1e9,
      "steps": r["steps"],
    }
    for name, r in reports.items()
  }


def as_markdown(found: dict[str, dict]) -> str:
  lines = [
    "# LoRA and its relatives, MiniLM on TREC, one epoch, one seed",
    "",
    "| method | options | rate | trained | stored | GFLOP a step | accuracy | loss |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name, r in found.items():
    head = f", head {r['head_rate']:g}" if r["head_rate"] else ""
    counts = f"{r['trainable']:,} | {r['stored']:,} | {r['step_gflop']:.1f}"
    scores = f"{r['accuracy']:.4f} | {r['loss']:.4f}"
    options = ", ".join(r["set"])
    lines.append(f"| {name} | {options} | {r['rate']:g}{head} | {counts} | {scores} |")
  note = "Heads are counted apart. One seed: differences below two points mean little."
  return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
  main()
