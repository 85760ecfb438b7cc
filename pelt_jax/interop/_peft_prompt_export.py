"""Writing folders of prompts and prefixes that `peft.PeftModel.from_pretrained` loads."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from pelt_jax._node import Bypass, Node
from pelt_jax._walk import walk
from pelt_jax.interop._factors import QUANTIZED
from pelt_jax.interop._peft_saved import heads, modules_to_save, stored, torch_array, unguarded
from pelt_jax.interop._places import Place, is_tied, is_tokens, places, task_type
from pelt_jax.models._layers import stacks
from pelt_jax.nodes import BankWeight, ExtendedEmbedding, Prefix, Shift, Tuned

TABLE = "prompt_embeddings"
SAVED = "base_model."  # PEFT wraps the model once here, twice for LoRA
ONE_PREFIX = "PEFT gives self and cross attention of an encoder-decoder one and the same prefix"

Files = tuple[dict[str, Any], dict[str, np.ndarray]]


def prompt_files(params: Mapping, model: Any, base_model_name: str | None) -> Files:
  """Configuration and tensors of virtual tokens; see `export`."""
  found = _Contents(params, model, (ExtendedEmbedding,))
  tokens = {p.path for p in found.places if is_tokens(model, p)}
  for path, node in found.nodes.items():
    if found.places and path not in tokens:
      found.problems.append(f"{path}: a prompt on a table that is not of tokens")
    if isinstance(node.base, Node) and type(node.base).__name__ not in QUANTIZED:
      found.problems.append(f"{path}: a {type(node.base).__name__} under the prompt")
  if len(found.nodes) > 1:
    found.problems.append(f"{sorted(found.nodes)}: several tables hold prompts")
  found.check("prompts")
  (node,) = found.nodes.values()
  prompt = np.asarray(node.array("prompt"))
  scale = embedding_scale(model)
  config = {
    **found.config("PROMPT_TUNING", base_model_name, prompt.shape[0]),
    "token_dim": prompt.shape[1],
    "num_attention_heads": model.config.num_attention_heads,
    "prompt_tuning_init": "RANDOM",
  }
  prompt = prompt if scale == 1 else (prompt * scale).astype(prompt.dtype)
  return config, {TABLE: prompt, **found.tensors()}


def prefix_files(params: Mapping, model: Any, base_model_name: str | None) -> Files:
  """Configuration and tensors of keys and values; see `export`."""
  found = _Contents(params, model, (Prefix, Shift))
  if hasattr(model, "stacks"):
    found.problems.append(ONE_PREFIX)
  found.check("prefixes")
  layers = _layers(found)
  keys = layers[0][0]
  length, heads, width = keys.shape
  shifts = {float(np.max(n.array("by"))) for n in found.nodes.values() if isinstance(n, Shift)}
  if shifts != {length}:
    found.problems.append(
      f"PEFT counts tokens from {length} on; here positions are shifted by "
      f"{sorted(shifts) or 'nothing'} (shift_positions)"
    )
  found.check("prefixes")
  warn_of_windows(model)
  config = {
    **found.config("PREFIX_TUNING", base_model_name, length),
    "token_dim": heads * width,
    "num_attention_heads": heads,
    "encoder_hidden_size": heads * width,
    "prefix_projection": False,
  }
  table = np.stack([x for layer in layers for x in layer], axis=1)  # (P, 2 layers, heads, width)
  return config, {TABLE: table.reshape(length, -1), **found.tensors()}


def embedding_scale(model: Any) -> float:
  """What the model multiplies rows of its table with: PEFT's prompts come after that."""
  return getattr(model, "embedding_scale", 1.0)


def warn_of_windows(model: Any) -> None:
  """Warns where PEFT's prefix is not seen by all tokens."""
  config = getattr(model, "config", None)
  windows = [w for w in getattr(config, "windows", ()) if w is not None]
  if windows:
    warnings.warn(
      f"layers have a sliding window of {min(windows)} tokens: in PEFT a prefix slides out of it, "
      "here every token sees it; both agree while prefix and text fit the window",
      stacklevel=4,
    )


