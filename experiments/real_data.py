"""Each method on real data, once, by the main job.

  python experiments/real_data.py --data DATA_FOLDER --minilm MINILM_FOLDER --out runs/real_data
  python experiments/real_data.py ... --smollm2 SMOLLM2_FOLDER --runs sst2-cloze

SST-2 by MiniLM under every method with a head, WNUT-17 under P-Tuning v2 (entity F1), SST-2 by
SmolLM2 as a cloze: a template with virtual tokens, no head. Scores are those of the test files,
which choose nothing. Writes results.json and results.md; a run that is done already is not run
again.
"""

import argparse
import json
import pathlib

import finetune
from recipes import ADAPTERS, FAMILY, LENGTHS, PROMPTS, tasks
from reporting import as_names, write

CLOZE = {
  "template": "{p:4} {text} {p:4} It was [MASK]",
  "verbalizer": "0=terrible,1=great",
}


def jobs(args: argparse.Namespace) -> dict[str, list[str]]:
  """The main job's arguments, by run."""
  files = tasks(pathlib.Path(args.data))
  minilm = ["--model", str(args.minilm), "--epochs", "2", "--batch", "32"]
  made = {}
  for name, recipe in (PROMPTS | ADAPTERS | {"adalora": FAMILY["adalora"]}).items():
    room = LENGTHS["sst2"] + recipe.room
    made[f"sst2-{name}"] = [*minilm, *files["sst2"], *recipe.arguments(), "--length", str(room)]
  deep = ["--method", "p_tuning_v2", "--set", "length=50", "--length", str(LENGTHS["wnut17"])]
  made["wnut17-p_tuning_v2"] = [*minilm, *files["wnut17"], *deep]
  made["sst2-cloze"] = [
    *("--model", str(args.smollm2), *files["sst2"], "--method", "p_tuning", "--steps", "120"),
    *("--template", CLOZE["template"], "--verbalizer", CLOZE["verbalizer"], "--batch", "16"),
    *("--length", "80"),
  ]
  return made


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", required=True, help="folder that holds sst2/, trec/ and wnut17/")
  parser.add_argument("--minilm", help="folder of all-MiniLM-L6-v2")
  parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct")
  parser.add_argument("--runs", nargs="+", help="which; all by default")
  parser.add_argument("--out", default="runs/real_data")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  file = out / "results.json"
  results = json.loads(file.read_text()) if file.is_file() else {}
  made = jobs(args)
  for name in args.runs or made:
    folder = out / name
    if not (folder / "report.json").is_file():
      finetune.main([*made[name], "--out", str(folder), "--overwrite"])
    report = json.loads((folder / "report.json").read_text())
    keys = ("metric", "parameters", "steps", "time", "versions")
    results[name] = {key: report[key] for key in keys}
    results[name]["settings"] = as_names(report["settings"])
    write(file, json.dumps(results, indent=1) + "\n")
  lines = ["# Methods on test files\n"]
  lines += [
    "| run | score | before | after | stored | steps | rate |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, done in results.items():
    metric, settings = done["metric"], done["settings"]
    scores = f"{metric['name']} | {metric['before']:.4f} | {metric['after']:.4f}"
    stored = f"{done['parameters']['stored']:,}"
    lines.append(f"| {name} | {scores} | {stored} | {done['steps']} | {settings['lr']} |")
  if "sst2-cloze" in results:
    lines.append(f"\nThe cloze: `{CLOZE['template']}`, {CLOZE['verbalizer']}.")
  write(out / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
