"""Changes of a matrix by their singular values: the nearest pair of a rank, and how far it is."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import materialize, widened
from pelt_jax._node import Weight, strip
from pelt_jax.methods._lora import pair_over
from pelt_jax.nodes import LoraWeight
from pelt_jax.nodes._axes import from_pair, to_matrices, wide
from pelt_jax.nodes._pairs import Pair


class Svd(NamedTuple):
  """`u @ diag(s) @ vt` for each of some matrices (in, out).

  Attributes:
    u: (..., in, n), orthonormal columns.
    s: (..., n), falling.
    vt: (..., n, out), orthonormal rows.
    noise: (..., 1), what smaller singular values may owe to rounding alone.
  """

  u: jax.Array
  s: jax.Array
  vt: jax.Array
  noise: jax.Array


def check_rank(rank: Any) -> None:
  """Raises ValueError unless it is a whole number of at least 1, or a float in (0, 1]."""
  whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
  if not whole and not (isinstance(rank, float) and 0.0 < rank <= 1.0):
    raise ValueError(
      "rank must be a whole number of at least 1, or a float in (0, 1], the share of the sum of "
      f"squared singular values to keep; got {rank!r}"
    )


def joined(pairs: Iterable[Pair], weights: Iterable[Any] | None = None) -> tuple[Any, Any]:
  """`a @ b` of the weighted sum of some changes, scalings included: ranks add up."""
  pairs = list(pairs)
  weights = [1.0] * len(pairs) if weights is None else list(weights)
  dtype = wide_dtype(pairs)
  a = [scaled(p.a, numbers(p, w, dtype), dtype) for p, w in zip(pairs, weights, strict=True)]
  return jnp.concatenate(a, -1), jnp.concatenate([jnp.asarray(p.b, dtype) for p in pairs], -2)


def wide_dtype(pairs: Iterable[Pair]) -> np.dtype:
  """What all arrays of some pairs go into, at least float32."""
  return wide(*(x for p in pairs for x in (p.a, p.b, p.scaling)))


def numbers(pair: Pair, weight: Any, dtype: Any) -> jax.Array:
  """The weight times the scaling of a pair."""
  return jnp.asarray(weight, dtype) * jnp.asarray(pair.scaling, dtype)


def scaled(matrices: jax.Array, number: jax.Array, dtype: Any) -> jax.Array:
  """Matrices times a number for each layer."""
  return jnp.asarray(matrices, dtype) * number.reshape(
    number.shape + (1,) * (matrices.ndim - number.ndim)
  )


@jax.jit
def svd_of_product(a: jax.Array, b: jax.Array) -> Svd:
  """Of `a @ b`, which is not built: the cost is that of the rank."""
  (left, upper), (right, lower) = jnp.linalg.qr(a), jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
  core = jnp.matmul(upper, jnp.swapaxes(lower, -1, -2), precision="highest")
  u, s, vt = jnp.linalg.svd(core, full_matrices=False)
  u = jnp.matmul(left, u, precision="highest")
  vt = jnp.matmul(vt, jnp.swapaxes(right, -1, -2), precision="highest")
  return Svd(u, s, vt, _rounding(s, a.shape[-2], b.shape[-1]))


@functools.partial(jax.jit, static_argnums=2)
def svd_of_change(leaf: Any, below: Any, axes: str) -> Svd:
  """Of what a leaf is minus what another is, both before they are rounded to 16 bits."""
  after, before = (to_matrices(materialize(widened(x)), axes) for x in (leaf, below))
  dtype = np.promote_types(after.dtype, before.dtype)
  after, before = jnp.asarray(after, dtype), jnp.asarray(before, dtype)
  found = svd_of(after - before)
  # The difference has the rounding of its terms, which may be much larger.
  size = jnp.linalg.norm(after, axis=(-2, -1))[..., None]
  return found._replace(noise=found.noise + jnp.finfo(dtype).eps * size)


@jax.jit
def svd_of(change: jax.Array) -> Svd:
  """Of matrices as they stand."""
  u, s, vt = jnp.linalg.svd(change, full_matrices=False)
  return Svd(u, s, vt, _rounding(s, *change.shape[-2:]))


def _rounding(s: jax.Array, *sizes: int) -> jax.Array:
  return s[..., :1] * jnp.asarray(max(sizes) * jnp.finfo(s.dtype).eps, s.dtype)


def truncated(svd: Svd, rank: int | float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The nearest `a @ b` of a rank, and the relative error in Frobenius norms (Eckart and Young).

  a has orthonormal columns, b holds the singular values. Ranks of matrices that lie together differ
  if `rank` is a share: smaller ones are filled up with zeros.
  """
  n = svd.s.shape[-1]
  kept = np.full(svd.s.shape[:-1], min(rank, n)) if isinstance(rank, int) else _ranks(svd, rank)
  size, stays = int(kept.max(initial=0)), np.arange(n) < kept[..., None]
  a = jnp.where(stays[..., None, :], svd.u, 0)[..., :size]
  b = jnp.where(stays[..., None], svd.s[..., None] * svd.vt, 0)[..., :size, :]
  whole = jnp.linalg.norm(svd.s, axis=-1)
  lost = jnp.linalg.norm(jnp.where(stays, 0, svd.s), axis=-1)
  return a, b, lost / jnp.where(whole > 0, whole, 1)


def _ranks(svd: Svd, share: float) -> np.ndarray:
  """The smallest ranks whose squared singular values have a share of the sum; 0 for no change."""
  s = np.asarray(svd.s, np.float64)
  energy = np.cumsum(np.where(s > np.asarray(svd.noise, np.float64), s, 0.0) ** 2, -1)
  total = energy[..., -1:]
  return np.where(total[..., 0] > 0, (energy < share * total).sum(-1) + 1, 0)


def lora_over(
  leaf: Any, a: jax.Array, b: jax.Array, axes: str, *, stacked: int, dtype: Any, group: str | None
) -> LoraWeight:
  """A LoRA of scaling 1 over a leaf, from matrices, in their dtype unless another is said."""
  shape = tuple(leaf.shape if isinstance(leaf, Weight) else jnp.shape(strip(leaf)))
  kept = a.dtype if dtype is None else dtype
  a, b = (jnp.asarray(x, kept) for x in from_pair(a, b, axes, shape))
  scaling = jnp.ones(shape[:stacked], np.promote_types(kept, np.float32))
  return pair_over(leaf, a, b, scaling, axes=axes, group=group)
