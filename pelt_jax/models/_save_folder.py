"""Parameters out to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from pelt_jax._walk import walk
from pelt_jax.models._load import SIDE_FILES, abstract_params, looped_paths, optional
from pelt_jax.models._names import torch_name, transposed
from pelt_jax.models._safetensors import write, write_atomically


def save_pretrained(folder: str | Path, model: nn.Module, params: Mapping[str, Any]) -> None:
  """Writes a folder that Hugging Face transformers loads: config.json, model.safetensors.

  Tokenizer files are copied from the folder that the model was loaded from. Each file is written
  under a temporary name and renamed, config.json last.

  Args:
    folder: made if it does not exist.
    model: the module the parameters belong to.
    params: plain parameters, looped or scanned as the model is.

  Raises:
    ValueError: a node is still in the tree (merge first), or leaves are missing, unexpected or of
      other shapes than the model's.

      save_pretrained("merged/", model, pelt.merge(params))
  """
  folder = Path(folder)
  leaves = _plain_leaves(params)
  _check_tree(model, leaves)
  where: dict[str, tuple[str, int | None]] = {}
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
  for path, leaf in leaves.items():
    for i, name in enumerate(looped_paths(model, path)):
      stacked = name != path
      shape = leaf.shape[1:] if stacked else leaf.shape
      tensor = torch_name(name)
      where[tensor] = (path, i if stacked else None)
      shapes[tensor] = (shape[::-1] if transposed(name, model) else shape, leaf.dtype)

  def get(tensor: str) -> np.ndarray:
    path, i = where[tensor]
    value = np.asarray(leaves[path] if i is None else leaves[path][i])
    return value.T if transposed(path, model) else value

  folder.mkdir(parents=True, exist_ok=True)
  write(folder / "model.safetensors", shapes, get, {"format": "pt"})
  if model.config.source is not None and Path(model.config.source).resolve() != folder.resolve():
    for name in SIDE_FILES:
      if (file := Path(model.config.source) / name).is_file():
        temporary = folder / f".{name}.tmp"
        shutil.copyfile(file, temporary)
        temporary.replace(folder / name)
  text = json.dumps(_raw_config(model, next(iter(leaves.values())).dtype), indent=2) + "\n"
  write_atomically(folder / "config.json", [text.encode()])


def _plain_leaves(params: Mapping[str, Any]) -> dict[str, Any]:
  leaves = dict(walk(params))
  for path, leaf in leaves.items():
    if isinstance(leaf, nn.Partitioned):  # a box of sharding names, not a node
      leaves[path] = leaf = leaf.unbox()
    if isinstance(leaf, meta.AxisMetadata) or not hasattr(leaf, "dtype"):
      raise ValueError(
        f"{path!r} holds a {type(leaf).__name__}; only plain arrays can be saved. "
        "Fold the nodes into the weights first: save_pretrained(folder, model, pelt.merge(params))"
      )
  return leaves


def _check_tree(model: nn.Module, leaves: Mapping[str, Any]) -> None:
  expected = dict(walk(abstract_params(model)))
  problems = [
    f"{p} is missing, expected shape {expected[p].shape}"
    for p in expected
    if p not in leaves and not optional(model, p)
  ]
  problems += [f"{p} {leaves[p].shape} is unexpected" for p in leaves if p not in expected]
  problems += [
    f"{p} has shape {leaves[p].shape}, expected {expected[p].shape}"
    for p in leaves
    if p in expected and leaves[p].shape != expected[p].shape
  ]
  if problems:
    raise ValueError("params do not fit the model:\n  " + "\n  ".join(problems[:20]))


def _raw_config(model: nn.Module, dtype: Any) -> dict[str, Any]:
  config = model.config
  raw = dict(config.raw) | {
    "architectures": [model.architecture],
    "torch_dtype": jnp.dtype(dtype).name,
  }
  raw.pop("dtype", None)  # transformers 5 prefers it over torch_dtype, and it may be another
  if config.num_labels != len(raw.get("id2label") or {}):
    labels = [f"LABEL_{i}" for i in range(config.num_labels)]
    raw["num_labels"] = config.num_labels
    raw["id2label"] = {str(i): name for i, name in enumerate(labels)}
    raw["label2id"] = {name: i for i, name in enumerate(labels)}
  return raw
