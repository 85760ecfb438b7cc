"""Reading PEFT's folders of methods beside LoRA that change matrices."""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pelt_jax._transform import like_box
from pelt_jax._walk import get_at, update_at
from pelt_jax.interop._peft_family_kind import FamilyConfig, Kind
from pelt_jax.interop._peft_family_kinds import KINDS, Ia3
from pelt_jax.interop._peft_files import COMMON, CONFIG, Tensors, complain
from pelt_jax.interop._peft_lora_export import PREFIX
from pelt_jax.interop._peft_lora_load import _COPIES
from pelt_jax.interop._peft_saved import read_saved, tuned_leaves
from pelt_jax.interop._places import LINEAR, TABLE, Place, is_copied, is_tied, is_tokens, places
from pelt_jax.nodes import Dropout

_SHARED = COMMON | {
  "r",
  "target_modules",
  "exclude_modules",
  "layers_to_transform",
  "layers_pattern",
  "rank_pattern",
  "modules_to_save",
  "init_weights",
  "fan_in_fan_out",  # nothing to read from it: orientation is the base module's
}


def load_family(
  folder: pathlib.Path, raw: dict[str, Any], model: Any, base: Mapping, *, strict: bool
) -> dict:
  """Params with the nodes of a folder; see `load`."""
  kind = KINDS[raw["peft_type"]]
  file = folder / CONFIG
  if problems := kind.problems(raw):
    raise ValueError(f"{file} sets what cannot be read:\n  " + "\n  ".join(problems))
  config = FamilyConfig(kind, raw)
  unknown = sorted(set(raw) - _SHARED - kind.known - set(kind.training))
  complain(unknown, f"{file} has unknown fields that may change the function", strict)
  idle = [f"{name}={raw[name]!r}" for name in kind.training if raw.get(name)]
  complain(idle, f"{file} sets what acts in training and is not read", strict)
  tensors = Tensors(folder)
  at = list(places(model, base).values())
  tied = {p for p in at if (is_tied(model, base) and is_tokens(model, p)) or is_copied(model, p)}
  found, missing = _read(kind, config, tensors, at, tied)
  complain(config.idle([p.module for p in found]), f"{file}: no adapted module fits", strict)
  whole, gone = read_saved(tensors, at, config.modules_to_save, PREFIX)
  if odd := [p.module for p in whole if p in tied]:
    raise ValueError(f"{tensors.file} saves {odd}, which torch holds under several names")
  complain([*missing, *gone], f"{tensors.file} lacks tensors", strict)
  read = {f"{PREFIX}{p.module}.{suffix}" for p, some in found.items() for suffix in some}
  read |= {PREFIX + p.tensor for p in whole} | set(kind.names())
  left = sorted(n for n in set(tensors.entries) - read if not _COPIES.fullmatch(n))
  complain(left, f"{tensors.file} has unexpected tensors", strict)
  nodes = _nodes(kind, config, base, found)
  more = kind.beside(config, tensors, base, nodes)
  return update_at(base, {**nodes, **more, **tuned_leaves(base, whole)})


def _read(
  kind: Kind, config: FamilyConfig, tensors: Tensors, at: list[Place], tied: set[Place]
) -> tuple[dict[Place, dict[str, np.ndarray]], list[str]]:
  """Tensors by place and suffix, and the names of those that the file lacks."""
  found: dict[Place, dict[str, np.ndarray]] = {}
  missing: list[str] = []
  targets = [p for p in at if p.leaf in (LINEAR, TABLE) and config.targets(p)]
  if not targets:
    named = config.raw.get("target_modules")
    raise ValueError(f"target_modules={named!r} names no module of the base")
  for place in targets:
    if place in tied:
      raise ValueError(
        f"{tensors.file}: {place.module} is changed, which torch holds under several names; here "
        "it is one table"
      )
    if place.leaf == TABLE and not kind.tables:
      raise ValueError(f"{tensors.file}: {kind.title} changes no table, such as {place.module}")
    shapes = kind.shapes(config, place)
    names = {suffix: f"{PREFIX}{place.module}.{suffix}" for suffix in shapes}
    gone = [name for name in names.values() if name not in tensors.entries]
    missing += gone
    if not gone:
      found[place] = {s: tensors.read(name, shapes[s]) for s, name in names.items()}
  return found, missing


def _nodes(
  kind: Kind,
  config: FamilyConfig,
  base: Mapping,
  found: Mapping[Place, dict[str, np.ndarray]],
) -> dict[str, Any]:
  """The nodes by path, layers of a scan stacked."""
  by_path: dict[str, list[Place]] = collections.defaultdict(list)
  for place in found:
    by_path[place.path].append(place)
  nodes = {}
  for path, layers in by_path.items():
    leaf = get_at(base, path)
    scanned = layers[0].layer is not None
    length = leaf.shape[0] if scanned else 1
    if len(layers) != length:
      raise ValueError(
        f"{path}: the file changes layers {[p.layer for p in layers]} of {length}, which are "
        "stacked; load the base with scan=False"
      )
    arrays = {}
    for suffix, field in kind.fields_of(layers[0]).items():
      some = [kind.turned(found[p][suffix]) for p in layers if suffix in found[p]]
      if not some:
        continue
      if len(some) < length or len({x.shape for x in some}) > 1:
        raise ValueError(
          f"{path}: layers have ranks of their own, which stacked layers cannot; load the base "
          "with scan=False"
        )
      value = jnp.asarray(np.stack(some) if scanned else some[0])
      arrays[field] = like_box(leaf, value, (None,) * value.ndim)
    more: dict[str, Any] = {"stacked": int(scanned)}
    if not isinstance(kind, Ia3):
      more["dropout"] = _dropout(config, layers[0], length if scanned else None)
    nodes[path] = kind.node(config, layers, leaf, arrays, more)
  return nodes


def _dropout(config: FamilyConfig, place: Place, length: int | None) -> Dropout | None:
  if not config.dropout or place.leaf != LINEAR:
    return None
  if length is None:
    return Dropout(jnp.float32(config.dropout), None)
  layer = jnp.arange(length, dtype=jnp.float32)
  return Dropout(jnp.full((length,), config.dropout, jnp.float32), layer, stacked=1)
