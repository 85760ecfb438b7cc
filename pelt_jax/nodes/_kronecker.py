"""Kronecker products (LoKr, arXiv:2309.14859)."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._leaf import product
from pelt_jax._node import extra, own
from pelt_jax.nodes._lora import _scaled
from pelt_jax.nodes._matrix import PLAIN, MatrixWeight, pair


class LokrWeight(MatrixWeight):
  """`base + scaling * kron(w1, w2)` with w1 (m, l) and w2 (n, k), in = m n and out = l k.

  Each is one matrix, or a product of two. Products with x build no (in, out) matrix.

  Attributes:
    w1: (m, l), or None.
    w1_a: (m, rank), or None.
    w1_b: (rank, l), or None.
    w2: (n, k), or None.
    w2_a: (n, rank), or None.
    w2_b: (rank, k), or None.
    scaling: (), or one per stacked layer; alpha / rank.
  """

  w1: Any = own()
  w1_a: Any = own()
  w1_b: Any = own()
  w2: Any = own()
  w2_a: Any = own()
  w2_b: Any = own()
  scaling: Any = extra()

  pads = False

  def along(self, x: jax.Array, precision: Any) -> jax.Array:
    first = jnp.asarray(self._factor("w1", self.wide), x.dtype)
    h = x.reshape(*x.shape[:-1], first.shape[0], -1)
    if self.w2 is None:
      h = product(PLAIN, h, self.array("w2_a"), None, precision)
    h = jnp.einsum("...mn,ml->...ln", h, first, precision=precision)
    h = product(PLAIN, h, self.array("w2_b" if self.w2 is None else "w2"), None, precision)
    return _scaled(h.reshape(*x.shape[:-1], -1), self.scaling)

  def delta(self, dtype: Any) -> jax.Array:
    first, second = (self._factor(name, dtype) for name in ("w1", "w2"))
    whole = jnp.einsum("...ml,...nk->...mnlk", first, second)
    *lead, m, n, left, k = whole.shape
    return whole.reshape(*lead, m * n, left * k) * jnp.asarray(self.scaling, dtype)[..., None, None]

  def rank(self) -> int:
    return min(self._rank("w1") * self._rank("w2"), *self.matrix)

  def _factor(self, name: str, dtype: Any) -> jax.Array:
    if getattr(self, name) is not None:
      return jnp.asarray(self.array(name), dtype)
    return pair(self.array(f"{name}_a"), self.array(f"{name}_b"), dtype)

  def _rank(self, name: str) -> int:
    parts = [name] if getattr(self, name) is not None else [f"{name}_a", f"{name}_b"]
    return min(size for part in parts for size in self.array(part).shape[-2:])
