"""Writing PEFT's folders of methods beside LoRA that change matrices."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pelt_jax._node import Generator, Node, Weight
from pelt_jax._walk import walk
from pelt_jax.interop._factors import QUANTIZED
from pelt_jax.interop._peft_family_kind import Kind, rate_of
from pelt_jax.interop._peft_family_kinds import Ia3
from pelt_jax.interop._peft_lora_export import PREFIX, _names
from pelt_jax.interop._peft_prompt_export import Files, _refusal
from pelt_jax.interop._peft_saved import (
  heads,
  inside,
  modules_to_save,
  stored,
  torch_array,
  unguarded,
)
from pelt_jax.interop._places import (
  LINEAR,
  TABLE,
  Place,
  is_copied,
  is_tied,
  is_tokens,
  places,
  task_type,
)
from pelt_jax.nodes import Tuned


def family_files(kind: Kind, params: Mapping, model: Any, base_model_name: str | None) -> Files:
  """Configuration and tensors of a folder; see `export`."""
  plan = _Plan(kind, params, model)
  plan.check()
  return plan.config(base_model_name), plan.tensors()


class _Plan:
  """What goes into the folder; making it finds every problem."""

  def __init__(self, kind: Kind, params: Mapping, model: Any):
    self.kind, self.params, self.model = kind, params, model
    self.problems: list[str] = []
    self.nodes: dict[str, Any] = {}
    self.leaves: dict[str, Any] = {}
    self.trained: set[str] = set()
    for path, value in walk(params):
      self._one(path, unguarded(value))
    self.places = list(places(model, params).values())
    self.at: dict[Place, Any] = {}
    for place in self.places:
      if place.path in self.nodes and not self._follows(place):
        self._add(place, self.nodes[place.path])
    found = heads(model, self.places)
    self.head = () if any(inside(p.module, h) for p in self.at for h in found) else found
    self._saved()
    self.rates = self._rates()
    try:
      self.options = kind.options(self.at) if self.at else {}
    except ValueError as error:
      self.problems.append(str(error))

  def check(self) -> None:
    """Raises if there are problems."""
    if self.problems:
      listed = "\n  ".join(dict.fromkeys(self.problems))
      raise ValueError(f"PEFT's {self.kind.title} files cannot hold:\n  {listed}")

  def _one(self, path: str, value: Any) -> None:
    if isinstance(value, Generator):
      return
    if isinstance(value, self.kind.nodes):
      self.nodes[path] = value
      below = value.base
      if isinstance(below, Node) and type(below).__name__ not in QUANTIZED:
        self.problems.append(f"{path}: a {type(below).__name__} under a {type(value).__name__}")
    elif isinstance(value, Tuned):
      self.trained.add(path)
    elif isinstance(value, Node) and type(value).__name__ not in QUANTIZED:
      self.problems.append(f"{path}: {_refusal(value)}")
      return
    self.leaves[path] = stored(value)

  def _follows(self, place: Place) -> bool:
    """Whether it is a bias that its kernel's scale acts on, as in PEFT."""
    at_bias = isinstance(self.kind, Ia3) and place.name == "bias"
    return at_bias and bool(self.nodes[place.path].shared)

  def _add(self, place: Place, node: Weight) -> None:
    problem = None
    if node.stacked != (place.layer is not None):
      problem = "it is stacked by scans or maps other than the layers'"
    elif not place.module:
      problem = "it belongs to the root module, which PEFT cannot wrap"
    elif place.leaf != LINEAR and not (place.leaf == TABLE and self.kind.tables):
      problem = f"PEFT's {self.kind.title} changes no leaf named {place.leaf!r}"
    elif place.leaf == LINEAR and not place.transposed and not self.kind.conv:
      problem = f"PEFT's {self.kind.title} knows no Conv1D"
    elif is_tokens(self.model, place) and is_tied(self.model, self.params):
      problem = "the head is this table, and PEFT would change its lookups alone"
    elif is_copied(self.model, place):
      problem = "torch holds this table under several names"
    elif isinstance(self.kind, Ia3) and self._unscaled(place, node):
      problem = "its outputs are scaled and its bias is not, as PEFT does"
    if problem is None:
      self.at[place] = node
    else:
      self.problems.append(f"{place.path}: {problem}")

  def _unscaled(self, place: Place, node: Any) -> bool:
    bias = f"{place.path.rpartition('/')[0]}/bias"
    return node.axes == "io:o" and bias in self.leaves and bias not in self.nodes

  def _saved(self) -> None:
    at = [p for p in self.places if p.path in self.trained]
    if loose := [p.path for p in at if p.module in {q.module for q in self.at}]:
      self.problems.append(f"{loose[:5]}: trained leaves beside a change of the same module")
    whole = {p.module for p in at} - {p.module for p in self.at}
    for place in at:
      tied = is_tokens(self.model, place) and is_tied(self.model, self.params)
      if tied or is_copied(self.model, place):
        self.problems.append(f"{place.path}: a trained table that torch holds under several names")
    adapted = {p.module for p in self.at}
    self.saved, problems = modules_to_save(self.places, whole, adapted, self.head)
    self.problems += problems

  def _rates(self) -> dict[str, float]:
    if isinstance(self.kind, Ia3):
      return {}
    rates = {rate_of(node, place) for place, node in self.at.items() if place.leaf == LINEAR}
    if len(rates) > 1:
      self.problems.append(f"dropouts {sorted(rates)}: PEFT has one for all modules")
    rate = next(iter(rates), 0.0)
    if rate and self.kind.rate is None:
      self.problems.append(f"dropout {rate} of the input, which PEFT's {self.kind.title} has not")
    return {self.kind.rate: rate} if self.kind.rate else {}

  def tensors(self) -> dict[str, np.ndarray]:
    """All tensors, by name."""
    out = dict(self.kind.shared(self.at, self.params))
    for place, node in self.at.items():
      made = self.kind.tensors(node, place)
      out |= {f"{PREFIX}{place.module}.{suffix}": value for suffix, value in made.items()}
    for place in self.places:
      if any(inside(place.module, m) for m in self.saved):
        out[PREFIX + place.tensor] = torch_array(self.leaves[place.path], place)
    return out

  def config(self, base_model_name: str | None) -> dict[str, Any]:
    """All fields."""
    modules = {p.module for p in self.at}
    task = task_type(self.model)
    if task in ("SEQ_CLS", "TOKEN_CLS") and not self.head:
      task = None  # with it PEFT would claim the head, which is adapted
    conv = any(p.leaf == LINEAR and not p.transposed for p in self.at)
    return {
      "peft_type": self.kind.peft_type,
      "task_type": task,
      "base_model_name_or_path": base_model_name,
      "inference_mode": True,
      "target_modules": self._targets(modules),
      "modules_to_save": sorted(self.saved) or None,
      **({"fan_in_fan_out": conv} if self.kind.conv else {}),
      **self.rates,
      **self.options,
    }

  def _targets(self, modules: set[str]) -> list[str]:
    if isinstance(self.kind, Ia3):
      return sorted(modules)  # feedforward_modules must be some of the very same names
    return _names(modules, {p.module for p in self.places}, self.saved)
