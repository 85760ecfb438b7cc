"""Adapter folders of Hugging Face PEFT: one method per folder, dispatched here."""

import collections
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pelt_jax._site import Site
from pelt_jax._tree import fold
from pelt_jax._walk import every_node, walk
from pelt_jax.interop._peft_family_export import family_files
from pelt_jax.interop._peft_family_kinds import KINDS
from pelt_jax.interop._peft_family_load import load_family
from pelt_jax.interop._peft_files import read_config, write_folder
from pelt_jax.interop._peft_lora_export import ORDER, lora_files
from pelt_jax.interop._peft_lora_load import load_lora
from pelt_jax.interop._peft_prompt_export import prefix_files, prompt_files
from pelt_jax.interop._peft_prompt_load import PROMPTS, load_prompt
from pelt_jax.nodes import ExtendedEmbedding, FusedLora, LoraFaWeight, LoraWeight, Prefix


def export(
  folder: str | os.PathLike,
  params: Any,
  model: Any,
  *,
  base_model_name: str | None = None,
  parameter_order: Sequence[str] = ORDER,
) -> None:
  """Writes the adapter in params as a folder that `peft.PeftModel.from_pretrained` loads.

  The file computes what params compute. A folder holds one method.

  **LoRA.** Scaling is what a node stores, so `lora_alpha` is scaling * rank with `use_rslora`
  false, also for what was made with rsLoRA. Unequal ranks and alphas go to `rank_pattern` and
  `alpha_pattern`, under the full path of the module. Dtypes are kept. In particular:

  - Scanned layers are written one by one, without components that are zero on both sides.
  - Two LoRAs on one leaf become one of the sum of their ranks.
  - LoRAs on parts of a fused projection become one of rank g * r, in block form. PEFT trains
    the zeros too.
  - DoRA's magnitudes go beside its pairs (`use_dora`), in all modules or none.
  - PiSSA and OLoRA become LoRAs of twice the rank, [a_0; a] and [-b_0; b], over the base as it was.
  - `Tuned` modules become `modules_to_save`; so does the head of a classifier, trained or not,
    since its base may lack it. `Tuned` biases elsewhere become `bias="lora_only"` or `"all"`.
  - Adapted or trained tables with tied heads are marked `ensure_weight_tying`.
  - Leaves that are neither kernels nor tables become `target_parameters`. A torch module that
    contracts the first axis of its experts (E, in, out) has `is_transposed = True`.

  **Prompts** (PROMPT_TUNING): the virtual tokens as a table (P, d), whatever made them. PEFT puts
  them in front of everything, before a first special token too, and in an encoder-decoder in front
  of the source: it computes the same for ids that begin with `virtual_tokens(params)`.

  **Prefixes** (PREFIX_TUNING): all keys and values as a table (P, 2 * layers * heads * width), k0,
  v0, k1, v1, ..., evaluated where an MLP makes them; dropout is left out. PEFT counts tokens from P
  on, so positions must be shifted by P (`shift_positions`).

  **IA3, VERA, LOHA, LOKR, MISS, HIRA**: a module's tensors under PEFT's names; VeRA's pair lies in
  the file once. Where PEFT has one rank, dropout or way of cutting matrices for all modules, params
  must have one too.

  `Tuned` modules beside a prompt, prefix or one of these become `modules_to_save`, heads as for
  LoRA.

  Both files are written under temporary names, then renamed.

  Args:
    folder: made if absent.
    params: params with nodes, looped or scanned.
    model: the module they belong to.
    base_model_name: folder or hub id of the base model, for `base_model_name_or_path`.
    parameter_order: names of raw parameters in the order in which a torch module that has several
      registers them; the first one lies innermost in the file.

  Raises:
    TypeError: if params and model are swapped.
    ValueError: listing every path that a folder cannot hold and why, before anything is written.

  Example:
    >>> import json, tempfile, pathlib, flax.linen as nn, jax, jax.numpy as jnp
    >>> import pelt_jax as pelt
    >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lora(rank=2, alpha=6, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pelt.interop.peft.export(folder, params, model)
    ...   config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
    >>> config["target_modules"], config["r"], config["lora_alpha"]
    (['layers_0'], 2, 6)
  """
  check_order("export(folder, params, model)", params, model)
  params = fold(params)
  method = _method(params)
  if method == "a prefix":
    config, tensors = prefix_files(params, model, base_model_name)
  elif method == "a prompt":
    config, tensors = prompt_files(params, model, base_model_name)
  elif method in FAMILY:
    config, tensors = family_files(FAMILY[method], params, model, base_model_name)
  else:
    config, tensors = lora_files(params, model, base_model_name, parameter_order)
  write_folder(pathlib.Path(folder), config, tensors)


