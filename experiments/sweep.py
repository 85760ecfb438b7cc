"""A sweep over learning rates on TREC with MiniLM: all of them in one program, most stopped early.

  python experiments/sweep.py --model MINILM_FOLDER --data DATA_FOLDER --out runs/sweep
  python experiments/sweep.py ... --smoke          # a minute: few rows, few steps

LoRA of rank 8 with a head, the recipe of trec.py: three epochs unless another number is said, batch
32, warm-up, linear decay, clipping. A tenth of the training file is held out and chooses; the test
file only tells. The sweep with early stopping is followed by one in which all rates run to the end,
which shows what was missed. Writes results.json, results.md and a picture of each.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
import optax
from finetune import CLIP, DECAY, WARMUP
from reporting import write
from trec import RECIPE

import pelt_jax as pelt
from pelt_jax import models, training

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
HELD_OUT = 10  # every so manieth row of the training file chooses


def data(args: argparse.Namespace, tokenizer) -> tuple[dict[str, training.Encoded], list[str]]:
  """Rows to train on, to choose by, and of the test file; the labels."""
  files = {
    n: training.read(args.data / "trec" / f"TREC.{n}.all", "classification")
    for n in ("train", "test")
  }
  labels = training.label_list(files["train"])
  encode = lambda examples: training.encode(
    examples, tokenizer, "classification", labels=labels, length=RECIPE["length"]
  )
  rows = {name: encode(examples) for name, examples in files.items()}
  every, numbers = rows["train"].rows, np.arange(len(rows["train"].rows))
  order = np.random.default_rng(0).permutation(numbers)  # the file may be sorted
  cut = len(order) // HELD_OUT
  part = lambda some: dataclasses.replace(rows["train"], rows=tuple(every[i] for i in some))
  rows |= {"train": part(order[cut:]), "held out": part(order[:cut])}
  if args.smoke:
    rows = {n: dataclasses.replace(r, rows=r.rows[:64]) for n, r in rows.items()}
  return rows, labels


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
  parser.add_argument("--data", type=pathlib.Path, required=True, help="folder that holds trec/")
  parser.add_argument("--rates", type=float, nargs="+", default=RATES)
  parser.add_argument("--keep", type=float, default=1 / 3, help="share that goes on at a rung")
  parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--smoke", action="store_true", help="does it run?")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/sweep"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  training.keep_freed_memory()

  rows, labels = data(args, training.load_tokenizer(args.model))
  model, base = models.from_pretrained(
    args.model,
    task="classification",
    num_labels=len(labels),
    scan=True,
    key=jax.random.key(args.seed),
  )
  apply = pelt.bypass(model.apply)
  ids = np.zeros((RECIPE["batch"], 8), np.int32)
  sites = pelt.sites(model, ids, np.ones_like(ids))
  lengths = training.buckets(*rows.values())[-1 if args.smoke else 0 :]
  loader = lambda: training.Loader(rows["train"], RECIPE["batch"], args.seed, lengths)
  steps = 3 if args.smoke else args.epochs * loader().steps_per_epoch
  warmup = max(1, round(WARMUP * steps))

  def adamw(learning_rate):
    up = optax.linear_schedule(0.0, learning_rate, warmup)
    down = optax.linear_schedule(learning_rate, 0.0, steps - warmup)
    return optax.adamw(optax.join_schedules([up, down], [warmup]), weight_decay=DECAY)

  scored = {n: training.Evaluator(apply, rows[n], 32, lengths) for n in ("held out", "test")}
  told: list[float] = []  # by the test file, which chooses nothing

  def evaluate(params: dict) -> dict[str, float]:
    told.append(scored["test"](params)["accuracy"])
    return scored["held out"](params)

  def run(**options) -> tuple[training.Sweep, dict]:
    began = time.perf_counter()
    told.clear()
    found = pelt.sweep(
      lambda rank: pelt.chain(pelt.lora(rank), pelt.train("head")),
      {"rank": [8], "learning_rate": args.rates},
      base,
      sites,
      apply=apply,
      loss=training.cross_entropy,
      tx=optax.inject_hyperparams(adamw)(learning_rate=1.0),
      batches=loader(),
      steps=steps,
      evaluate=evaluate,
      metric="accuracy",
      clip=CLIP,
      key=jax.random.key(args.seed),
      progress=True,
      **options,
    )
    ended = [i for i, trial in enumerate(found.trials) if trial.steps == steps]
    tests = dict(zip(ended, told[-len(ended) :], strict=True))
    return found, {
      "trials": [
        trial._asdict() | {"test_accuracy": tests.get(i)} for i, trial in enumerate(found.trials)
      ],
      "best": found.winner.options["learning_rate"],
      "test_accuracy": tests[found.best],
      "steps": found.steps,
      "full": found.full,
      "seconds": time.perf_counter() - began,
      "compile_s": found.compile_s,
    }

  stopped, early = run(keep=args.keep)
  rungs = [step for step, _ in stopped.winner.scores if step < steps]
  every, whole = run(keep=1, rungs=rungs)
  results = {
    "recipe": RECIPE | {"epochs": args.epochs, "seed": args.seed},
    "early": early,
    "whole": whole,
  }
  write(args.out / "results.json", json.dumps(results, indent=1) + "\n")
  for name, found in (("early", stopped), ("whole", every)):
    found.plot(args.out / f"{name}.png")
  best = max(trial["test_accuracy"] for trial in whole["trials"])
  lines = [
    "# Learning rates of LoRA on TREC with MiniLM\n",
    f"Made by `experiments/sweep.py`, {args.epochs} epoch(s), seed {args.seed}; accuracy on "
    "held-out training rows.\n",
    f"## Stopped early\n\n{stopped.table()}\n",
    f"The winner's accuracy on the test set: {early['test_accuracy']:.4f}. "
    f"{early['seconds']:.0f} s, of which compiling {early['compile_s']:.0f} s.\n",
    f"## Every rate to the end\n\n{every.table()}\n",
    "On the test set: "
    + ", ".join(
      f"{t['options']['learning_rate']:g} {t['test_accuracy']:.4f}" for t in whole["trials"]
    )
    + f"; the best {best:.4f}. {whole['seconds']:.0f} s, of which compiling "
    f"{whole['compile_s']:.0f} s.",
  ]
  write(args.out / "results.md", "\n".join(lines) + "\n")
  print("\n".join(lines))


if __name__ == "__main__":
  main()
