"""Parameters out to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from pelt_jax._walk import walk
from pelt_jax.models._load import SIDE_FILES, abstract_params, optional
from pelt_jax.models._names import torch_name, transposed
from pelt_jax.models._safetensors import write, write_atomically
from pelt_jax.models._shards import looped_paths
from pelt_jax.quantization import NF4Weight
from pelt_jax.quantization._bitsandbytes import to_tensors


def save_pretrained(folder: str | Path, model: nn.Module, params: Mapping[str, Any]) -> None:
  """Writes a folder that Hugging Face transformers loads: config.json, model.safetensors.

  Tokenizer files are copied from the folder that the model was loaded from. Each file is written
  under a temporary name and renamed, config.json last.

  Args:
    folder: made if it does not exist.
    model: the module the parameters belong to.
    params: plain parameters, looped or scanned as the model is. Linear layers may be in 4 bits
      (NF4 or FP4): they are stored as bitsandbytes stores them.

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
  four_bits: dict[str, np.ndarray] = {}
  for path, leaf in leaves.items():
    for i, name in enumerate(looped_paths(model, path)):
      stacked = name != path
      if isinstance(leaf, NF4Weight):
        four_bits |= _four_bits(model, name, leaf, i if stacked else None)
        continue
      shape = leaf.shape[1:] if stacked else leaf.shape
      tensor = torch_name(name)
      where[tensor] = (path, i if stacked else None)
      shapes[tensor] = (shape[::-1] if transposed(name, model) else shape, leaf.dtype)

  shapes |= {name: (value.shape, value.dtype) for name, value in four_bits.items()}

  def get(tensor: str) -> np.ndarray:
    if tensor in four_bits:
      return four_bits[tensor]
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
  text = json.dumps(_raw_config(model, leaves), indent=2) + "\n"
  write_atomically(folder / "config.json", [text.encode()])


def _plain_leaves(params: Mapping[str, Any]) -> dict[str, Any]:
  leaves = dict(walk(params))
  for path, leaf in leaves.items():
    if isinstance(leaf, nn.Partitioned):  # a box of sharding names, not a node
      leaves[path] = leaf = leaf.unbox()
    if isinstance(leaf, NF4Weight):
      continue
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


def _four_bits(
  model: nn.Module, path: str, weight: NF4Weight, layer: int | None
) -> dict[str, np.ndarray]:
  """The tensors of one layer's weight, by name."""
  if layer is not None:
    weight = jax.tree.map(lambda x: x[layer], weight).replace(stacked=weight.stacked - 1)
  if not transposed(path, model):
    raise ValueError(f"{path!r} is in 4 bits, and only linear layers are stored so")
  try:
    tensors = to_tensors(weight)
  except ValueError as error:
    raise ValueError(f"{path!r}: {error}. Store its values: pelt.merge(params)") from error
  return {torch_name(path) + suffix: value for suffix, value in tensors.items()}


def _linear(model: nn.Module, paths: Iterable[str]) -> set[str]:
  """The linear layers among them, by torch's names."""
  names = (name for path in paths for name in looped_paths(model, path))
  kernels = (torch_name(name) for name in names if transposed(name, model))
  return {name.removesuffix(".weight") for name in kernels}


def _raw_config(model: nn.Module, leaves: Mapping[str, Any]) -> dict[str, Any]:
  config = model.config
  four_bits = [leaf for leaf in leaves.values() if isinstance(leaf, NF4Weight)]
  dtype = next(leaf for leaf in leaves.values() if not isinstance(leaf, NF4Weight)).dtype
  raw = dict(config.raw) | {
    "architectures": [model.architecture],
    "torch_dtype": jnp.dtype(dtype).name,
  }
  raw.pop("quantization_config", None)
  if four_bits:
    outside = [path for path, leaf in leaves.items() if not isinstance(leaf, NF4Weight)]
    raw["quantization_config"] = {
      "quant_method": "bitsandbytes",
      "load_in_4bit": True,
      "bnb_4bit_quant_type": four_bits[0].book,
      "bnb_4bit_use_double_quant": four_bits[0].double,
      "bnb_4bit_compute_dtype": jnp.dtype(dtype).name,
      "bnb_4bit_quant_storage": "uint8",
      # Linear layers that are not in 4 bits.
      "llm_int8_skip_modules": sorted(_linear(model, outside)),
    }
  raw.pop("dtype", None)  # transformers 5 prefers it over torch_dtype, and it may be another
  if config.num_labels != len(raw.get("id2label") or {}):
    labels = [f"LABEL_{i}" for i in range(config.num_labels)]
    raw["num_labels"] = config.num_labels
    raw["id2label"] = {str(i): name for i, name in enumerate(labels)}
    raw["label2id"] = {name: i for i, name in enumerate(labels)}
  return raw