def load(
  folder: str | os.PathLike,
  model: Any,
  base: Any,
  *,
  strict: bool = True,
  parameter_order: Sequence[str] = ORDER,
  transposed: Mapping[str, bool] | None = None,
  sites: tuple[Site, ...] | None = None,
) -> dict:
  """Params with the nodes of a PEFT folder over `base`; they train further.

  **LoRA.** Names of modules, ranks, alphas and saved modules follow PEFT's own rules.
  Magnitudes of DoRA come along. Of PiSSA's and OLoRA's folders that were saved as they trained, the
  base is decomposed again, as PEFT does, and must be plain; a start that was drawn at
  random (`pissa_niter_4`) cannot be found again and is refused.
  `modules_to_save` and biases become `Tuned` leaves, `lora_dropout` a node's dropout. The layers of
  a scanned model are stacked; missing ranks are filled with zeros on both sides, which stay zero in
  training.

  **PROMPT_TUNING, P_TUNING** become virtual tokens and **PREFIX_TUNING** keys and values, with
  positions shifted, that train as they are; a file holds none of the networks that may have made
  them. PEFT puts a prompt in front of everything, in an encoder-decoder of the source: so must the
  data (`virtual_tokens`).

  **IA3, VERA, LOHA, LOKR, MISS, HIRA** become the nodes that the methods of those names make; of
  VeRA the file must hold the random pair (`save_projection`). Dropouts of ranks and modules (LoHa,
  LoKr) have no counterpart here.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    model: the module that `base` belongs to.
    base: plain params, possibly quantized, looped or scanned.
    strict: raise for unknown fields, missing or unexpected tensors, and patterns that fit nothing,
      instead of warning.
    parameter_order: names of raw parameters (`target_parameters`) in the order in which a torch
      module that has several registers them.
    transposed: for raw parameters of experts, name -> whether torch's module says
      `is_transposed` (E, in, out); only needed where shapes do not tell.
    sites: what `pelt.sites` returned; for prompts and prefixes in a model that token ids alone
      cannot call.

  Returns:
    Params with nodes.

  Raises:
    FileNotFoundError: if a file is missing.
    TypeError: if model and base are swapped.
    ValueError: for a damaged file or another method's; for options that change the function and
      cannot be read; for tensors that do not fit, each named with the shape expected.

  Example:
    >>> import tempfile, flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((2, 4))
    >>> base = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lora(rank=2, alpha=6, targets="kernel")
    >>> params = method.init(jax.random.key(1), base, pelt.sites(model, x))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pelt.interop.peft.export(folder, params, model)
    ...   again = pelt.interop.peft.load(folder, model, base)
    >>> float(again["layers_0"]["kernel"].scaling)
    3.0
  """
  check_order("load(folder, model, base)", base, model)
  folder = pathlib.Path(folder)
  raw = read_config(folder)
  kind = raw["peft_type"]
  if kind in PROMPTS:
    return load_prompt(folder, raw, model, base, strict=strict, sites=sites)
  if kind in KINDS:
    return load_family(folder, raw, model, base, strict=strict)
  if kind != "LORA":
    known = ", ".join(("LORA", *PROMPTS, *KINDS))
    raise ValueError(f"{folder} is of peft_type {kind!r}; those that can be read are {known}")
  return load_lora(
    folder,
    raw,
    model,
    base,
    strict=strict,
    parameter_order=parameter_order,
    transposed=transposed or {},
  )


def check_order(signature: str, params: Any, model: Any) -> None:
  if isinstance(model, Mapping) or not isinstance(params, Mapping):
    raise TypeError(
      f"{signature}: params must be nested dicts and model a module, got params of type "
      f"{type(params).__name__} and a model of type {type(model).__name__}; are they swapped?"
    )


FAMILY = {kind.title: kind for kind in KINDS.values()}
_METHODS: dict[type, str] = {
  **{node: kind.title for kind in KINDS.values() for node in kind.nodes},
  ExtendedEmbedding: "a prompt",
  Prefix: "a prefix",
  LoraWeight: "LoRA",
  LoraFaWeight: "LoRA",
  FusedLora: "LoRA",
}


def _method(params: Mapping) -> str | None:
  """Which method params hold.

  Raises:
    ValueError: if there are several, naming a path of each.
  """
  found: dict[str, list[str]] = collections.defaultdict(list)
  for path, value in walk(params):
    for node in every_node(value):
      if type(node) in _METHODS:
        found[_METHODS[type(node)]].append(path)
  if len(found) > 1:
    named = " and ".join(f"{method} ({paths[0]})" for method, paths in sorted(found.items()))
    raise ValueError(f"a PEFT folder holds one method, params hold {named}; use pelt.save")
  return next(iter(found), None)
