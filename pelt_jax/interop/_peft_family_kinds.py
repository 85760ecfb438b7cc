"""IA3, VeRA, LoHa, LoKr, MiSS and HiRA: names, shapes and options of one matrix in PEFT's files."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from pelt_jax._node import GENERATORS
from pelt_jax._walk import get_at
from pelt_jax.interop._peft_family_adalora import Adalora
from pelt_jax.interop._peft_family_kind import Arrays, FamilyConfig, Kind, alphas, layer_of
from pelt_jax.interop._places import TABLE, Place
from pelt_jax.methods._lokr import lokr_shapes
from pelt_jax.nodes import (
  BatWeight,
  HiraWeight,
  LohaWeight,
  LokrWeight,
  MissWeight,
  ScaledWeight,
  SharedScales,
  VeraPair,
  VeraWeight,
)


class Ia3(Kind):
  peft_type = "IA3"
  title = "IA3"
  nodes = (ScaledWeight,)
  fields: ClassVar[Mapping[str, str]] = {"ia3_l": "scale"}
  known = frozenset({"feedforward_modules", "init_ia3_weights"})

  def tensors(self, node: Any, place: Place) -> Arrays:
    scale = layer_of(node, "scale", place).reshape(-1, 1)
    return {"ia3_l": scale.T if _at_inputs(node) else scale}

  def options(self, at: Mapping[Place, Any]) -> dict[str, Any]:
    inner = sorted(p.module for p, node in at.items() if _at_inputs(node))
    return {"feedforward_modules": inner, "init_ia3_weights": True}

  def shapes(self, config: FamilyConfig, place: Place) -> dict[str, tuple[int, ...]]:
    inner = _is_inner(config, place)
    return {"ia3_l": (1, place.shape[0]) if inner else (place.shape[1], 1)}

  def turned(self, value: np.ndarray) -> np.ndarray:
    return value.reshape(-1)

  def node(
    self, config: FamilyConfig, places: list[Place], leaf: Any, arrays: Arrays, more: dict
  ) -> Any:
    inner = {_is_inner(config, p) for p in places}
    if len(inner) > 1:
      raise ValueError(f"feedforward_modules names {places[0].path} in some of its layers only")
    more["axes"] = "io:i" if inner.pop() else "io:o"
    return ScaledWeight(leaf, **arrays, **more)

  def beside(self, config: FamilyConfig, tensors: Any, base: Mapping, nodes: Mapping) -> dict:
    name, found = "000_ia3", {}
    for path, node in nodes.items():
      bias = f"{path.rpartition('/')[0]}/bias"
      if not _at_inputs(node) and (leaf := get_at(base, bias)) is not None:
        found[path] = node.replace(shared=name)
        found[bias] = ScaledWeight(leaf, None, "o:o", shared=name, stacked=node.stacked)
    return found | ({f"{GENERATORS}/{name}": SharedScales(name=name)} if found else {})


def _at_inputs(node: ScaledWeight) -> bool:
  return node.axes == "io:i"


def _is_inner(config: FamilyConfig, place: Place) -> bool:
  """PEFT's rule: a regular expression for the whole name, or its ending, dot or no dot."""
  inner = config.raw.get("feedforward_modules") or ()
  if isinstance(inner, str):
    return re.fullmatch(inner, place.module) is not None
  return any(place.module.endswith(name) for name in inner)


