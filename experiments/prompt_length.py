"""Searches the length of a prompt or prefix: the main job for several lengths and seeds.

  python experiments/prompt_length.py --lengths 5 10 20 50 --seeds 3 --out runs/lengths \\
    --model MiniLM/ --task tagging --method p_tuning_v2 --train train.conll --eval dev.conll

Everything but --lengths, --seeds and --out goes to finetune.py; choose the length on a development
file. A prompt's tokens come on top of --length. Writes results.json, results.md and lengths.png; a
run that is done already is not run again, and one folder serves one job.
"""

import argparse
import json
import pathlib
import statistics

import finetune
from options import VIRTUAL
from reporting import save_figure, write


def search(lengths: list[int], seeds: int, out: pathlib.Path, job: list[str]) -> dict:
  """Scores by length, one per seed."""
  found = {"higher_is_better": True, "metric": "", "scores": {}, "stored": {}}
  for length in lengths:
    for seed in range(seeds):
      folder = out / f"length-{length}-seed-{seed}"
      if not (folder / "report.json").is_file():
        more = ["--set", f"length={length}", "--seed", str(seed), "--out", str(folder)]
        finetune.main([*with_room(job, length), *more, "--overwrite"])
      report = json.loads((folder / "report.json").read_text())
      found["metric"] = report["metric"]["name"]
      found["higher_is_better"] = report["metric"]["higher_is_better"]
      found["scores"].setdefault(length, []).append(report["metric"]["after"])
      found["stored"][length] = report["parameters"]["stored"]
  pick = max if found["higher_is_better"] else min
  found["best"] = pick(found["scores"], key=lambda n: statistics.mean(found["scores"][n]))
  return found


def with_room(job: list[str], length: int) -> list[str]:
  """The job with a prompt's tokens on top of its --length."""
  given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  given.add_argument("--length", type=int)
  given.add_argument("--method")
  known, rest = given.parse_known_args(job)
  rest += ["--method", known.method] if known.method else []
  if known.length is None:
    return rest
  return [*rest, "--length", str(known.length + length * (known.method in VIRTUAL))]


def plot(path: pathlib.Path, found: dict) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5, 3.5), layout="constrained")
  axes = figure.subplots()
  lengths = sorted(found["scores"])
  means = [statistics.mean(found["scores"][n]) for n in lengths]
  axes.plot(lengths, means, "-", linewidth=1)
  for n in lengths:
    axes.plot([n] * len(found["scores"][n]), found["scores"][n], "k.", alpha=0.6)
  axes.set(xlabel="length", ylabel=found["metric"])
  save_figure(figure, path)


def main(argv: list[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--lengths", type=int, nargs="+", required=True)
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--out", required=True)
  args, job = parser.parse_known_args(argv)
  if args.seeds < 1 or min(args.lengths) < 1:
    raise ValueError("--lengths and --seeds: expected positive numbers")
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  same = out / "job.json"
  if same.is_file() and (before := json.loads(same.read_text())) != job:
    raise ValueError(
      f"--out {out} holds runs of another job, {' '.join(before)}: name a new folder"
    )
  write(same, json.dumps(job) + "\n")
  found = search(args.lengths, args.seeds, out, job)
  lines = [
    f"# {found['metric']} by length\n",
    "| length | mean | seeds | stored |",
    "|---|---|---|---|",
  ]
  for length, scores in found["scores"].items():
    each = ", ".join(f"{s:.4f}" for s in scores)
    name = f"**{length}**" if length == found["best"] else str(length)
    stored = f"{found['stored'][length]:,}"
    lines.append(f"| {name} | {statistics.mean(scores):.4f} | {each} | {stored} |")
  plot(out / "lengths.png", found)
  write(out / "results.md", "\n".join(lines) + "\n")
  write(out / "results.json", json.dumps(found, indent=2) + "\n")
  print("\n".join(lines))
  return found


if __name__ == "__main__":
  main()
