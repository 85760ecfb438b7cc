"""Writing adapters that AdapterHub loads."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pelt_jax._node import BYPASS, GENERATORS, Chain, Node
from pelt_jax._tree import fold
from pelt_jax._walk import walk
from pelt_jax.interop._factors import QUANTIZED
from pelt_jax.interop._hub_config import BottleneckConfig, Config
from pelt_jax.interop._hub_export_weights import Loras, Prefixes
from pelt_jax.interop._hub_files import Part
from pelt_jax.interop._hub_head import common_fields, head_modules
from pelt_jax.interop._hub_names import (
  LOCATIONS,
  bottleneck_name,
  family,
  layers_of,
  layers_with,
  role_entry,
)
from pelt_jax.interop._hub_write import Notes, at_layer, write_config
from pelt_jax.interop._peft_files import complain
from pelt_jax.interop._peft_lora_export import _shortest
from pelt_jax.interop._peft_saved import unguarded
from pelt_jax.nodes import (
  After,
  AroundNorm,
  Bottleneck,
  FusedLora,
  Gated,
  LoraWeight,
  Normalized,
  Prefix,
  PrefixMLP,
  Shift,
  Tuned,
)


def adapter_part(
  params: Mapping, model: Any, name: str, base_model: str | None, strict: bool
) -> Part:
  """Configuration and tensors of the one adapter that params hold.

  Raises:
    ValueError: listing every path that a folder cannot hold and why.
  """
  plan = _Plan(model, name)
  plan.collect(params)
  configs = plan.configs()
  if not configs and not plan.notes.problems:
    plan.notes.problems.append("there is no adapter, prefix or LoRA; use pelt.save")
  if plan.notes.problems:
    problems = "\n  ".join(plan.notes.problems)
    raise ValueError(f"AdapterHub's files cannot hold:\n  {problems}")
  complain(plan.notes.otherwise, "AdapterHub would compute something else here", strict)
  raw = [write_config(c) for c in configs]
  inner = raw[0] if len(raw) == 1 else {"architecture": "union", "configs": raw}
  trunk = family(model).trunk
  tensors = {f"{trunk}.{k}": v for k, v in plan.notes.tensors.items()}
  return Part({**common_fields(model, name, base_model), "config": inner}, tensors)


class _Seen(NamedTuple):
  """A bottleneck in one layer."""

  config: BottleneckConfig
  size: int
  path: str


class _Plan:
  """What goes into the folder; making it finds every problem."""

  def __init__(self, model: Any, name: str):
    self.model, self.name, self.family = model, name, family(model)
    self.width = model.config.hidden_size
    self.notes = Notes(model)
    self.heads = head_modules(model)
    self.bottlenecks: dict[str, dict[int, _Seen]] = collections.defaultdict(dict)
    self.loras = Loras(model, name, self.notes)
    self.prefixes = Prefixes(model, name, self.notes)

  def collect(self, params: Mapping) -> None:
    generators = params.get(GENERATORS, {})
    if not (len(generators) == 1 and self.prefixes.keeps(next(iter(generators.values())), params)):
      params = fold(params)
    for path, value in walk(params):
      value = unguarded(value)
      if isinstance(value, PrefixMLP):
        self.prefixes.mlp = value
        continue
      place = path.removesuffix(BYPASS).rstrip("/")
      for node in value.nodes if isinstance(value, Chain) else (value,):
        self._one(place, node)

  def _one(self, place: str, node: Any) -> None:
    problem = self.notes.problem
    if isinstance(node, After | AroundNorm):
      self._bottleneck(place, node)
    elif isinstance(node, Prefix):
      self.prefixes.add(place, node)
    elif isinstance(node, Shift):
      problem(place, "positions are shifted, which AdapterHub never does (shift_positions=False)")
    elif isinstance(node, LoraWeight | FusedLora):
      self.loras.add(place, node)
    elif isinstance(node, Tuned):
      if not any(place.startswith(f"{head}/") for head in self.heads):
        problem(
          place, "a trained leaf of the model, which no file has room for (train_norms=False)"
        )
    elif isinstance(node, Node) and type(node).__name__ not in QUANTIZED:
      problem(place, f"a {type(node).__name__}")

  def _bottleneck(self, place: str, node: Any) -> None:
    problem, branch = self.notes.problem, node.branch
    gate = None
    if isinstance(branch, Gated):
      gate, branch = branch.gate, branch.branch
    norm = branch if isinstance(branch, Normalized) else None
    inner = branch if norm is None else norm.branch
    if not isinstance(inner, Bottleneck):
      return problem(place, f"a branch of {type(inner).__name__}")
    if norm is not None and norm.epsilon != 1e-5:
      return problem(place, f"its norm's epsilon is {norm.epsilon}, AdapterHub's is 1e-5")
    if inner.down_bias is None or inner.up_bias is None:
      return problem(place, "it has no biases")
    if gate is not None and not self.notes.gate(place, gate):
      return None
    self.notes.drops(place, inner.dropout, "AdapterHub drops what the adapter gives instead")
    for layer in layers_of(self.model, place):
      found = bottleneck_name(self.family, layer.path)
      if found is None:
        break
      name, location = found
      style = self._style(place, node, location)
      if style is None:
        return None
      i, at = layer.index, f"{name}.adapters.{self.name}"
      config = BottleneckConfig(
        (),
        style,
        inner.activation,
        self._scaling(inner.scaling, i),
        gate is not None,
        norm is not None,
      )
      down = at_layer(inner.array("down"), i)
      if down.shape[0] != self.width or inner.array("up").shape[-1] != self.width:
        return problem(place, f"it reads another width than {self.width}")
      seen = _Seen(config, down.shape[1], place)
      if layer.number in self.bottlenecks[location]:
        return problem(place, "a second adapter at this place")
      self.bottlenecks[location][layer.number] = seen
      put, first = self.notes.put, "adapter_down.0" if norm is None else "adapter_down.1"
      put(f"{at}.{first}.weight", down.T)
      put(f"{at}.{first}.bias", at_layer(inner.array("down_bias"), i))
      put(f"{at}.adapter_up.weight", at_layer(inner.array("up"), i).T)
      put(f"{at}.adapter_up.bias", at_layer(inner.array("up_bias"), i))
      if isinstance(inner.scaling, Tuned):
        put(f"{at}.scaling", np.atleast_1d(at_layer(inner.scaling.array("value"), i)))
      if norm is not None:
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
          for copy in ("adapter_norm_before", "adapter_down.0"):
            put(f"{at}.{copy}.{theirs}", at_layer(norm.array(ours), i))
      if gate is not None:
        self.notes.put_gate(f"{at}.gate", gate, i)
    else:
      if layers_of(self.model, place):
        return None
    problem(place, "AdapterHub has no adapter at this place")
    return None

  def _style(self, place: str, node: Any, location: str) -> str | None:
    if isinstance(node, AroundNorm):
      return "pfeiffer"
    if node.tap is None:
      return "houlsby"
    role = LOCATIONS[location]
    entry = role_entry(self.model, place, role)
    stream = None if entry is None else entry.residual or entry.tap
    if node.tap != stream:
      self.notes.problem(
        place,
        "it reads the sublayer's normalized input, AdapterHub's parallel adapters the residual "
        "stream (tap='residual')",
      )
      return None
    if node.plus and f"{role}_sum" in self.model.roles:
      self.notes.problem(place, "it reads a sum that AdapterHub normalizes first")
      return None
    return "pfeiffer" if node.plus else "parallel"

  def _scaling(self, scaling: Any, i: int | None) -> float | str:
    if scaling is None:
      return 1.0
    if isinstance(scaling, Tuned):
      return "channel" if at_layer(scaling.array("value"), i).ndim else "learned"
    value = at_layer(scaling, i)
    return _shortest(float(value), value)

  def configs(self) -> list[Config]:
    """The configurations; adapters alike at several places share one."""
    merged: list[BottleneckConfig] = []
    for location, layers in self.bottlenecks.items():
      first = min(seen.path for seen in layers.values())
      kinds = {seen.config for seen in layers.values()}
      if len(kinds) > 1:
        shown = "\n    ".join(sorted(map(str, kinds)))
        self.notes.problem(first, f"layers have adapters of several kinds:\n    {shown}")
        continue
      config = next(iter(kinds))._replace(
        reduction=self._reduction({n: seen.size for n, seen in sorted(layers.items())}),
        leave_out=tuple(n for n in layers_with(self.model, location) if n not in layers),
      )
      twin = next((i for i, c in enumerate(merged) if c._replace(locations=()) == config), None)
      if twin is None:
        merged.append(config._replace(locations=(location,)))
      else:
        merged[twin] = config._replace(locations=(*merged[twin].locations, location))
      if len(merged) > 1 and "cross_adapter" in (location, *merged[0].locations):
        self.notes.problem(first, "AdapterHub joins no cross attention's adapters of another kind")
    parts = (self.prefixes.config(), *merged, self.loras.config())
    return [c for c in parts if c is not None]

  def _reduction(self, sizes: Mapping[int, int]) -> Any:
    """The factor that gives every layer its bottleneck, by layer number if they differ."""
    factors = {n: _factor(self.width, size) for n, size in sizes.items()}
    if len(set(factors.values())) == 1:
      return next(iter(factors.values()))
    return {str(n): f for n, f in factors.items()}


def _factor(width: int, size: int) -> float:
  """A factor with int(width // factor) = size, a whole one where there is one."""
  whole = width // size
  # In the middle of the interval, rounding does no harm.
  return whole if whole and width // whole == size else width / (size + 0.5)
