"""Modules that PEFT saves whole beside an adapter: a classifier's head, `modules_to_save`."""

import collections
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import materialize
from pelt_jax._node import strip
from pelt_jax._transform import box_names, like_box
from pelt_jax._walk import get_at
from pelt_jax.interop._factors import plain
from pelt_jax.interop._peft_files import Tensors
from pelt_jax.interop._places import Place, task_type
from pelt_jax.nodes import Guard, Tuned

HEADS = ("classifier", "score")  # PEFT saves these by itself for SEQ_CLS and TOKEN_CLS


def inside(module: str, parent: str) -> bool:
  """Whether a module is `parent` or lies in it."""
  return module == parent or module.startswith(f"{parent}.")


def unguarded(value: Any) -> Any:
  """What lies under the guards of a leaf."""
  while isinstance(value, Guard):
    value = value.base
  return value


def stored(value: Any) -> Any:
  """The array that a leaf holds, trained or not, nodes of other kinds left in place."""
  value = unguarded(value)
  return plain(value.value) if isinstance(value, Tuned) else plain(value)


def torch_array(value: Any, place: Place) -> np.ndarray:
  """One layer of a leaf's plain array, as torch keeps it."""
  value = materialize(value)
  value = np.asarray(value if place.layer is None else value[place.layer])
  return value.T if place.transposed else value


def heads(model: Any, places: Iterable[Place]) -> tuple[str, ...]:
  """The heads that PEFT saves by itself for the model's task."""
  if task_type(model) not in ("SEQ_CLS", "TOKEN_CLS"):
    return ()
  modules = {p.module for p in places}
  return tuple(h for h in HEADS if any(inside(m, h) for m in modules))


def modules_to_save(
  places: Collection[Place], trained: set[str], adapted: set[str], head: tuple[str, ...]
) -> tuple[list[str], list[str]]:
  """The modules to save whole, and what stands in the way.

  Args:
    places: all tensors.
    trained: modules with a trained leaf.
    adapted: modules that hold another change.
    head: those that PEFT saves by itself.
  """
  names = {p.module for p in places}
  found, problems = set(head), []
  for module in sorted(trained):
    if any(inside(module, h) for h in head):
      continue
    below = [m for m in names if inside(m, module)]
    if module in adapted or any(m != module for m in below) or not module:
      problems.append(
        f"{module or 'the root'}: trained leaves beside adapted or other modules inside it"
      )
    else:
      found.add(module)
  for module in sorted(found):  # PEFT looks for any module whose name ends so
    if clash := [n for n in names if n.endswith(module) and not inside(n, module)]:
      problems.append(f"{module}: as a module to save PEFT would also take {clash[0]}")
  return sorted(found), problems


def saver(modules: Iterable[str], module: str) -> str | None:
  """The entry of `modules_to_save` that saves a module, or one that contains it."""
  parts = module.split(".")
  parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
  return next((e for e in modules if any(p.endswith(e) for p in parents)), None)


def absent(modules: Iterable[str], used: Collection[str | None]) -> list[str]:
  """Entries of `modules_to_save` that name nothing in the base.

  PEFT lists both names of classification heads, of which a model has one.
  """
  left = sorted(set(modules) - set(used) - set(HEADS))
  return [f"modules_to_save: no module {name!r} in the base" for name in left]


def read_leaf(tensors: Tensors, name: str, place: Place) -> np.ndarray:
  """A whole leaf's tensor, as our leaf lies."""
  value = tensors.read(name, place.shape[::-1] if place.transposed else place.shape)
  return value.T if place.transposed else value


def read_saved(
  tensors: Tensors, places: Iterable[Place], modules: Iterable[str], prefix: str
) -> tuple[dict[Place, np.ndarray], list[str]]:
  """The leaves of the modules saved whole, and what the file or the base lacks of them."""
  modules, whole, missing, used = list(modules), {}, [], set()
  for place in places:
    if (entry := saver(modules, place.module)) is None:
      continue
    used.add(entry)
    name = prefix + place.tensor
    if name in tensors.entries:
      whole[place] = read_leaf(tensors, name, place)
    else:
      missing.append(name)
  return whole, [*missing, *absent(modules, used)]


def tuned_leaves(base: Mapping, whole: Mapping[Place, np.ndarray]) -> dict[str, Tuned]:
  """The trained leaves, by path; layers of a scan that the file lacks keep the base's values."""
  by_path: dict[str, dict[int | None, np.ndarray]] = collections.defaultdict(dict)
  for place, value in whole.items():
    by_path[place.path][place.layer] = value
  nodes = {}
  for path, layers in by_path.items():
    leaf = get_at(base, path)
    below = strip(materialize(leaf))
    if None in layers:
      value = layers[None]
    else:
      kept = np.asarray(below) if len(layers) < below.shape[0] else layers
      value = np.stack([layers.get(i, kept[i]) for i in range(below.shape[0])])
    value = jnp.asarray(value, below.dtype)
    lead = 0 if None in layers else 1
    nodes[path] = Tuned(like_box(leaf, value, box_names(leaf, value.ndim)), stacked=lead)
  return nodes
