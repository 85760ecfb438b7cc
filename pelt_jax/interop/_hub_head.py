"""Prediction heads of AdapterHub's folders, in and out."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pelt_jax._leaf import materialize
from pelt_jax._walk import get_at, update_at
from pelt_jax.interop._hub_files import HEAD, VERSION, Part, Tensors, read_json
from pelt_jax.interop._hub_names import family
from pelt_jax.interop._hub_reader import check_base
from pelt_jax.interop._peft_files import complain
from pelt_jax.interop._peft_saved import stored, torch_array, tuned_leaves
from pelt_jax.interop._places import Place, is_tied, is_tokens, places
from pelt_jax.models._names import repeats

_KNOWN = {
  "head_type",
  "num_labels",
  "layers",
  "activation_function",
  "label2id",
  "id2label",
  "use_pooler",
  "bias",
  "dropout_prob",
}
_TYPES = {
  "classification": "ForSequenceClassification",
  "multilabel_classification": "ForSequenceClassification",
  "tagging": "ForTokenClassification",
}
_SKIP = "head=False leaves it out"


def load_head(folder: pathlib.Path, model: Any, base: Mapping, params: dict, strict: bool) -> dict:
  """Params with a folder's head, which trains further."""
  file = folder / HEAD.config
  raw = read_json(file, "model_class")
  check_base(raw, file, model)
  tensors = Tensors(folder, HEAD)
  there = places(model, base)
  config = raw.get("config")
  if config is None:
    named = _static(raw, file, tensors, model, base, there)
  else:
    named = _flexible(raw, config, file, tensors, model, there, strict)
  whole = {}
  for name, place in named.items():
    value = tensors.read(name, place.shape[::-1] if place.transposed else place.shape)
    whole[place] = value.T if place.transposed else value
  complain(sorted(tensors.left), f"{tensors.file} has unexpected tensors", strict)
  return update_at(params, tuned_leaves(base, whole))


def labels(folder: pathlib.Path) -> list[str] | None:
  """The labels' names in order, None if the head has none."""
  raw = read_json(folder / HEAD.config, "model_class")
  found = (raw.get("config") or {}).get("label2id") or raw.get("label2id")
  return None if not found else sorted(found, key=lambda name: int(found[name]))


def _flexible(
  raw: Mapping[str, Any],
  config: Mapping[str, Any],
  file: pathlib.Path,
  tensors: Tensors,
  model: Any,
  there: Mapping[str, Place],
  strict: bool,
) -> dict[str, Place]:
  """Their tensors of a head that AdapterHub built: our places."""
  kind = config.get("head_type")
  if not model.architecture.endswith(_TYPES.get(str(kind), "?")):
    hint = {"classification": "classification", "tagging": "tagging"}.get(str(kind))
    remedy = f"load the base with task={hint!r}, num_labels={config.get('num_labels')}; " * bool(
      hint
    )
    raise ValueError(
      f"{file}: a head of head_type={kind!r} has no counterpart in {type(model).__name__}: "
      f"{remedy}{_SKIP}"
    )
  count, expected = config.get("num_labels"), model.config.num_labels
  if count != expected:
    raise ValueError(
      f"{file}: the head has {count} labels, the model {expected}; load the base with "
      f"num_labels={count}"
    )
  unknown = sorted(set(config) - _KNOWN)
  complain(unknown, f"{file} has unknown fields that may change the function", strict)
  layers, act = config.get("layers"), config.get("activation_function")
  pooled, bias = bool(config.get("use_pooler", False)), bool(config.get("bias", True))
  modules = _modules(model)
  ours = f"{type(model).__name__} has " + (
    "a dense layer, tanh and the classifier" if len(modules) == 2 else "one layer"
  )
  bare = model.architecture == "BertForSequenceClassification" and layers == 1 and pooled
  if bare:  # the pooler is the base's own
    modules = modules[1:]
  elif layers != len(modules) or (layers == 2 and act != "tanh") or pooled:
    raise ValueError(
      f"{file}: layers={layers}, activation_function={act!r}, use_pooler={pooled}: {ours}, so this "
      f"head cannot be read; {_SKIP}"
    )
  if bias != (f"{modules[-1]}.bias" in there):
    raise ValueError(
      f"{file}: bias={bias}, but the last layer of {type(model).__name__} has "
      f"{'none' if bias else 'one'}; {_SKIP}"
    )
  rate = config.get("dropout_prob")
  if rate is not None:
    complain(
      [f"dropout_prob={rate}"] if rate != _dropout(model) else [],
      f"{file} sets what acts in training alone; the model has {_dropout(model)}",
      strict,
    )
  return {
    f"heads.{raw['name']}.{index}.{leaf}": there[f"{module}.{leaf}"]
    for index, module in zip((1, 4), modules, strict=False)
    for leaf in ("weight", "bias")
    if f"{module}.{leaf}" in there
  }