class Vera(Kind):
  peft_type = "VERA"
  title = "VeRA"
  nodes = (VeraWeight,)
  fields: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}
  rank = 256
  known = frozenset({"d_initial", "projection_prng_key", "save_projection", "vera_dropout", "bias"})
  rate = "vera_dropout"

  def rank_of(self, node: Any) -> int:
    return node.array("lambda_d").shape[-1]

  def shared(self, at: Mapping[Place, Any], params: Mapping) -> Arrays:
    pairs = {node.pair for node in at.values()}
    if len(pairs) > 1:
      raise ValueError(f"its matrices have several pairs {sorted(pairs)}, PEFT has one")
    pair = params[GENERATORS][pairs.pop()]
    n_in, n_out = (max(p.shape[i] for p in at) for i in (0, 1))
    a, b = np.asarray(pair.array("a"))[:n_in], np.asarray(pair.array("b"))[:, :n_out]
    return dict(zip(self.names(), (a.T, b.T), strict=True))

  def options(self, at: Mapping[Place, Any]) -> dict[str, Any]:
    return {**super().options(at), "save_projection": True, "bias": "none"}

  def shapes(self, config: FamilyConfig, place: Place) -> dict[str, tuple[int, ...]]:
    return {"vera_lambda_b": place.shape[1:], "vera_lambda_d": (config.rank(place.module),)}

  def node(
    self, config: FamilyConfig, places: list[Place], leaf: Any, arrays: Arrays, more: dict
  ) -> Any:
    return VeraWeight(leaf, **arrays, pair="000_vera", inputs=places[0].shape[0], **more)

  def beside(self, config: FamilyConfig, tensors: Any, base: Mapping, nodes: Mapping) -> dict:
    if gone := [name for name in self.names() if name not in tensors.entries]:
      raise ValueError(
        f"{tensors.file} lacks {gone}, the random matrices between the vectors, which only torch "
        "can draw again: save the adapter with save_projection=True"
      )
    rank = config.rank("")
    n_in = max(node.inputs for node in nodes.values())
    n_out = max(node.array("lambda_b").shape[-1] for node in nodes.values())
    expected = dict(zip(self.names(), ((rank, n_in), (n_out, rank)), strict=True))
    a, b = (jnp.asarray(tensors.read(name, shape).T) for name, shape in expected.items())
    return {f"{GENERATORS}/000_vera": VeraPair(a, b, name="000_vera")}

  def names(self) -> tuple[str, ...]:
    return "base_model.vera_A", "base_model.vera_B"


class Loha(Kind):
  peft_type = "LOHA"
  title = "LoHa"
  nodes = (LohaWeight,)
  fields: ClassVar[Mapping[str, str]] = {
    "hada_w1_b": "a1",
    "hada_w1_a": "b1",
    "hada_w2_b": "a2",
    "hada_w2_a": "b2",
  }
  known = frozenset({"alpha", "alpha_pattern", "use_effective_conv2d"})
  training = ("rank_dropout", "module_dropout")
  conv = False
  patterns = True

  def rank_of(self, node: Any) -> int:
    return node.array("a1").shape[-1]

  def options(self, at: Mapping[Place, Any]) -> dict[str, Any]:
    return super().options(at) | alphas(at, {p: self.rank_of(node) for p, node in at.items()})

  def shapes(self, config: FamilyConfig, place: Place) -> dict[str, tuple[int, ...]]:
    rank, (n_in, n_out) = config.rank(place.module), place.shape
    sides = {"a": (n_out, rank), "b": (rank, n_in)}
    return {f"hada_w{i}_{side}": shape for i in (1, 2) for side, shape in sides.items()}


class Lokr(Kind):
  peft_type = "LOKR"
  title = "LoKr"
  nodes = (LokrWeight,)
  fields: ClassVar[Mapping[str, str]] = {
    "lokr_w1": "w1",
    "lokr_w1_b": "w1_a",
    "lokr_w1_a": "w1_b",
    "lokr_w2": "w2",
    "lokr_w2_b": "w2_a",
    "lokr_w2_a": "w2_b",
  }
  known = Loha.known | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
  training = ("rank_dropout", "module_dropout")
  conv = False
  patterns = True

  def options(self, at: Mapping[Place, Any]) -> dict[str, Any]:
    cut = {p: {f: node.array(f).shape[-2:] for f in _held(node)} for p, node in at.items()}
    both = any("w1_a" in shapes for shapes in cut.values())
    sides = (("w1", 0), ("w1", 1), ("w1_a", 0), ("w1_b", 1))
    firsts = {shapes[f][i] for shapes in cut.values() for f, i in sides if f in shapes}
    inner = sorted({rank for shapes in cut.values() if (rank := _inner(shapes)) is not None})
    for factor in (-1, *sorted(firsts)):
      found = {p: _rank_of(p.shape, s, factor, both, inner) for p, s in cut.items()}
      ranks = {p: rank for p, rank in found.items() if rank is not None}
      if len(ranks) == len(at):
        more = {"decompose_both": both, "decompose_factor": factor}
        return self.ranked(ranks) | alphas(at, ranks) | more
    raise ValueError("its matrices are cut in ways that no single decompose_factor gives")

  def shapes(self, config: FamilyConfig, place: Place) -> dict[str, tuple[int, ...]]:
    factor = config.raw.get("decompose_factor", -1)
    both = bool(config.raw.get("decompose_both"))
    n_in, n_out = place.shape
    ours = lokr_shapes(n_in, n_out, config.rank(place.module), factor, both)
    return {suffix: ours[f][::-1] for suffix, f in self.fields.items() if f in ours}


