"""AdapterDrop: accuracy and throughput against n, the number of lowest layers without adapters.

  python experiments/adapter_drop.py --model MINILM_FOLDER --data DATA_FOLDER --out runs/drop

Trains by the main job on TREC: robust adapters (n drawn per batch), specialised ones (n fixed) and
adapters in all layers. The test file is scored with the robust ones at every n, with the
specialised ones at theirs, and with plain adapters of which the lowest n are left out afterwards.
Steps and forward passes are timed by turns, as CPU time: one robust program at every n, and the
programs of specialised adapters. Writes results.json, results.md and drop.png; a run that is done
already is not run again.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import trained
from recipes import LENGTHS, tasks
from reporting import save_figure, write
from timing import alternate, ratio

import pelt_jax as pelt
from pelt_jax import models, training

BATCH, LABELS = 32, 6


def accuracies(
  args: argparse.Namespace, job: list[str], layers: int
) -> dict[str, dict[int, float]]:
  """By way of training and n."""
  make = lambda n, robust: ["--method", "adapter_drop", "--set", f"drop={n}", "--set", robust]
  every = range(layers + 1)
  folder = args.out / "robust"
  trained.run(folder, [*job, *make(0, "robust=true")])
  robust = trained.load(folder)
  score = training.Evaluator(robust.apply, robust.rows, BATCH)
  found = {"robust": {n: score(pelt.drop_to(robust.params, n))["accuracy"] for n in every}}
  found["specialised"] = {}
  for n in args.fixed:
    report = trained.run(args.out / f"fixed-{n}", [*job, *make(n, "robust=false")])
    found["specialised"][n] = report["metric"]["after"]
  plain = trained.load(args.out / "fixed-0") if 0 in args.fixed else None
  if plain is not None:
    upper = lambda n: pelt.gradnorm_prune(plain.params, range(n, layers))
    found["dropped afterwards"] = {
      n: training.evaluate(plain.apply, upper(n), plain.rows, BATCH)["accuracy"]
      for n in range(layers)
    }
  return found


def times(source: str, rounds: int) -> dict:
  """CPU time against n, as ratios to that of n = 0."""
  model, base = models.from_pretrained(source, task="classification", num_labels=LABELS)
  layers = model.config.num_hidden_layers
  apply, rng = pelt.bypass(model.apply), np.random.default_rng(0)
  batch = {
    "input_ids": rng.integers(5, 30000, (BATCH, LENGTHS["trec"]), np.int32),
    "attention_mask": np.ones((BATCH, LENGTHS["trec"]), np.int32),
    "labels": rng.integers(0, LABELS, BATCH, np.int32),
  }
  batch = jax.tree.map(jax.numpy.asarray, batch)
  sites = pelt.sites(model, batch["input_ids"], batch["attention_mask"])

  @jax.jit
  def forward(params):
    return apply({"params": params}, batch["input_ids"], batch["attention_mask"])

  def made(n: int, robust: bool) -> dict:
    method = pelt.chain(pelt.adapter_drop(n, robust=robust), pelt.train("head"))
    return method.init(jax.random.key(0), base, sites)

  init, step = training.train_step(apply, training.cross_entropy, optax.adamw(1e-3))
  step = jax.jit(step)

  def stepping(params: dict):
    trainable, frozen, state = init(params)
    # Without a key nothing is drawn: n stays what it is.
    return lambda: jax.block_until_ready(step(trainable, frozen, state, batch, None))

  found = {}
  for way, robust in (("robust", True), ("specialised", False)):
    params = {n: made(n, robust) for n in range(layers + 1)}
    runs = {
      "forward": {n: lambda p=p: forward(p).block_until_ready() for n, p in params.items()},
      "step": {n: stepping(p) for n, p in params.items()},
    }
    for what, by in runs.items():
      cpu = alternate({str(n): run for n, run in by.items()}, rounds)["cpu"]
      found[f"{way}, {what}"] = {
        n: ratio(cpu[str(n)], cpu["0"]) | {"cpu_s": float(np.median(cpu[str(n)]))} for n in by
      }
  return found


def plot(path: pathlib.Path, results: dict) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), layout="constrained")
  left, right = figure.subplots(1, 2)
  for name, by in results["accuracy"].items():
    left.plot(list(map(int, by)), list(by.values()), "o-", linewidth=1, label=name)
  left.set(xlabel="n, layers without adapters", ylabel="accuracy on TREC")
  left.legend(fontsize=8)
  for name, by in results["time"].items():
    right.plot(list(map(int, by)), [1 / r["ratio"] for r in by.values()], "o-", label=name)
  right.set(xlabel="n, layers without adapters", ylabel="throughput, n = 0 is 1")
  right.legend(fontsize=8)
  save_figure(figure, path)


def main() -> None:
  parser = trained.parser(__doc__, "runs/drop")
  parser.add_argument("--fixed", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5])
  parser.add_argument("--rounds", type=int, default=30, help="of timing")
  parser.add_argument("--only", choices=("accuracy", "time"), help="one half of the work")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  training.keep_freed_memory()
  file = args.out / "results.json"
  job = ["--model", args.model, *tasks(args.data)["trec"], "--length", str(LENGTHS["trec"])]
  job += ["--epochs", str(args.epochs), "--batch", str(BATCH)]

  def keep(**found) -> None:  # read again: the other half may have run meanwhile
    results = json.loads(file.read_text()) if file.is_file() else {}
    write(file, json.dumps(results | found, indent=1) + "\n")

  if args.only != "accuracy":
    keep(rounds=args.rounds, time=times(args.model, args.rounds))
  if args.only != "time":
    model, _ = models.from_pretrained(args.model, task="encoder")
    keep(accuracy=accuracies(args, job, model.config.num_hidden_layers))
  results = json.loads(file.read_text())  # numbers of layers are texts, as a later run finds them
  if not {"accuracy", "time"} <= set(results):
    return
  plot(args.out / "drop.png", results)
  lines = ["# AdapterDrop, MiniLM on TREC\n"]
  numbers = list(results["accuracy"]["robust"])
  lines += [f"| accuracy at n = | {' | '.join(numbers)} |", "|---" * (len(numbers) + 1) + "|"]
  for name, by in results["accuracy"].items():
    lines.append(
      f"| {name} | " + " | ".join(f"{by[n]:.3f}" if n in by else "" for n in numbers) + " |"
    )
  lines += ["", f"| CPU time, n = 0 is 1 | {' | '.join(numbers)} |"]
  lines.append("|---" * (len(numbers) + 1) + "|")
  for name, by in results["time"].items():
    cells = ["{:.3f} ({:.3f}–{:.3f})".format(by[n]["ratio"], *by[n]["95 %"]) for n in numbers]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  lines.append(f"\n{results['rounds']} rounds by turns.\n\n![accuracy and throughput](drop.png)")
  write(args.out / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
