"""CPU time of a training step under adapters, here and in AdapterHub.

    python experiments/bench_adapter_step.py --model MINILM_FOLDER --out experiments/results

Both sides load one checkpoint and the adapter that AdapterHub saved (the shapes of trec.py), with a
head that trains beside it, frozen base, float32, two threads, batch 32 x 32 without padding, and
take AdamW steps on the same batch without dropout. Here, as in the main job, the last layer is
computed for the pooled token alone where nothing else is read of it: not under UniPELT, whose gates
are means over the row, and under none with `--whole`. Steps alternate in one process; what is
compared is CPU time, pair by pair. The process keeps the memory that either side frees, as the main
job's does.

Needs torch, transformers 4.57 and adapters.
"""

import argparse
import datetime
import json
import os
import pathlib
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Idle torch threads would otherwise spin, and their CPU time would be charged to our steps.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import trec
from recipes import ADAPTERS
from reporting import write
from timing import alternate, ratio

from pelt_jax import training

BATCH, LENGTH, LABELS, LR = 32, 32, 6, 1e-3


def batch() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "input_ids": rng.integers(1000, 30000, (BATCH, LENGTH), np.int32),
    "attention_mask": np.ones((BATCH, LENGTH), np.int32),
    "labels": rng.integers(0, LABELS, BATCH, np.int32),
  }


def there(name: str, base: pathlib.Path, folder: pathlib.Path):
  """A step of AdapterHub's, whose adapter is saved."""
  import torch
  import transformers

  torch.set_num_threads(2)
  auto = transformers.AutoModelForSequenceClassification
  model = trec.hub_model(auto.from_pretrained(base), name).eval()
  model.save_adapter(str(folder), name, with_head=False)
  trained = [p for p in model.parameters() if p.requires_grad]
  tx = torch.optim.AdamW(trained, LR, weight_decay=1e-4)
  given = {k: torch.tensor(v, dtype=torch.long) for k, v in batch().items()}

  def run() -> float:
    tx.zero_grad(set_to_none=True)
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits, given["labels"])
    loss.backward()
    tx.step()
    return loss.item()

  return run, sum(p.numel() for p in trained)


def here(base: pathlib.Path, folder: pathlib.Path, pooled_only: bool):
  import jax
  import optax

  import pelt_jax as pelt

  model, params = pelt.models.from_pretrained(base, task="classification", num_labels=LABELS)
  model = model.clone(pooled_only=pooled_only)
  params = pelt.interop.adapterhub.load(folder, model, params)
  data = jax.tree.map(jax.numpy.asarray, batch())
  sites = pelt.sites(model, data["input_ids"], data["attention_mask"])
  params = pelt.train("head").init(jax.random.key(0), params, sites)
  init, step = training.train_step(
    pelt.bypass(model.apply), training.cross_entropy, optax.adamw(LR, weight_decay=1e-4)
  )
  step = jax.jit(step, donate_argnums=(0, 2))
  trainable, frozen, state = init(params)
  held = [trainable, state]

  def run() -> float:
    held[0], held[1], metrics = step(held[0], frozen, held[1], data, None)  # no key: no dropout
    jax.block_until_ready(held)
    return float(metrics["loss"])

  return run, pelt.count(params).trainable


def compare(
  name: str, base: pathlib.Path, folder: pathlib.Path, pairs: int, pooled_only: bool
) -> dict:
  theirs, trained = there(name, base, folder)
  ours, mine = here(base, folder, pooled_only)
  if trained != mine:
    raise SystemExit(f"{name}: {mine} numbers train here and {trained} there")
  sides = {"pelt_jax": ours, "adapters": theirs}
  first = {side: run() for side, run in sides.items()}
  if abs(first["pelt_jax"] / first["adapters"] - 1) > 1e-4:
    raise SystemExit(f"the losses of step 1 differ, so this compares nothing: {first}")
  cpu = alternate(sides, pairs)["cpu"]
  medians = {side: float(np.median(v)) for side, v in cpu.items()}
  return ratio(cpu["pelt_jax"], cpu["adapters"]) | {
    "cpu_seconds_median": medians,
    "loss_step_1": first,
    "trainable": mine,
    "pooled_only": pooled_only,
    "cpu_seconds": cpu,
  }


def markdown(results: dict) -> str:
  lines = [
    "# CPU time of a training step under adapters, against AdapterHub",
    "",
    "Made by `experiments/bench_adapter_step.py`: MiniLM, float32, batch 32 x 32, two threads,",
    "steps alternating in one process. A ratio below 1 means that pelt_jax is faster. It computes",
    "the last layer for the pooled token alone, but where it says “all tokens”; AdapterHub always",
    "computes all.",
    "",
    "| method | trained numbers | CPU ratio | 95 % | CPU s | AdapterHub CPU s |",
    "|---|---|---|---|---|---|",
  ]
  for name, r in results["methods"].items():
    cpu, span = r["cpu_seconds_median"], "{:.3f}–{:.3f}".format(*r["95 %"])
    lines.append(
      f"| {name} | {r['trainable']:,} | {r['ratio']:.3f} | {span} | {cpu['pelt_jax']:.3f} "
      f"| {cpu['adapters']:.3f} |"
    )
  versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
  last = f"{results['pairs']} pairs each, {results['date']}; {versions}; {results['cpus']} cores."
  return "\n".join([*lines, "", last, ""])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
  parser.add_argument("--pairs", type=int, default=30)
  parser.add_argument("--methods", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
  parser.add_argument("--whole", action="store_true", help="every token of the last layer")
  parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
  args = parser.parse_args()
  training.keep_freed_memory()
  import adapters
  import jax
  import torch
  import transformers

  from pelt_jax import models

  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / "bench_adapter_step.json"
  results = json.loads(file.read_text()) if file.is_file() else {"methods": {}}
  versions = {m.__name__: m.__version__ for m in (jax, torch, transformers, adapters)}
  results |= {"pairs": args.pairs, "date": datetime.date.today().isoformat()}
  results |= {"cpus": os.cpu_count(), "versions": versions}
  with tempfile.TemporaryDirectory() as temporary:
    base = pathlib.Path(temporary) / "base"
    model, params = models.from_pretrained(
      args.model, task="classification", num_labels=LABELS, key=jax.random.key(0)
    )
    models.save_pretrained(base, model, params)
    for name in args.methods:
      pooled_only = name != "unipelt" and not args.whole
      found = compare(name, base, pathlib.Path(temporary) / name, args.pairs, pooled_only)
      results["methods"][name if pooled_only else f"{name}, all tokens"] = found
      print(name, found["ratio"], found["95 %"], found["loss_step_1"], flush=True)
      write(file, json.dumps(results, indent=1) + "\n")
  write(args.out / "bench_adapter_step.md", markdown(results))


if __name__ == "__main__":
  main()
