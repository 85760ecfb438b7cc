"""Runs of the main job, made where they are absent, and their models with the evaluation's rows."""

import json
import pathlib
from typing import Any, NamedTuple

import finetune
import jax
import jax.numpy as jnp
import numpy as np

import pelt_jax as pelt
from pelt_jax import models, training


class Trained(NamedTuple):
  """A finished run: its model, params with nodes, and the rows that it was evaluated on."""

  apply: Any
  params: dict
  rows: training.Encoded
  report: dict


def run(out: pathlib.Path, job: list[str]) -> dict:
  """The report of the main job with these arguments; what is done already is not run again."""
  if not (out / "report.json").is_file():
    finetune.main([*job, "--out", str(out), "--overwrite"])
  return json.loads((out / "report.json").read_text())


def load(out: pathlib.Path) -> Trained:
  """What a run of a task with labels left in `out`."""
  report = json.loads((out / "report.json").read_text())
  settings, task = report["settings"], report["task"]
  labels = json.loads((out / "adapter" / "labels.json").read_text())
  model, base = models.from_pretrained(settings["model"], task=task, num_labels=len(labels))
  params = pelt.load(out / "adapter", base)
  rows = training.encode(
    training.read(settings["eval"], task, settings["columns"]),
    training.load_tokenizer(settings["model"]),
    task,
    labels=labels,
    length=settings["length"],
    virtual=pelt.virtual_tokens(params),
  )
  return Trained(pelt.bypass(model.apply), params, rows, report)


def means(run: Trained, name: str) -> dict[str, np.ndarray]:
  """Recorded values by path, averaged over the rows, or over real tokens where each has its own."""

  @jax.jit
  def summed(params, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    _, seen = run.apply({"params": params}, ids, mask, record=name)
    found = {}
    for path, values in seen.items():
      value = values[name]
      real = (
        mask if value.shape[:2] == mask.shape else mask.any(1)
      )  # rows that fill a batch have none
      real = real.reshape(*real.shape, *(1,) * (value.ndim - real.ndim)).astype(bool)
      axes = tuple(range(real.ndim))[: 2 if value.shape[:2] == mask.shape else 1]
      found[path] = jnp.where(real, value, 0).sum(axes), real.sum()
    return found

  total: dict[str, list] = {}
  for _, batch in training.batches(run.rows, 32):
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for path, (value, weight) in jax.device_get(summed(run.params, given)).items():
      before = total.setdefault(path, [0.0, 0])
      before[0], before[1] = before[0] + np.asarray(value, np.float64), before[1] + int(weight)
  return {path: value / weight for path, (value, weight) in total.items()}
