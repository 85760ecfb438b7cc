"""Reading LoRA folders that PEFT wrote."""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pelt_jax._transform import box_names, like_box
from pelt_jax._walk import get_at, update_at
from pelt_jax.interop._peft_files import CONFIG, Tensors, complain
from pelt_jax.interop._peft_lora_config import Config
from pelt_jax.interop._peft_lora_export import PREFIX
from pelt_jax.interop._peft_saved import absent, read_leaf, saver, tuned_leaves
from pelt_jax.interop._places import LINEAR, TABLE, Place, is_copied, is_tied, is_tokens, places
from pelt_jax.nodes import Dropout, LoraWeight

_FACTOR = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_(embedding_)?([AB])(?:\.weight)?")
# Copies PEFT writes beside what counts: the frozen table of an adapted one, the biases of a saved
# module as they were.
_COPIES = re.compile(r".+\.(base_layer\.weight|original_module\..+|modules_to_save\..+)")

_TIED_HEAD = Place("lm_head/kernel", None, "lm_head", "weight", ())


class _Pair(NamedTuple):
  """One LoRA in our orientation: a ([experts], in, r), b ([experts], r, out)."""

  a: np.ndarray
  b: np.ndarray
  scaling: float
  axes: str


def load_lora(
  folder: pathlib.Path,
  raw: dict[str, Any],
  model: Any,
  base: Mapping,
  *,
  strict: bool,
  parameter_order: Sequence[str],
  transposed: Mapping[str, bool],
) -> dict:
  """Params with the nodes of a LoRA folder; see `load`."""
  config = Config(raw, folder / CONFIG, strict)
  reader = _Reader(folder, config, model, base, tuple(parameter_order), dict(transposed))
  reader.read()
  file = reader.tensors.file
  complain(reader.missing, f"{file} lacks tensors", strict)
  complain(reader.unexpected, f"{file} has unexpected tensors", strict)
  complain(config.idle(reader.adapted), f"{folder / CONFIG}: no adapted module fits", strict)
  return update_at(base, {**reader.loras(), **tuned_leaves(base, reader.whole)})


