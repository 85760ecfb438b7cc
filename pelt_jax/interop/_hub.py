"""Adapter folders of AdapterHub's library `adapters`, dispatched here."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pelt_jax._node import Bypass
from pelt_jax._site import Site
from pelt_jax._walk import walk
from pelt_jax.interop._hub_export import adapter_part
from pelt_jax.interop._hub_files import (
  ADAPTER,
  FUSION,
  HEAD,
  SETUP,
  VERSION,
  Kind,
  Part,
  read_json,
  refuse_stale,
  write_parts,
)
from pelt_jax.interop._hub_fusion import fusion_parts, load_fusion
from pelt_jax.interop._hub_head import head_part, load_head
from pelt_jax.interop._hub_head import labels as labels_of
from pelt_jax.interop._hub_load import load_adapter
from pelt_jax.interop._hub_names import family
from pelt_jax.interop._peft import check_order
from pelt_jax.models._safetensors import write_atomically
from pelt_jax.nodes._bank import members_of


def load(
  folder: str | os.PathLike,
  model: Any,
  base: Any,
  *,
  head: bool = True,
  adapters: Mapping[str, str | os.PathLike] | None = None,
  strict: bool = True,
  sites: tuple[Site, ...] | None = None,
) -> dict:
  """Params with the nodes of a folder that AdapterHub wrote; they train further.

  Folders of `save_adapter` (bottleneck adapters, prefixes, LoRA, and unions of them such as MAM and
  UniPELT), `save_adapter_fusion` and `save_adapter_setup`, for BERT, RoBERTa, GPT-2, Llama and
  Mistral, and for T5 those without prefixes. Tensors are read from safetensors, or from torch's
  files without torch. What they compute in AdapterHub with eager attention is computed here:

  - gates are means over all tokens, padding too (`gate_pool="mean_all"`),
  - prefixes shift no positions.

  A head for classification or tagging becomes `Tuned` leaves where the model's own is built alike:
  BERT's with two layers and tanh (its pooler is the first), or with the base's pooler and one
  layer; RoBERTa's with two; for GPT-2 and Llama one layer without bias. The head of a language
  model must be the base's.

  In training, AdapterHub also drops what heads and fusions read by the model's own rates.

  Args:
    folder: holds `adapter_config.json`, `adapter_fusion_config.json` or `adapter_setup.json`, and
      the tensors beside it.
    model: the module that `base` belongs to.
    base: plain params, possibly quantized, looped or scanned.
    head: whether to read a head that lies there.
    adapters: for a fusion, the folders of its adapters by name; by default those beside its own,
      as `save_adapter_setup` puts them.
    strict: raise for unknown fields, unexpected tensors and options that act in training alone and
      would act otherwise here, instead of warning.
    sites: what `pelt.sites` returned; for a model that token ids alone cannot call.

  Returns:
    Params with nodes.

  Raises:
    FileNotFoundError: if a file is missing.
    TypeError: if model and base are swapped.
    ValueError: for a damaged file; for a base of another family or width; for options that change
      the function and cannot be read; for tensors that do not fit, each named with the shape
      expected.

  Example:
    >>> import tempfile, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = pelt.models.from_config(
    ...   dict(model_type="bert", vocab_size=11, **shape), task="encoder"
    ... )
    >>> ids = jnp.array([[1, 2, 3]])
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    >>> base = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    >>> method = pelt.adapter("pfeiffer", bottleneck=2)
    >>> params = method.init(jax.random.key(1), base, pelt.sites(model, ids))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pelt.interop.adapterhub.export(folder, params, model)
    ...   again = pelt.interop.adapterhub.load(folder, model, base)
    >>> again["encoder"]["layer"]["0"]["output"]["LayerNorm"]["bypass"].branch.down.shape
    (8, 2)
  """
  check_order("load(folder, model, base)", base, model)
  if held := [path for path, value in walk(base) if isinstance(value, Bypass)]:
    raise ValueError(
      f"load(folder, model, base): base holds nodes of a method at {held[:4]}; pass the model's "
      "own params. Several adapters compose by name: pelt.stack, pelt.average, pelt.bank"
    )
  family(model)
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f"there is no folder {str(folder)!r}")
  heads = folder
  if (folder / SETUP).is_file():
    folder, heads = _of_setup(folder)
  if (folder / FUSION.config).is_file():
    given = None if adapters is None else {n: pathlib.Path(f) for n, f in adapters.items()}
    params = load_fusion(folder, given, model, base, sites, strict)
  elif adapters is not None:
    raise ValueError(f"adapters are what a fusion reads, but {folder} holds no {FUSION.config}")
  else:
    params = load_adapter(folder, model, base, sites, strict)
  if head and (heads / HEAD.config).is_file():
    params = load_head(heads, model, base, params, strict)
  return params


def _of_setup(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """The folders of a setup's adapter or fusion, and of its head."""
  raw = read_json(folder / SETUP, "adapter_setup")
  setup, head = raw["adapter_setup"], raw.get("head_setup")
  kinds = [c.get("type") for c in setup["children"]]
  single = kinds == ["single"] * len(kinds) and (setup["type"] == "Fuse" or len(kinds) == 1)
  if not single:
    raise ValueError(
      f"{folder / SETUP}: a {setup['type']} of {kinds} is no fusion of adapters and no single one; "
      "load its adapters one by one"
    )
  if head is not None and not isinstance(head, (str, bool)):
    raise ValueError(f"{folder / SETUP}: head_setup={head!r} names several heads; use head=False")
  names = [c["children"][0] for c in setup["children"]]
  fused = setup.get("kwargs", {}).get("name") or ",".join(names)
  at = folder / (fused if setup["type"] == "Fuse" else names[0])
  return at, folder / head if isinstance(head, str) else folder if head else at