class _Contents:
  """What params hold: the method's nodes, modules saved whole, and what no folder can hold."""

  def __init__(self, params: Mapping, model: Any, kinds: tuple[type[Node], ...]):
    self.model = model
    self.nodes: dict[str, Any] = {}
    self.problems: list[str] = []
    self.leaves: dict[str, Any] = {}
    trained = set()
    for path, value in walk(params):
      value = unguarded(value)
      if isinstance(value, kinds):
        self.nodes[path] = value
        if why := _special(value):
          self.problems.append(f"{path}: {why}")
      elif isinstance(value, Tuned):
        trained.add(path)
      elif isinstance(value, Node) and type(value).__name__ not in QUANTIZED:
        self.problems.append(f"{path}: {_refusal(value)}")
        continue
      self.leaves[path] = stored(value)
    if task_type(model) is None:
      self.problems.append("PEFT adds prompts and prefixes by the model's task, which it lacks")
    self.places = list(places(model, params).values()) if not self.problems else []
    several = is_tied(model, params) or hasattr(model, "stacks")
    for place in self.places if several else ():
      if place.path in trained and is_tokens(model, place):
        self.problems.append(f"{place.path}: a trained table that torch holds under several names")
    modules = {p.module for p in self.places if p.path in trained}
    head = heads(model, self.places)
    self.saved, problems = modules_to_save(self.places, modules, set(), head)
    self.problems += problems

  def check(self, what: str) -> None:
    """Raises if there are problems."""
    if self.problems:
      raise ValueError(f"PEFT's files of {what} cannot hold:\n  " + "\n  ".join(self.problems))

  def tensors(self) -> dict[str, np.ndarray]:
    """The modules saved whole."""
    return {
      SAVED + p.tensor: torch_array(self.leaves[p.path], p) for p in self.places if self._keeps(p)
    }

  def _keeps(self, place: Place) -> bool:
    return any(f"{place.module}.".startswith(f"{m}.") for m in self.saved)

  def config(self, kind: str, base_model_name: str | None, length: int) -> dict[str, Any]:
    """The fields that all methods of prompts share."""
    return {
      "peft_type": kind,
      "task_type": task_type(self.model),
      "base_model_name_or_path": base_model_name,
      "inference_mode": True,
      "modules_to_save": self.saved or None,
      "num_virtual_tokens": length,
      "num_layers": stacks(self.model)[0][1],
      "num_transformer_submodules": 1,
    }


def _special(node: Any) -> str | None:
  if getattr(node, "banked", False):
    return "a bank; export its members one by one"
  if isinstance(node, Prefix) and node.gate is not None:
    return "a gated prefix"
  return None


def _refusal(node: Node) -> str:
  if isinstance(node, BankWeight):
    return "a bank; export its members one by one"
  if isinstance(node, Bypass):
    return f"a {type(node).__name__} wraps a module's call"
  return f"a {type(node).__name__}"


def _layers(found: _Contents) -> list[tuple[np.ndarray, np.ndarray]]:
  """Keys and values of every layer, in order."""
  root, count = stacks(found.model)[0]
  prefixes = {p: n for p, n in found.nodes.items() if isinstance(n, Prefix)}
  layers = {}
  for path, node in prefixes.items():
    keys, values = np.asarray(node.array("keys")), np.asarray(node.array("values"))
    if node.stacked:
      layers |= {i: (keys[i], values[i]) for i in range(count)}
    else:
      number = path.removeprefix(f"{root}/").split("/")[0]
      layers[int(number) if number.isdigit() else path] = (keys, values)
  if set(layers) != set(range(count)):
    missing = sorted(set(range(count)) - set(layers))
    raise ValueError(
      f"PEFT's prefixes stand in every layer; params have them at {sorted(prefixes)} and none in "
      f"layers {missing}"
    )
  if len({k.shape for k, _ in layers.values()}) > 1:
    shapes = sorted({k.shape for k, _ in layers.values()})
    raise ValueError(f"PEFT's prefixes are of one shape in all layers, here of {shapes}")
  return [layers[i] for i in range(count)]
