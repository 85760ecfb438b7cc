"""Weights whose outputs, or inputs, are scaled one by one (IA3, arXiv:2205.05638)."""

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import materialize, product
from pelt_jax._node import Generator, Weight, base, own, static
from pelt_jax._walk import every_node, map_nodes, update_at, walk


class ScaledWeight(Weight):
  """`base * scale` along some axes: of a kernel its outputs or its inputs, or all of a bias.

  Attributes:
    base: an array or another weight node.
    scale: the sizes of those axes; None waits for `SharedScales`.
    axes: the leaf's axes : the scaled ones.
    shared: name of the `SharedScales` that gives a module's bias the scale of its kernel, else "".
  """

  base: Any = base()
  scale: Any = own()
  axes: str = static("io:o")
  shared: str = static("")

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    inputs, kernel, out = eq.replace("->", ",").split(",")
    mine, _, scaled = self.axes.partition(":")
    scaled = "".join(dict(zip(mine, kernel, strict=True))[c] for c in scaled)
    if set(scaled) <= set(inputs):
      return product(eq, self._times(x, inputs, scaled), self.base, call, precision)
    return self._times(product(eq, x, self.base, call, precision), out, scaled)

  def materialize(self) -> jax.Array:
    mine, _, scaled = self.axes.partition(":")
    return self._times(materialize(self.base), mine, scaled)

  def rank(self) -> int:
    mine, _, scaled = self.axes.partition(":")
    size = dict(zip(mine, self.shape[self.stacked :], strict=True))
    of = lambda letters: math.prod(size[c] for c in letters)
    return min(of(scaled), of(c for c in mine if c not in scaled))

  def specs(self, spec: tuple, tensor: tuple) -> "ScaledWeight":
    new = super().specs(spec, tensor)
    if self.scale is None:
      return new
    mine, _, scaled = self.axes.partition(":")
    axis = dict(zip(mine, tensor[self.stacked :], strict=True))
    lead = tensor[: self.stacked]
    return new.replace(scale=jax.sharding.PartitionSpec(*lead, *map(axis.get, scaled)))

  def _times(self, x: jax.Array, letters: str, scaled: str) -> jax.Array:
    """`x * scale`, rounded once; the letters name x's last axes, layers come first in both."""
    if self.scale is None:
      raise ValueError(
        f"a scaled bias waits for its kernel's scale, generators/{self.shared}: run pelt.bypass or "
        "pelt.merge"
      )
    scale, letters = self.array("scale"), letters.removeprefix("...")
    order = sorted(range(len(scaled)), key=lambda i: letters.index(scaled[i]))
    scale = scale.transpose(*range(self.stacked), *(self.stacked + i for i in order))
    size = dict(zip((scaled[i] for i in order), scale.shape[self.stacked :], strict=True))
    free = x.ndim - len(letters) - self.stacked
    ones = (1,) * free + tuple(size.get(c, 1) for c in letters)
    wide = np.promote_types(x.dtype, scale.dtype)
    scale = jnp.asarray(scale, wide).reshape(*scale.shape[: self.stacked], *ones)
    return jnp.asarray(jnp.asarray(x, wide) * scale, x.dtype)


class SharedScales(Generator):
  """Gives scaled biases the scale of the kernel beside them, which alone has it as a parameter.

  Attributes:
    name: its own among the generators.
  """

  name: str = static("")

  kept = True

  def expand(self, params: dict) -> dict:
    leaves = dict(walk(params))
    served = {path: [n for n in every_node(v) if self._serves(n)] for path, v in leaves.items()}
    scales = {
      path.rpartition("/")[0]: node.scale
      for path, nodes in served.items()
      for node in nodes
      if node.scale is not None
    }

    def filled(path: str) -> Any:
      scale = scales[path.rpartition("/")[0]]
      waits = lambda node: self._serves(node) and node.scale is None
      return map_nodes(lambda n: n.replace(scale=scale) if waits(n) else n, leaves[path])

    waiting = (path for path, nodes in served.items() if any(n.scale is None for n in nodes))
    return update_at(params, {path: filled(path) for path in waiting})

  def _serves(self, node: Any) -> TypeGuard[ScaledWeight]:
    return isinstance(node, ScaledWeight) and node.shared == self.name
