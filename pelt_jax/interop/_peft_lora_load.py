"""Reading LoRA folders that PEFT wrote."""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pelt_jax._node import Weight
from pelt_jax._walk import get_at, update_at
from pelt_jax.interop._peft_files import CONFIG, Tensors, complain
from pelt_jax.interop._peft_lora_config import Config
from pelt_jax.interop._peft_lora_export import PREFIX
from pelt_jax.interop._peft_lora_nodes import Pair, lora_node
from pelt_jax.interop._peft_saved import absent, read_leaf, saver, tuned_leaves
from pelt_jax.interop._places import LINEAR, TABLE, Place, is_copied, is_tied, is_tokens, places

_FACTOR = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_(embedding_)?([AB])(?:\.weight)?")
MAGNITUDE = "lora_magnitude_vector"
_MAGNITUDE = re.compile(rf"(.+)\.{MAGNITUDE}(?:\.weight)?")
# Copies PEFT writes beside what counts: the frozen table of an adapted one, the biases of a saved
# module as they were.
_COPIES = re.compile(r".+\.(base_layer\.weight|original_module\..+|modules_to_save\..+)")

_TIED_HEAD = Place("lm_head/kernel", None, "lm_head", "weight", ())


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
    self.pairs: dict[Place, Pair] = {}
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
      elif self.config.dora and (found := _MAGNITUDE.fullmatch(name)):
        factors[found[1]].setdefault(0, {})[MAGNITUDE] = key
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
        found = self._magnitude(place, keys)
        scaling = self.config.scaling(place.module)
        self.pairs[place] = Pair(pair[0].T, pair[1].T, scaling, "io:ir,ro", found)
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

  def _magnitude(self, place: Place, keys: dict[str, str]) -> np.ndarray | None:
    if not self.config.dora:
      return None
    if self.is_tied and is_tokens(self.model, place):
      raise ValueError(
        f"{self.tensors.file}: {place.module} and the head have magnitudes of their own; in this "
        "model both are one table"
      )
    if MAGNITUDE not in keys:
      self.missing.append(f"{PREFIX}{place.module}.{MAGNITUDE}")
      return None
    return self.tensors.read(keys[MAGNITUDE], place.shape[-1:])

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
      self.pairs[place] = Pair(a.T, b.T, scaling, "oi:ir,ro")
      return
    rank = a.shape[0] // experts
    a = np.swapaxes(a.reshape(experts, rank, -1), 1, 2)
    b = b.reshape(-1, rank, experts).transpose(2, 1, 0)
    axes = "eio:eir,ero" if in_first else "eoi:eir,ero"
    self.pairs[place] = Pair(a, b, scaling, axes)

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

  def loras(self) -> dict[str, Weight]:
    """The nodes, by path."""
    by_path: dict[str, dict[int | None, Pair]] = collections.defaultdict(dict)
    for place, pair in self.pairs.items():
      by_path[place.path][place.layer] = pair
    return {path: self._node(path, pairs) for path, pairs in by_path.items()}

  def _node(self, path: str, pairs: dict[int | None, Pair]) -> Weight:
    linear = path.endswith(f"/{LINEAR}")  # PEFT knows neither dropout nor starts of tables
    rate, start = (self.config.dropout, self.config.start) if linear else (0.0, None)
    try:
      return lora_node(get_at(self.base, path), pairs, rate, start)
    except ValueError as error:
      raise ValueError(f"{self.tensors.file}: {path}: {error}") from error
