"""Runs of the main job, made where they are absent, and their models with the evaluation's rows."""

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import finetune
import jax
import numpy as np

import pelt_jax as pelt
from pelt_jax import models, training


def parser(about: str | None, out: str) -> argparse.ArgumentParser:
  """What the scripts that train MiniLM on several data sets are told."""
  made = argparse.ArgumentParser(
    description=about, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
  made.add_argument("--data", type=pathlib.Path, required=True, help="folder of the data sets")
  made.add_argument("--epochs", type=int, default=3, help="of every run")
  made.add_argument("--out", type=pathlib.Path, default=out)
  return made


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
  """What a run left in `out`."""
  report = json.loads((out / "report.json").read_text())
  settings, task = report["settings"], report["task"]
  file = out / "adapter" / "labels.json"
  labels = json.loads(file.read_text()) if file.is_file() else ()
  model, base = models.from_pretrained(
    settings["model"],
    task=task,
    num_labels=len(labels) or None,
    dtype=np.dtype(settings["dtype"]),
    scan=settings["scan"],
  )
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


def recorded(run: Trained, name: str) -> Iterator[tuple[dict, np.ndarray]]:
  """What `record=name` gives for each batch of the rows, with the batch's mask."""

  @jax.jit
  def seen(params, ids, mask):
    return run.apply({"params": params}, ids, mask, record=name)[1]

  for _, batch in training.batches(run.rows, 32):
    yield seen(run.params, batch["input_ids"], batch["attention_mask"]), batch["attention_mask"]
