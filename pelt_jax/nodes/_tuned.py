"""Leaves that train as they are, and the guard that keeps bypass nodes from being forgotten."""

from typing import Any

import jax

from pelt_jax import _call
from pelt_jax._node import Weight, base, materialize, own, product, spread, strip, table_rows


class Tuned(Weight):
  """A plain leaf that trains: a bias, a head, or every leaf in full fine-tuning.

  Attributes:
    value: the leaf, with its stacked axes.
  """

  value: Any = own()

  @property
  def inner(self) -> Any:
    return self.value

  def materialize(self) -> jax.Array:
    return strip(self.value)

  def rank(self) -> int:
    return min(self.shape[-2:]) if self.ndim - self.stacked >= 2 else 1

  def specs(self, spec: tuple, tensor: tuple) -> "Tuned":
    return self.replace(value=jax.sharding.PartitionSpec(*spec))


class Guard(Weight):
  """Makes a model whose bypass nodes would be dropped silently raise instead.

  A plain `model.apply` never looks at the reserved key `bypass`. The guard sits round a leaf that
  the same call reads, and raises when that leaf is read outside `pelt.bypass`.
  """

  base: Any = base()

  outermost = True

  def materialize(self) -> jax.Array:
    self._check()
    return materialize(self.base)

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    return product(eq, x, self.base, call, precision)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    return table_rows(self.base, ids, call)

  def spread(self, like: Any, call: Any = None) -> jax.Array:
    below = self.base
    return below.spread(like, call) if isinstance(below, Weight) else spread(strip(below), like)

  def changed(self) -> int:
    return 0

  @staticmethod
  def _check() -> None:
    if _call.active() is None:
      raise RuntimeError(
        "these params hold bypass nodes (adapters, prefixes), which model.apply alone would "
        "ignore: use pelt.bypass(model.apply)"
      )
