"""Writing prefixes and LoRAs into AdapterHub's files."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from pelt_jax._node import BYPASS, Branch, Chain
from pelt_jax._site import matches
from pelt_jax._walk import walk
from pelt_jax.interop._hub_config import LoraConfig, PrefixConfig
from pelt_jax.interop._hub_names import NO_T5_PREFIX, family, layers_of
from pelt_jax.interop._hub_write import Notes, at_layer
from pelt_jax.interop._peft_lora_export import _shortest
from pelt_jax.models import torch_name
from pelt_jax.nodes import Dropout, FusedLora, LoraWeight, Prefix, PrefixMLP, Residual


class Prefixes:
  """The prefixes of params."""

  def __init__(self, model: Any, name: str, notes: Notes):
    self.model, self.name, self.notes = model, name, notes
    self.mlp: PrefixMLP | None = None
    self.found: dict[int, tuple[str, Prefix, Any]] = {}

  def keeps(self, generator: Any, params: Mapping) -> bool:
    """Whether a folder holds the MLP itself: one for all layers, of the model's width."""
    if not isinstance(generator, PrefixMLP):
      return False
    places = [
      path.removesuffix(f"/{BYPASS}")
      for path, value in walk(params)
      for node in (value.nodes if isinstance(value, Chain) else (value,))
      if isinstance(node, Prefix)
    ]
    numbers = [layers_of(self.model, site)[0].number for site in generator.sites]
    wide = generator.array("embedding").shape[1] == self.model.config.hidden_size
    return wide and sorted(places) == sorted(generator.sites) and numbers == sorted(numbers)

  def add(self, place: str, node: Prefix) -> None:
    """Notes the prefix at an attention core."""
    if family(self.model).prefix is None:
      return self.notes.problem(place, NO_T5_PREFIX)
    if node.banked:
      return self.notes.problem(place, "a bank; export its members one by one")
    if node.tap != "../in":
      return self.notes.problem(place, f"its gate reads {node.tap!r}")
    if node.gate is not None and not (
      isinstance(node.gate, Branch) and self.notes.gate(place, node.gate)
    ):
      self.notes.problem(place, "its gate is a number")
      return None
    if node.dropout is not None and not isinstance(node.dropout, Dropout):
      return self.notes.problem(place, f"a dropout of {type(node.dropout).__name__}")
    for layer in layers_of(self.model, place):
      if layer.number in self.found:
        return self.notes.problem(place, "a second prefix")
      self.found[layer.number] = (place, node, layer)
    return None

  def config(self) -> PrefixConfig | None:
    """The configuration; its tensors are noted."""
    if not self.found:
      return None
    first, nodes = self.found[min(self.found)][0], [n for _, n, _ in self.found.values()]
    problem = lambda why: self.notes.problem(first, why)
    rates = {0.0 if n.dropout is None else _rate(n.dropout) for n in nodes}
    gated = {n.gate is not None for n in nodes}
    if len(rates) > 1 or len(gated) > 1:
      problem("layers' prefixes differ in dropout or gates")
      return None
    at = f"prefix_tuning.prefix_tunings.{self.name}.self_prefix"
    if self.mlp is not None:
      length, hidden = self.mlp.array("embedding").shape[0], self.mlp.array("w1").shape[1]
      put = lambda name, field: self.notes.put(f"{at}.{name}", np.asarray(field).T)
      self.notes.put(f"{at}.wte.weight", np.asarray(self.mlp.array("embedding")))
      put("control_trans.0.weight", self.mlp.array("w1"))
      put("control_trans.0.bias", self.mlp.array("b1"))
      put("control_trans.2.weight", self.mlp.array("w2"))
      put("control_trans.2.bias", self.mlp.array("b2"))
      shapes = {(length, *self.mlp.heads)}
    else:
      pairs = [
        tuple(at_layer(node.array(f), layer.index) for f in ("keys", "values"))
        for _, (_, node, layer) in sorted(self.found.items())
      ]
      shapes, hidden = {x.shape for pair in pairs for x in pair}, None
    c = self.model.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    if len({s[0] for s in shapes}) > 1 or {s[1:] for s in shapes} != {
      (heads, c.hidden_size // c.num_attention_heads)
    }:
      problem(f"prefixes of shapes {sorted(shapes)}, expected one length and {heads} heads")
      return None
    length = next(iter(shapes))[0]
    if self.mlp is None:
      table = np.stack([x for pair in pairs for x in pair], axis=1)  # (P, 2 layers, heads, width)
      self.notes.put(f"{at}.control_trans", table.reshape(-1))
    (is_gated,), name = gated, family(self.model).prefix
    for _, node, layer in self.found.values() if is_gated else ():
      gate = f"{(name or '').format(layer.number)}.prefix_gates.{self.name}"
      self.notes.put_gate(gate, node.gate, layer.index)
    return PrefixConfig(length, hidden, next(iter(rates)), is_gated, self.notes.left(self.found))


class Loras:
  """The LoRAs of params: one rank, alpha and dropout for all."""

  def __init__(self, model: Any, name: str, notes: Notes):
    self.model, self.name, self.notes = model, name, notes
    self.table = family(model).loras
    self.targets: dict[int, set[str]] = collections.defaultdict(set)
    self.options: dict[tuple[int, float, float, bool], str] = {}

  def add(self, path: str, node: Any) -> None:
    """Notes the LoRA on a leaf."""
    if isinstance(node.inner, LoraWeight | FusedLora):
      return self.notes.problem(path, "two LoRAs on one leaf")
    if isinstance(node.inner, Residual):
      return self.notes.problem(path, "a LoRA over a weight that lacks its start (pissa, olora)")
    fused = isinstance(node, FusedLora)
    targets = self._fused(path, node) if fused else self._plain(path, node)
    if not targets:
      return None
    gated = isinstance(node.scaling, Branch)
    if gated and not self.notes.gate(path, node.scaling):
      return None
    if node.dropout is not None and not isinstance(node.dropout, Dropout):
      return self.notes.problem(path, f"a dropout of {type(node.dropout).__name__}")
    for layer in layers_of(self.model, path):
      self.targets[layer.number] |= targets
      at = f"{torch_name(layer.path).removesuffix('.weight')}.loras.{self.name}"
      a, b = (at_layer(node.array(n), layer.index) for n in "ab")
      rank = a.shape[-1]
      a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)  # each (r, in) and (out, r), parts first
      self.notes.put(f"{at}.lora_A", a.reshape(-1, a.shape[-1]))
      self.notes.put(f"{at}.lora_B", b.reshape(-1, rank))
      if gated:
        self.notes.put_gate(f"{at}.gate", node.scaling, layer.index)
        alpha = float(rank)
      else:
        scaling = at_layer(node.scaling, layer.index)
        alpha = _shortest(float(scaling) * rank, scaling, rank)
      rate = 0.0 if node.dropout is None else _rate(node.dropout)
      self.options.setdefault((rank, alpha, rate, gated), path)
    return None

  def _fused(self, path: str, node: FusedLora) -> set[str]:
    # The product q, k, v of GPT-2 is the one that AdapterHub takes apart.
    known = self.model.config.model_type == "gpt2" and (node.parts, node.fused) == (3, 1)
    if known and list(node.chosen) == sorted(node.chosen):
      return {"qkv"[i] for i in node.chosen}
    self.notes.problem(
      path, "a LoRA on parts of a product, which AdapterHub has for GPT-2's c_attn"
    )
    return set()

  def _plain(self, path: str, node: LoraWeight) -> set[str]:
    module = path.rpartition("/")[0]
    joint = self.model.config.model_type == "gpt2"  # there q, k and v are one module
    for key, role in self.table.items():
      patterns = [e.pattern for e in self.model.roles.get(role, ())] or [role]
      if path.endswith("/kernel") and any(matches(p, module) for p in patterns):
        if joint and len(key) == 1:
          break
        if node.axes == "io:ir,ro":
          return {key}
    self.notes.problem(path, "AdapterHub puts no LoRA there")
    return set()

  def config(self) -> LoraConfig | None:
    """The configuration."""
    if not self.options:
      return None
    if len(self.options) > 1:
      several = {
        path: dict(zip(("rank", "alpha", "dropout", "gated"), o, strict=True))
        for o, path in self.options.items()
      }
      self.notes.problem(
        "LoRA", f"AdapterHub has one rank, alpha and dropout for all, not {several}"
      )
      return None
    kinds = {tuple(sorted(t, key=list(self.table).index)) for t in self.targets.values()}
    if len(kinds) > 1:
      self.notes.problem("LoRA", f"layers have other matrices adapted: {sorted(kinds)}")
      return None
    (rank, alpha, rate, gated), (targets,) = next(iter(self.options)), kinds
    alpha = int(alpha) if alpha == int(alpha) else alpha
    return LoraConfig(targets, rank, alpha, rate, gated, self.notes.left(self.targets))


def _rate(dropout: Dropout) -> float:
  rate = np.max(np.asarray(dropout.array("rate")))
  return _shortest(float(rate), rate)