def _dropout(model: Any) -> float | None:
  rate = getattr(model.config, "classifier_dropout", None)
  return getattr(model.config, "hidden_dropout_prob", None) if rate is None else rate


def _modules(model: Any) -> list[str]:
  """Torch's names of the layers of a model's head; the last gives the logits."""
  kind, architecture = model.config.model_type, model.architecture
  if architecture.endswith("ForTokenClassification"):
    return ["score" if kind in ("llama", "mistral") else "classifier"]
  if not architecture.endswith("ForSequenceClassification"):
    return []
  if kind == "bert":
    return ["bert.pooler.dense", "classifier"]
  return ["classifier.dense", "classifier.out_proj"] if kind == "roberta" else ["score"]


def _static(
  raw: Mapping[str, Any],
  file: pathlib.Path,
  tensors: Tensors,
  model: Any,
  base: Mapping,
  there: Mapping[str, Place],
) -> dict[str, Place]:
  """The same for the head that a class of transformers brings, under its own names.

  A language model's head is frozen there: it must be the base's.
  """
  named, odd = {}, []
  for name, value in tensors.values.items():
    place = there.get(name)
    if place is None and name == "lm_head.weight" and is_tied(model, base):
      place = next(p for p in there.values() if is_tokens(model, p))
    elif place is not None and _modules(model):
      named[name] = place
      continue
    if place is None:
      if repeats(name, model):  # a second name of a table or bias
        tensors.left.discard(name)
      else:
        odd.append(name)
      continue
    tensors.left.discard(name)
    if not np.array_equal(np.asarray(value), torch_array(get_at(base, place.path), place)):
      raise ValueError(
        f"{tensors.file}: {name} differs from the base's, whose head AdapterHub does not train; is "
        f"it the adapter's base? {_SKIP}"
      )
  if odd:
    raise ValueError(
      f"{file}: a head of {raw['model_class']} with {odd[:4]} has no counterpart in "
      f"{type(model).__name__}; load the base with the task of that class, or {_SKIP}"
    )
  return named


def head_modules(model: Any) -> tuple[str, ...]:
  """Our paths of what a head file holds."""
  return tuple(name.replace(".", "/") for name in _modules(model))


def head_part(
  params: Mapping, model: Any, name: str, names: Sequence[str] | None, base_model: str | None
) -> Part | None:
  """The head's file, None for a model without one."""
  modules = _modules(model)
  if not modules:
    return None
  count = model.config.num_labels
  if names is not None and len(names) != count:
    raise ValueError(f"labels has {len(names)} names, the head {count} rows")
  there = places(model, params)
  tensors, leaves = {}, ("weight", "bias")
  for index, module in zip((1, 4), modules, strict=False):
    for leaf in leaves:
      if place := there.get(f"{module}.{leaf}"):
        value = materialize(stored(get_at(params, place.path)))
        tensors[f"heads.{name}.{index}.{leaf}"] = torch_array(value, place)
  tagging = model.architecture.endswith("ForTokenClassification")
  names = names or [f"LABEL_{i}" for i in range(count)]
  config = {
    "head_type": "tagging" if tagging else "classification",
    "num_labels": count,
    "layers": len(modules),
    "activation_function": "tanh" if len(modules) == 2 else None,
    "label2id": {label: i for i, label in enumerate(names)},
    "dropout_prob": None,
  }
  if not tagging:
    config |= {"use_pooler": False, "bias": f"{modules[-1]}.bias" in there}
  return Part({**common_fields(model, name, base_model), "config": config}, tensors)


def common_fields(model: Any, name: str, base_model: str | None) -> dict[str, Any]:
  """What every configuration of a folder says."""
  return {
    "name": name,
    "model_class": family(model).model,
    "model_type": model.config.model_type,
    "model_name": base_model or "",
    "hidden_size": model.config.hidden_size,
    "version": VERSION,
  }