def labels(folder: str | os.PathLike) -> list[str] | None:
  """The names of the labels of a folder's head, in order; None if it has none.

  Args:
    folder: holds `head_config.json`.

  Raises:
    FileNotFoundError: if it does not.
  """
  return labels_of(pathlib.Path(folder))


def export(
  folder: str | os.PathLike,
  params: Any,
  model: Any,
  *,
  name: str = "adapter",
  labels: Sequence[str] | None = None,
  base_model_name: str | None = None,
  strict: bool = True,
) -> None:
  """Writes the adapter in params as a folder that AdapterHub loads.

      model = adapters.AutoAdapterModel.from_pretrained(base)
      model.load_adapter(folder, set_active=True, use_safetensors=True)
      model.load_adapter_setup(folder, set_active=True, use_safetensors=True)  # of a fusion

  The file computes what params compute, with eager attention. A classifier's head is written in the
  form of `AutoAdapterModel`, trained or not. An adapter that an MLP's prefixes belong to keeps the
  MLP. A fusion becomes a folder with one for each of its adapters, one for itself, and one for the
  head, under `name`.

  Files are written under temporary names, then renamed; an `adapter_setup.json` comes last.

  Args:
    folder: made if absent.
    params: params with nodes, looped or scanned.
    model: the module they belong to.
    name: of the adapter.
    labels: names of the classes, for the head.
    base_model_name: folder or hub id of the base model.
    strict: raise for what AdapterHub would do otherwise in training (dropout of activations) or
      with padding (gates over real tokens), instead of warning.

  Raises:
    TypeError: if params and model are swapped.
    ValueError: for a bad name; listing every path that a folder cannot hold and why, before
      anything is written.
    FileExistsError: if files of an earlier adapter would stay beside the new ones and be read.

  Example:
    >>> import json, pathlib, tempfile, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = pelt.models.from_config(
    ...   dict(model_type="bert", vocab_size=11, **shape), task="encoder"
    ... )
    >>> ids = jnp.array([[1, 2, 3]])
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    >>> base = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    >>> method = pelt.adapter("houlsby", bottleneck=2, train_norms=False)
    >>> params = method.init(jax.random.key(1), base, pelt.sites(model, ids))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pelt.interop.adapterhub.export(folder, params, model)
    ...   config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
    >>> config["config"]["mh_adapter"], config["config"]["reduction_factor"]
    (True, 4)
  """
  check_order("export(folder, params, model)", params, model)
  if members_of(dict(params)) is not None:
    raise ValueError("params hold a bank; export its members one by one, pelt.unbank(params)[1]")
  family(model)
  _check_name(name)
  folder = pathlib.Path(folder)
  fused = fusion_parts(params, model, base_model_name, strict)
  head = head_part(params, model, name, labels, base_model_name)
  if labels is not None and head is None:
    raise ValueError(f"labels are for a head, which {type(model).__name__} has none of")
  heads: dict[Kind, Part] = {} if head is None else {HEAD: head}
  if fused is None:
    write_parts(
      folder, {ADAPTER: adapter_part(params, model, name, base_model_name, strict), **heads}
    )
    return
  for member in fused.members:
    _check_name(member)
  inside = {member: {ADAPTER: part} for member, part in fused.members.items()}
  inside[fused.name] = {FUSION: fused.fusion}
  if heads:
    inside[name] = {**inside.get(name, {}), **heads}
  for sub, parts in inside.items():
    refuse_stale(folder / sub, parts)
  for sub, parts in inside.items():
    write_parts(folder / sub, parts)
  children = [{"type": "single", "children": [member]} for member in fused.members]
  setup = {
    "adapter_setup": {"type": "Fuse", "children": children},
    "head_setup": name if heads else None,
    "version": VERSION,
  }
  write_atomically(folder / SETUP, [(json.dumps(setup, indent=2) + "\n").encode()])


def _check_name(name: str) -> None:
  if not name or any(c in name for c in "./\\,"):
    raise ValueError(
      f"name must have no '.', ',' or '/', which AdapterHub's names lack; got {name!r}"
    )