def _held(node: LokrWeight) -> list[str]:
  return [f for f in Lokr.fields.values() if getattr(node, f) is not None]


def _inner(cut: Mapping[str, tuple[int, ...]]) -> int | None:
  """The rank of what is decomposed, None where nothing is."""
  return next((cut[f][1] for f in ("w2_a", "w1_a") if f in cut), None)


def _rank_of(
  size: tuple[int, ...], cut: Mapping, factor: int, both: bool, others: list[int]
) -> int | None:
  """A rank for which PEFT cuts a matrix so; where nothing is decomposed, another one serves."""
  own = _inner(cut)
  tries = [*others, max(size)] if own is None else [own]
  fits = (r for r in tries if lokr_shapes(size[0], size[1], r, factor, both) == cut)
  return next(fits, None)


class Miss(Kind):
  peft_type = "MISS"
  title = "MiSS"
  nodes = (MissWeight, BatWeight)
  fields: ClassVar[Mapping[str, str]] = {"miss_block": "block"}
  rank = 64
  known = frozenset({"mini_r", "miss_dropout", "bias"})
  rate = "miss_dropout"
  conv = False

  def problems(self, raw: Mapping[str, Any]) -> list[str]:
    kind = raw.get("init_weights", True)
    odd = [] if kind in (True, False, "bat", "mini") else [f"init_weights={kind!r}: unknown"]
    return super().problems(raw) + odd

  def tensors(self, node: Any, place: Place) -> Arrays:
    field = "blocks" if _is_bat(node) else "block"
    return {"miss_block": layer_of(node, field, place)}

  def rank_of(self, node: Any) -> int:
    return node.array("blocks").shape[-1] if _is_bat(node) else node.array("block").shape[-2]

  def options(self, at: Mapping[Place, Any]) -> dict[str, Any]:
    if len({type(node) for node in at.values()}) > 1:
      raise ValueError("some matrices are of kind 'bat' and others not, PEFT has one kind")
    found = {**super().options(at), "bias": "none"}
    if _is_bat(next(iter(at.values()))):
      return {**found, "init_weights": "bat"}
    widths = {p: node.array("block").shape[-1] for p, node in at.items()}
    if all(width == p.shape[1] for p, width in widths.items()):
      return {**found, "init_weights": True}
    if len(set(widths.values())) > 1:
      raise ValueError(f"its blocks are {sorted(set(widths.values()))} wide, PEFT has one mini_r")
    return {**found, "init_weights": "mini", "mini_r": next(iter(widths.values()))}

  def shapes(self, config: FamilyConfig, place: Place) -> dict[str, tuple[int, ...]]:
    rank, kind = config.rank(place.module), config.raw.get("init_weights", True)
    if kind == "bat":
      return {"miss_block": (place.shape[1] // rank, rank, rank)}
    width = int(config.raw.get("mini_r", 1)) if kind == "mini" else place.shape[1]
    return {"miss_block": (rank, width)}

  def turned(self, value: np.ndarray) -> np.ndarray:
    return value

  def node(
    self, config: FamilyConfig, places: list[Place], leaf: Any, arrays: Arrays, more: dict
  ) -> Any:
    if config.raw.get("init_weights") != "bat":
      return MissWeight(leaf, **arrays, **more)
    return BatWeight(leaf, blocks=arrays["block"], **{**more, "dropout": None})


def _is_bat(node: Any) -> bool:
  return isinstance(node, BatWeight)


class Hira(Kind):
  peft_type = "HIRA"
  title = "HiRA"
  nodes = (HiraWeight,)
  fields: ClassVar[Mapping[str, str]] = {"hira_A": "a", "hira_B": "b"}
  rank = 32
  known = frozenset({"hira_dropout"})
  rate = "hira_dropout"
  tables = True

  def rank_of(self, node: Any) -> int:
    return node.array("a").shape[-1]

  def fields_of(self, place: Place) -> Mapping[str, str]:
    if place.leaf != TABLE:
      return self.fields
    return {"hira_embedding_A": "a", "hira_embedding_B": "b"}

  def shapes(self, config: FamilyConfig, place: Place) -> dict[str, tuple[int, ...]]:
    rank, (n_in, n_out) = config.rank(place.module), place.shape
    return dict(zip(self.fields_of(place), ((rank, n_in), (n_out, rank)), strict=True))


_ALL = (Adalora(), Ia3(), Vera(), Loha(), Lokr(), Miss(), Hira())
KINDS = {kind.peft_type: kind for kind in _ALL}
