"""Reading folders of prompts and prefixes that PEFT wrote."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._linen_sites import sites as sites_of
from pelt_jax._site import Site, find
from pelt_jax._transform import like_box
from pelt_jax._walk import get_at, update_at
from pelt_jax.interop._peft_files import COMMON, CONFIG, Tensors, complain
from pelt_jax.interop._peft_prompt_export import (
  ONE_PREFIX,
  SAVED,
  TABLE,
  embedding_scale,
  warn_of_windows,
)
from pelt_jax.interop._peft_saved import read_saved, tuned_leaves
from pelt_jax.interop._places import places
from pelt_jax.methods._prefix_tuning import prefix_tuning
from pelt_jax.methods._prompt_tuning import token_table
from pelt_jax.nodes import ExtendedEmbedding

_SHARED = COMMON | {
  "num_virtual_tokens",
  "token_dim",
  "num_transformer_submodules",
  "num_attention_heads",
  "num_layers",
  "modules_to_save",
  "encoder_hidden_size",
}
# By peft_type, the fields that act in training alone: a folder holds the table they made.
PROMPTS: dict[str, set[str]] = {
  "PROMPT_TUNING": {
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
  },
  "P_TUNING": {"encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"},
  "PREFIX_TUNING": {"prefix_projection", "init_weights"},
}


def load_prompt(
  folder: pathlib.Path,
  raw: dict[str, Any],
  model: Any,
  base: Mapping,
  *,
  strict: bool,
  sites: tuple[Site, ...] | None,
) -> dict:
  """Params with the nodes of a prompt's or prefix's folder; see `load`."""
  file, kind = folder / CONFIG, raw["peft_type"]
  unknown = sorted(set(raw) - _SHARED - PROMPTS[kind])
  complain(unknown, f"{file} has unknown fields that may change the function", strict)
  tensors = Tensors(folder)
  if TABLE not in tensors.entries:
    raise ValueError(
      f"{tensors.file} lacks the tensor {TABLE!r}, which a {kind} adapter consists of"
    )
  if sites is None:
    sites = sites_of(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))
  make = _prefix if kind == "PREFIX_TUNING" else _prompt
  params = make(raw, file, tensors, model, base, sites)
  modules = raw.get("modules_to_save") or ()
  whole, missing = read_saved(tensors, places(model, base).values(), modules, SAVED)
  unexpected = set(tensors.entries) - {TABLE} - {SAVED + place.tensor for place in whole}
  complain(missing, f"{tensors.file} lacks tensors", strict)
  complain(sorted(unexpected), f"{tensors.file} has unexpected tensors", strict)
  return update_at(params, tuned_leaves(base, whole))


def _number(raw: Mapping, file: pathlib.Path, name: str) -> int:
  value = raw.get(name)
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{file}: {name} must be a whole number of at least 1, got {value!r}")
  return value


def _prompt(
  raw: Mapping,
  file: pathlib.Path,
  tensors: Tensors,
  model: Any,
  base: Mapping,
  sites: tuple[Site, ...],
) -> dict:
  site = token_table(sites, "embedding", raw["peft_type"])
  leaf = get_at(base, site.path)
  length, parts = _number(raw, file, "num_virtual_tokens"), raw.get("num_transformer_submodules")
  # For an encoder-decoder PEFT makes twice the rows, and uses the first half.
  table = tensors.read(TABLE, (length * (parts or 1), site.shape[-1]))[:length]
  scale = embedding_scale(model)
  table = table if scale == 1 else (table / scale).astype(table.dtype)
  prompt = like_box(leaf, jnp.asarray(table), (None, None))
  return update_at(base, {site.path: ExtendedEmbedding(leaf, prompt)})


def _prefix(
  raw: Mapping,
  file: pathlib.Path,
  tensors: Tensors,
  model: Any,
  base: Mapping,
  sites: tuple[Site, ...],
) -> dict:
  if raw.get("num_transformer_submodules") == 2 or hasattr(model, "stacks"):
    raise ValueError(f"{file}: {ONE_PREFIX}, which cannot be read")
  length = _number(raw, file, "num_virtual_tokens")
  cores = [t.site for t in find(sites, "attention", kind="call")]
  cores.sort(key=lambda core: core.layer or 0)
  layers = sum(core.stacked[0] if core.stacked else 1 for core in cores)
  heads, width = cores[0].inputs[1][2:]
  table = tensors.read(TABLE, (length, 2 * layers * heads * width))
  table = table.reshape(length, layers, 2, heads, width)
  init = {}
  for i, core in enumerate(cores):
    both = table.transpose(2, 1, 0, 3, 4) if core.stacked else table[:, i].swapaxes(0, 1)
    init[core.path] = (both[0], both[1])  # each (layers, P, heads, width) or (P, heads, width)
  warn_of_windows(model)
  method = prefix_tuning(length, reparametrize=False, init=init, dtype=table.dtype)
  return method.init(jax.random.key(0), dict(base), sites)
