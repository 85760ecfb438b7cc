"""PiSSA: a LoRA that starts as the weight's principal part (arXiv:2404.02948)."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._site import Targets
from pelt_jax._transform import Transform
from pelt_jax.methods._residual import split

OVERSAMPLING = 10  # columns beyond the rank that make a random projection's subspace exact enough


def pissa(
  rank: int = 8,
  alpha: float | None = None,
  *,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  rslora: bool = False,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  iterations: int | None = None,
  plus: bool = False,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains the largest singular components of a weight, and freezes what is left of it.

  Of W = U S V^T, a (in, r) = U_r sqrt(S_r / scaling), b (r, out) = sqrt(S_r / scaling) V_r^T, and
  y = x (W - scaling a_0 b_0) + scaling (dropout(x) a) b (equations 2 to 4), so that the model
  computes what it did, up to rounding. Parameters, merging and options are LoRA's. Files hold a_0
  and b_0 too: nothing is decomposed at load. The decomposition is in float32, in float64 of a
  float64 weight. A kernel that its module only reads is a batch of matrices, as in `lora`.

  Args:
    rank: as of `lora`.
    alpha: as of `lora`.
    targets: as of `lora`, plain weights all of them.
    layers: as of `lora`.
    dropout: as of `lora`.
    rslora: as of `lora`.
    rank_pattern: as of `lora`.
    alpha_pattern: as of `lora`.
    iterations: None for an exact decomposition; else a randomized one (Halko et al., 2009, with 10
      columns more than the rank) with that many power iterations, much faster for large weights.
      4 are plenty.
    plus: as of `lora`.
    dtype: dtype of a and b; by default the leaf's.
    group: label of a and b; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: as `lora`; at init, if a weight is quantized or has a node already.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((1, 2))
    >>> params = {"kernel": jnp.array([[9.0, 0.0], [0.0, 2.0]])}
    >>> method = pelt.pissa(rank=1, alpha=4, targets="kernel")
    >>> node = method.init(jax.random.key(0), params, pelt.sites(model, x))["kernel"]
    >>> node.base.materialize().tolist(), (4 * node.a @ node.b).tolist()
    ([[0.0, 0.0], [0.0, 2.0]], [[9.0, 0.0], [0.0, 0.0]])
  """
  if iterations is not None and (type(iterations) is not int or iterations < 0):
    raise ValueError(f"iterations must be None or a whole number of at least 0, got {iterations!r}")
  factor = principal if iterations is None else functools.partial(randomized, iterations)
  return split(
    "pissa",
    factor,
    rank,
    alpha,
    targets=targets,
    layers=layers,
    dropout=dropout,
    rslora=rslora,
    rank_pattern=rank_pattern,
    alpha_pattern=alpha_pattern,
    plus=plus,
    dtype=dtype,
    group=group,
  )


def principal(matrix: jax.Array, rank: int, scaling: Any, key: Any) -> tuple[jax.Array, jax.Array]:
  """Factors with scaling * a @ b the best approximation of that rank, each with half of S."""
  u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
  return _halves(u, s, v, rank, scaling)


def randomized(
  iterations: int, matrix: jax.Array, rank: int, scaling: Any, key: Any
) -> tuple[jax.Array, jax.Array]:
  """As `principal`, within the space that random inputs and power iterations find."""
  times = functools.partial(jnp.matmul, precision="highest")
  turned = jnp.swapaxes(matrix, -1, -2)
  orthogonal = lambda x: jnp.linalg.qr(x)[0]
  width = min(rank + OVERSAMPLING, *matrix.shape[-2:])
  shape = (*matrix.shape[:-2], matrix.shape[-1], width)
  q = orthogonal(times(matrix, jax.random.normal(key, shape, matrix.dtype)))
  for _ in range(iterations):
    q = orthogonal(times(matrix, orthogonal(times(turned, q))))
  u, s, v = jnp.linalg.svd(times(jnp.swapaxes(q, -1, -2), matrix), full_matrices=False)
  return _halves(times(q, u), s, v, rank, scaling)


def _halves(u: jax.Array, s: jax.Array, v: jax.Array, rank: int, scaling: Any) -> tuple:
  root = jnp.sqrt(s[..., :rank] / scaling)
  return u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]
