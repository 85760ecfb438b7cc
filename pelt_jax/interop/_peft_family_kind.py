"""What PEFT's files of a method beside LoRA hold, and its configuration."""

import collections
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from pelt_jax.interop._peft_lora_config import Config
from pelt_jax.interop._peft_lora_export import _shortest
from pelt_jax.interop._places import LINEAR, Place
from pelt_jax.nodes import Dropout

Arrays = dict[str, Any]


class Kind:
  """One method's files.

  Attributes:
    peft_type: its name in files.
    title: its name for people.
    nodes: the weight nodes that its files hold.
    fields: tensor's suffix -> field of the node, which holds its transpose.
    rank: PEFT's default.
    known: options of its own that can be read.
    rate: the option that is a dropout of the input.
    training: options that act in training alone, and that no node has.
    conv: whether PEFT adapts GPT-2's Conv1D, which needs the option fan_in_fan_out.
    tables: whether it adapts embedding tables.
    patterns: whether it has ranks by rank_pattern (HiRA has the option, and does not use it).
  """

  peft_type = ""
  title = ""
  nodes: tuple[type, ...] = ()
  fields: ClassVar[Mapping[str, str]] = {}
  rank = 8
  known: frozenset[str] = frozenset()
  rate: str | None = None
  training: tuple[str, ...] = ()
  conv = True
  tables = False
  patterns = False

  def problems(self, raw: Mapping[str, Any]) -> list[str]:
    """Options that change the function and cannot be read."""
    bias = raw.get("bias", "none")
    return [] if bias == "none" else [f"bias={bias!r}: it trains biases beside the method"]

  # Out.

  def tensors(self, node: Any, place: Place) -> Arrays:
    """A matrix's tensors by suffix."""
    found = {}
    for suffix, field in self.fields_of(place).items():
      if getattr(node, field) is not None:
        found[suffix] = self.turned(layer_of(node, field, place))
    return found

  def shared(self, at: Mapping[Place, Any], params: Mapping) -> Arrays:
    """Tensors that belong to no module, under their full names."""
    del at, params
    return {}

  def options(self, at: Mapping[Place, Any]) -> dict[str, Any]:
    """The method's own part of the configuration.

    Raises:
      ValueError: for what no configuration says.
    """
    return self.ranked({p: self.rank_of(node) for p, node in at.items()})

  def rank_of(self, node: Any) -> int:
    raise NotImplementedError

  def ranked(self, ranks: Mapping[Place, int]) -> dict[str, Any]:
    """`r`, and ranks that differ; of all but IA3."""
    if not self.patterns and len(set(ranks.values())) > 1:
      raise ValueError(f"its matrices have ranks {sorted(set(ranks.values()))}, PEFT has one")
    by_module = {p.module: rank for p, rank in ranks.items()}
    return patterned("r", "rank_pattern", by_module, self.patterns) | {"init_weights": True}

  # In.

  def fields_of(self, place: Place) -> Mapping[str, str]:
    """`fields`, where they depend on the module."""
    del place
    return self.fields

  def shapes(self, config: "FamilyConfig", place: Place) -> dict[str, tuple[int, ...]]:
    """What a module's tensors must be, by suffix."""
    raise NotImplementedError

  def turned(self, value: np.ndarray) -> np.ndarray:
    """A tensor as the node's field, or back."""
    return value.T

  def node(
    self, config: "FamilyConfig", places: list[Place], leaf: Any, arrays: Arrays, more: dict
  ) -> Any:
    """The node of one leaf from its fields; `places` are its layers, or it alone."""
    scaling = config.scalings(places)
    if scaling is not None:
      wide = np.promote_types(next(iter(arrays.values())).dtype, np.float32)
      arrays = {**arrays, "scaling": jnp.asarray(scaling, wide)}
    return self.nodes[0](leaf, **arrays, **more)

  def beside(self, config: "FamilyConfig", tensors: Any, base: Mapping, nodes: Mapping) -> dict:
    """What else params hold, by path."""
    del config, tensors, base, nodes
    return {}

  def names(self) -> tuple[str, ...]:
    """Full names of tensors that belong to no module."""
    return ()


class FamilyConfig(Config):
  """The fields of an `adapter_config.json`, read as PEFT's rules for modules say.

  Attributes:
    raw: the fields, which were checked.
    kind: the method.
  """

  def __init__(self, kind: Kind, raw: dict[str, Any]):
    self.kind, self.raw = kind, raw
    self.modules_to_save = list(raw.get("modules_to_save") or ())
    self.task = raw.get("task_type")
    self.dropout = float((raw.get(kind.rate) if kind.rate else None) or 0.0)

  def rank(self, name: str) -> int:
    rank = self.raw.get("r", self.kind.rank)
    return int(self._of("rank_pattern", name, rank) if self.kind.patterns else rank)

  def scaling(self, name: str) -> float:
    return float(self._of("alpha_pattern", name, self.raw.get("alpha", 8))) / self.rank(name)

  def scalings(self, places: list[Place]) -> Any:
    """One number or one per layer, None for methods without."""
    if "alpha" not in self.kind.known:
      return None
    found = [self.scaling(p.module) for p in places]
    return found[0] if places[0].layer is None else found


def layer_of(node: Any, field: str, place: Place) -> np.ndarray:
  """A field's array for one layer."""
  value = np.asarray(node.array(field))
  return value if place.layer is None else np.asarray(value[place.layer])


def rate_of(node: Any, place: Place) -> float:
  """The node's dropout at one layer."""
  if node.dropout is None or place.leaf != LINEAR:
    return 0.0
  if not isinstance(node.dropout, Dropout):
    raise ValueError(f"its dropout is a {type(node.dropout).__name__}, PEFT has a rate only")
  rate = layer_of(node.dropout, "rate", place)
  return _shortest(float(rate), rate)


def alphas(at: Mapping[Place, Any], ranks: Mapping[Place, int]) -> dict[str, Any]:
  """`alpha`, and those that differ: scaling * rank as PEFT divides it."""
  found = {}
  for place, node in at.items():
    scaling, rank = layer_of(node, "scaling", place), ranks[place]
    alpha = _shortest(float(scaling) * rank, scaling, rank)
    found[place.module] = int(alpha) if alpha == int(alpha) else alpha
  return patterned("alpha", "alpha_pattern", found, True)


def patterned(name: str, pattern: str, values: Mapping[str, Any], patterns: bool) -> dict[str, Any]:
  """The most common value, and by full path those that differ."""
  common = collections.Counter(values.values()).most_common(1)[0][0]
  odd = {"^" + re.escape(m): v for m, v in sorted(values.items()) if v != common}
  return {name: common, **({pattern: odd} if patterns else {})}