class _Reader:
  """Assigns the tensors of a file to the leaves of a base."""

  def __init__(
    self,
    folder: pathlib.Path,
    config: Config,
    model: Any,
    base: Mapping,
    order: tuple[str, ...],
    transposed: dict[str, bool],
  ):
    self.config, self.model, self.base = config, model, base
    self.order, self.transposed = order, transposed
    self.places = places(model, base)
    self.is_tied = is_tied(model, base)
    self.tensors = Tensors(folder)
    self.missing: list[str] = []
    self.unexpected: list[str] = []
    self.adapted: list[str] = []  # what patterns of ranks and alphas are held against
    self.pairs: dict[Place, _Pair] = {}
    self.whole: dict[Place, np.ndarray] = {}

  def read(self) -> None:
    factors: dict[str, dict[int, dict[str, str]]] = collections.defaultdict(dict)
    plain: dict[str, str] = {}
    for key in self.tensors.entries:
      name = key.removeprefix(PREFIX)
      if not key.startswith(PREFIX):
        self.unexpected.append(key)
      elif found := _FACTOR.fullmatch(name):
        module, depth, _, side = found.groups()
        factors[module].setdefault(depth.count("."), {})[side] = key
      elif not _COPIES.fullmatch(name):
        plain[name.replace(".base_layer.", ".")] = key
    self._read_modules(factors)
    self._read_parameters(factors)
    self._read_whole(plain)
    left = [
      key for depths in factors.values() for sides in depths.values() for key in sides.values()
    ]
    hint = "; this model's head is its table" if self.is_tied else ""
    self.unexpected += [f"{k}{hint if '.lm_head.' in k else ''}" for k in (*left, *plain.values())]

  def _read_modules(self, factors: dict) -> None:
    targets = self.config.raw.get("target_modules")
    hits = 0
    for place in self.places.values():
      if place.leaf not in (LINEAR, TABLE) or not self.config.targets(place):
        continue
      hits += 1
      if is_copied(self.model, place):
        raise ValueError(
          f"{self.tensors.file}: {place.module} is adapted, which torch's encoder and decoder read "
          "under names of their own; here it is one table"
        )
      keys = factors.get(place.module, {}).pop(0, {})
      if self.is_tied and is_tokens(self.model, place):
        self._check_pair_of_head(place, keys, factors.pop("lm_head", {}).get(0, {}))
      pair = self._pair(place, keys, place.shape)
      if pair is not None:
        self.pairs[place] = _Pair(
          pair[0].T, pair[1].T, self.config.scaling(place.module), "io:ir,ro"
        )
    if targets and not hits:
      raise ValueError(f"target_modules={targets!r} names no module of {type(self.model).__name__}")

  def _check_pair_of_head(self, place: Place, table: dict[str, str], head: dict[str, str]) -> None:
    """Here the head reads the table itself, so its change in the file must be the table's."""
    self.adapted.append("lm_head")
    there = self.config.targets(_TIED_HEAD) and set(table) == set(head) == {"A", "B"}
    same = there and all(self._equal(head[a], table[b], True) for a, b in ("AB", "BA"))
    if self.config.scaling("lm_head") != self.config.scaling(place.module):
      same = False
    elif self.config.tied:
      same = True
    self._check_head(place, same)

  def _check_head(self, place: Place, same: bool) -> None:
    if not same:
      raise ValueError(
        f"{self.tensors.file}: {place.module} is changed for lookups alone, or otherwise than the "
        "head; in this model both are one table: make the adapter with ensure_weight_tying=True"
      )

  def _equal(self, one: str, other: str, transposed: bool = False) -> bool:
    a, b = (np.asarray(self.tensors.entries[k].read()) for k in (one, other))
    return np.array_equal(a.T if transposed else a, b)

  def _pair(self, place: Place, keys: dict[str, str], shape: tuple[int, ...], times: int = 1):
    """A and B as stored, after their shapes were checked; None if they are missing."""
    table = place.leaf == TABLE
    name = place.module if place.leaf in (LINEAR, TABLE) else place.tensor
    self.adapted.append(name)
    ends = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    gone = [f"{PREFIX}{place.module}.{e}" for e, s in zip(ends, "AB", strict=True) if s not in keys]
    if gone:
      self.missing += gone
      return None
    rank = self.config.rank(name) * times
    expected = {"A": (rank, shape[0]), "B": (shape[1], rank)}
    return tuple(self.tensors.read(keys[s], expected[s]) for s in "AB")

  def _read_parameters(self, factors: dict) -> None:
    beside = collections.defaultdict(list)
    for place in self.places.values():
      if place.leaf not in (LINEAR, TABLE) and self.config.targets_parameter(place):
        beside[place.module].append(place)
    for module, at in beside.items():
      if len(at) > 1 and (unknown := [p.name for p in at if p.name not in self.order]):
        raise ValueError(
          f"several parameters of {module} are adapted; parameter_order must name {unknown} in the "
          "order in which the torch module registers them"
        )
      at.sort(key=lambda p: self.order.index(p.name) if p.name in self.order else 0)
      for i, place in enumerate(at):
        keys = factors.get(module, {}).pop(len(at) - 1 - i, {})
        self._parameter(place, keys)

  def _parameter(self, place: Place, keys: dict[str, str]) -> None:
    if len(place.shape) not in (2, 3):
      raise ValueError(f"{place.tensor} has {len(place.shape)} axes; LoRA needs 2, or 3 of experts")
    experts = place.shape[0] if len(place.shape) == 3 else 1
    one, two = place.shape[-2:]
    in_first = len(place.shape) == 3 and self._in_first(place, keys, one, two)
    shape = (one, two) if in_first else (two, one)
    pair = self._pair(place, keys, shape, times=experts)
    if pair is None:
      return
    a, b = pair
    scaling = self.config.scaling(place.tensor)
    if len(place.shape) == 2:
      self.pairs[place] = _Pair(a.T, b.T, scaling, "oi:ir,ro")
      return
    rank = a.shape[0] // experts
    a = np.swapaxes(a.reshape(experts, rank, -1), 1, 2)
    b = b.reshape(-1, rank, experts).transpose(2, 1, 0)
    axes = "eio:eir,ero" if in_first else "eoi:eir,ero"
    self.pairs[place] = _Pair(a, b, scaling, axes)

  def _in_first(self, place: Place, keys: dict[str, str], one: int, two: int) -> bool:
    said = [v for k, v in self.transposed.items() if f".{place.tensor}".endswith(f".{k}")]
    if said:
      return said[0]
    if one == two:
      raise ValueError(
        f"{place.tensor} of shape {place.shape}: shapes do not tell whether torch's module says "
        f"is_transposed; pass transposed={{{place.name!r}: True or False}}"
      )
    return "A" in keys and self.tensors.entries[keys["A"]].shape[1] == one

  def _read_whole(self, plain: dict[str, str]) -> None:
    """Trained leaves: saved modules, and biases."""
    used = set()
    adapted = {p.module for p in self.pairs}
    for place in self.places.values():
      entry = saver(self.config.modules_to_save, place.module)
      mode = self.config.bias
      bias = place.name == "bias" and (
        mode == "all" or (mode == "lora_only" and place.module in adapted)
      )
      if entry is None and not bias:
        continue
      used.add(entry)
      key = plain.pop(place.tensor, None)
      if key is None:
        self.missing.append(PREFIX + place.tensor)
        continue
      if self.is_tied and is_tokens(self.model, place):
        head = plain.pop("lm_head.weight", None)
        named = saver(self.config.modules_to_save, "lm_head") is not None
        same = named and head is not None and self._equal(head, key)
        self._check_head(place, same or self.config.tied)
        used.add("lm_head")
      self.whole[place] = read_leaf(self.tensors, key, place)
    self.missing += absent(self.config.modules_to_save, used)

  def loras(self) -> dict[str, LoraWeight]:
    """The LoRA nodes, by path."""
    by_path: dict[str, dict[int | None, _Pair]] = collections.defaultdict(dict)
    for place, pair in self.pairs.items():
      by_path[place.path][place.layer] = pair
    return {path: self._node(path, pairs) for path, pairs in by_path.items()}

  def _node(self, path: str, pairs: dict[int | None, _Pair]) -> LoraWeight:
    leaf = get_at(self.base, path)
    axes = next(iter(pairs.values())).axes
    if None in pairs:
      a, b, scaling = pairs[None].a, pairs[None].b, pairs[None].scaling
      layer = None
    else:
      a, b, scaling = _stacked(pairs, leaf.shape[0])
      layer = jnp.arange(leaf.shape[0], dtype=jnp.float32)
    wide = np.promote_types(a.dtype, jnp.float32)
    rate = self.config.dropout if path.endswith(f"/{LINEAR}") else 0.0
    lead = () if layer is None else (leaf.shape[0],)
    dropout = Dropout(jnp.full(lead, rate, wide), layer, stacked=len(lead)) if rate else None
    names = dict(zip(axes.partition(":")[0], box_names(leaf, leaf.ndim)[len(lead) :], strict=True))
    factor_axes = axes.partition(":")[2].split(",")
    boxed_a, boxed_b = (
      like_box(leaf, jnp.asarray(x), (*[None] * len(lead), *map(names.get, letters)))
      for x, letters in zip((a, b), factor_axes, strict=True)
    )
    return LoraWeight(
      leaf, boxed_a, boxed_b, jnp.asarray(scaling, wide), dropout, axes=axes, stacked=len(lead)
    )


def _stacked(pairs: dict, length: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
  """One array for all layers, zeros where a layer has a lower rank or no pair at all."""
  some = next(iter(pairs.values()))
  rank = max(p.a.shape[-1] for p in pairs.values())
  a = np.zeros((length, *some.a.shape[:-1], rank), some.a.dtype)
  b = np.zeros((length, *some.b.shape[:-2], rank, some.b.shape[-1]), some.b.dtype)
  scaling = [1.0] * length
  for i, pair in pairs.items():
    a[i, ..., : pair.a.shape[-1]] = pair.a
    b[i, ..., : pair.b.shape[-2], :] = pair.b
    scaling[i] = pair.scaling
  return a, b, scaling
