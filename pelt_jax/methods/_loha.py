"""LoHa: the elementwise product of two low-rank matrices (FedPara, arXiv:2108.06098)."""

from collections.abc import Iterable
from typing import Any

import jax

from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, check_alpha, check_whole
from pelt_jax.methods._lora import _numbers
from pelt_jax.methods._matrices import Matrix, check_rank, put, whole_matrices
from pelt_jax.nodes import LohaWeight


def loha(
  rank: int = 8,
  alpha: float | None = None,
  *,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Adds `scaling * (a1 @ b1) * (a2 @ b2)` to weights, entry by entry: of rank up to rank squared.

  scaling = alpha / rank. a2 is zero at first, so the model computes what it computed before; a1 is
  U(-1/sqrt(in), 1/sqrt(in)), b1 and b2 are U(-1/sqrt(rank), 1/sqrt(rank)), as in PEFT (LyCORIS
  draws normal numbers). 2 r (in + out) parameters per matrix. The change is built for every
  product, and again in the backward pass.

  Args:
    rank: rank of both factors, at least 1.
    alpha: numerator of the scaling; by default the rank, so that the scaling is 1.
    targets: roles, `"all-linear"`, or path patterns of modules or leaves.
    layers: layer numbers to keep; all by default.
    dtype: dtype of the factors; by default the leaf's, float32 over a quantized one.
    group: label of the factors; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target matches nothing, is never called, trains
      already, is smaller than the rank, or is a table or no single matrix.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(6), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> params = pelt.loha(2, targets="kernel").init(
    ...   jax.random.key(1), params, pelt.sites(model, x)
    ... )
    >>> pelt.count(params).trainable, pelt.count(params).rank
    (40, 4)
  """
  check_whole(rank=rank)
  check_alpha(alpha)

  def of(matrix: Matrix, leaf: Any, key: jax.Array) -> LohaWeight:
    check_rank("loha", rank, matrix)
    n_in, n_out = matrix.inputs, matrix.outputs
    kind, wide = _numbers(leaf, dtype)
    keys = jax.random.split(key, 3)
    return LohaWeight(
      leaf,
      None,
      matrix.axes,
      a1=matrix.boxed(leaf, matrix.uniform(keys[0], (n_in, rank), n_in, kind), "ir"),
      b1=matrix.boxed(leaf, matrix.uniform(keys[1], (rank, n_out), rank, kind), "ro"),
      a2=matrix.boxed(leaf, matrix.full((n_in, rank), 0, kind), "ir"),
      b2=matrix.boxed(leaf, matrix.uniform(keys[2], (rank, n_out), rank, kind), "ro"),
      scaling=matrix.full((), (rank if alpha is None else alpha) / rank, wide),
      group=group,
      stacked=len(matrix.site.stacked),
    )

  def init(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    return put("loha", key, params, whole_matrices("loha", sites, targets, layers), of)

  return Transform(init)
