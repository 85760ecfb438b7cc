"""A transform applied to a checkpoint one tensor at a time.

`transform.init` is traced once, on shapes alone. What it puts at one path depends on few of the
inputs (a quantized kernel on that kernel), so each path's part of the program is cut out and run by
itself: only the tensors that it needs are read, and nothing of it stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pelt_jax._program import Program
from pelt_jax._walk import walk


class Values:
  """The leaves and nodes of the transformed tree, computed when asked for.

  Attributes:
    paths: where `get` has something: leaves, nodes in their place, bypass nodes, generators.
  """

  def __init__(
    self,
    program: Program,
    inputs: list[Callable[[], Any]],
    paths: Mapping[str, Any],
    shapes: Sequence[Any],
  ) -> None:
    self._program, self._inputs, self._numbers = program, inputs, paths
    self._shapes = shapes
    self.paths = tuple(paths)

  def zeros(self, path: str) -> Any:
    """Zeros in the place of what `get` computes."""
    of = lambda n: jnp.zeros(self._shapes[n].shape, self._shapes[n].dtype)
    return jax.tree.map(of, self._numbers[path])

  def get(self, path: str) -> Any:
    """Computes what the transform puts at `path`."""
    numbers, tree = jax.tree.flatten(self._numbers[path])
    wanted = [self._program.results[n] for n in numbers]
    return jax.tree.unflatten(tree, self._program.compute(wanted, {}, lambda n: self._inputs[n]()))


def transformed(
  model: nn.Module,
  shapes: Mapping[str, Any],
  read: Mapping[str, Callable[[], np.ndarray]],
  transform: Any,
  key: jax.Array,
) -> Values:
  """Prepares `transform.init(key, params, sites)` for a looped model.

  Args:
    model: the looped model; its sites are those of two token ids.
    shapes: the abstract parameters.
    read: path -> a function that reads that tensor.
    transform: a `Transform`.
    key: random key.

  Returns:
    `Values`, which compute one path at a time.
  """
  from pelt_jax._linen_sites import sites  # the models themselves know nothing of the backend

  found = sites(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))
  names = [
    "/".join(str(k.key) for k in path)
    for path, _ in jax.tree_util.tree_flatten_with_path(dict(shapes))[0]
  ]
  closed, out = jax.make_jaxpr(lambda k, p: transform.init(k, p, found), return_shape=True)(
    key, dict(shapes)
  )
  inputs: list[Callable[[], Any]] = [lambda: key]
  inputs += [lambda n=name: jnp.asarray(read[n]()) for name in names]
  flat, tree = jax.tree.flatten(out)
  numbered = jax.tree.unflatten(tree, list(range(len(flat))))
  return Values(Program(closed), inputs, dict(walk(numbered)), flat)
