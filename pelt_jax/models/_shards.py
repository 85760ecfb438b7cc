"""Parameters read in parts: each process takes from the files what its own devices hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from pelt_jax._walk import walk
from pelt_jax.models._layers import stacks

Index = tuple[slice, ...]
Read = Callable[..., Any]  # read() gives a tensor, read(index) a part of it


def read_shards(
  model: nn.Module,
  shapes: Mapping[str, Any],
  read: Mapping[str, Read],
  shardings: Callable[[nn.Module, Any], Any],
) -> dict[str, Any]:
  """The parameters, of which this process reads what its devices hold.

  Args:
    model: looped or scanned.
    shapes: its parameters' shapes.
    read: readers of the looped model's tensors, by path.
    shardings: as of `from_pretrained`.
  """
  out: dict[str, Any] = {}
  for path, get in shards(model, shapes, read, shardings).items():
    insert(out, path, get())
  return out


def shards(
  model: nn.Module,
  shapes: Mapping[str, Any],
  read: Mapping[str, Read],
  shardings: Callable[[nn.Module, Any], Any],
) -> dict[str, Callable[[], jax.Array]]:
  """Readers that give arrays on their devices, by path; see `read_shards`."""
  where = checked(shapes, shardings(model, shapes))
  found = {}
  for path, leaf in walk(shapes):
    names = looped_paths(model, path)
    reads = [read[name] for name in names]
    found[path] = lambda a=(leaf, reads, names != [path], where[path]): _array(*a)
  return found


def _array(leaf: Any, reads: Sequence[Read], stacked: bool, sharding: Any) -> jax.Array:
  known: dict[tuple, np.ndarray] = {}  # devices that hold the same share one read

  def part(index: Index | None) -> np.ndarray:
    assert index is not None
    key = tuple((s.start, s.stop) for s in index)
    if key not in known:
      if stacked:
        layers = reads[index[0]]
        known[key] = np.stack([read(index[1:]) for read in layers])
      else:
        known[key] = reads[0](index)
    return known[key]

  return jax.make_array_from_callback(leaf.shape, sharding, part)


def put(params: Any, model: nn.Module, shardings: Callable[[nn.Module, Any], Any]) -> Any:
  """Parameters that every process has whole, on their devices."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return jax.device_put(params, shardings(model, shapes))


def check_function(shardings: Any) -> None:
  """Raises TypeError unless that can be called as `shardings(model, shapes)`."""
  try:
    inspect.signature(shardings).bind(None, None)
  except TypeError as error:
    raise TypeError(
      f"shardings={shardings!r}: expected a function of (model, shapes) that gives a tree of "
      "jax.sharding.Shardings, such as training.model_shardings(mesh)"
    ) from error


def checked(shapes: Any, given: Any) -> dict[str, Any]:
  """What `shardings` gave, by path.

  Raises:
    ValueError: a leaf has no sharding.
  """
  where = dict(walk(given))
  for path, leaf in walk(shapes):
    of_leaf = jax.tree.leaves(where.get(path))
    if jax.tree.structure(where.get(path)) != jax.tree.structure(leaf) or not all(
      isinstance(x, jax.sharding.Sharding) for x in of_leaf
    ):
      raise ValueError(
        f"shardings gave {where.get(path)!r} for {path!r}, expected a jax.sharding.Sharding for "
        "each of its arrays; see training.model_shardings"
      )
  return where


def looped_paths(model: nn.Module, path: str) -> list[str]:
  """The paths of the tensors behind a leaf: itself, or one per layer of a scanned stack."""
  for stack, length in stacks(model) if model.scan else ():
    if path.startswith(stack + "/"):
      return [f"{stack}/{i}{path[len(stack) :]}" for i in range(length)]
  return [path]


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
  """Puts a value at a path of a nested dict, in place."""
  *heads, last = path.split("/")
  for k in heads:
    tree = tree.setdefault(k, {})
  tree[last] = value
