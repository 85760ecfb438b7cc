"""Leaves that train as they are, and the guard that keeps bypass nodes from being forgotten."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax import _call
from pelt_jax._leaf import materialize, product, table_rows
from pelt_jax._node import Weight, base, own, spread, static, strip


class Tuned(Weight):
  """A plain leaf that trains: a bias, a head, or every leaf in full fine-tuning.

  Attributes:
    value: the leaf, with its stacked axes; in training perhaps a float32 master.
    kind: name of the leaf's own dtype, in which it computes and merges; None for the value's.
  """

  value: Any = own()
  kind: str | None = static(default=None)

  @property
  def inner(self) -> Any:
    return self.value

  @property
  def dtype(self) -> Any:
    return strip(self.value).dtype if self.kind is None else jnp.dtype(self.kind)

  def materialize(self) -> jax.Array:
    value = strip(self.value)
    return value if self.kind is None else jnp.asarray(value, self.dtype)

  def rank(self) -> int:
    shape = self.shape[self.stacked :]  # which axes are inputs is not known: the largest bound
    cuts = (min(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape)))
    return max(cuts, default=1)

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
