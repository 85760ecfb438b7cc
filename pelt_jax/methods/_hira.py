"""HiRA: weights multiplied, entry by entry, by one plus a low-rank matrix (ICLR 2025)."""

from collections.abc import Iterable
from typing import Any

import jax

from pelt_jax._node import Weight
from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, check_dropout, check_whole
from pelt_jax.methods._lora import _dropout, _numbers
from pelt_jax.methods._matrices import Matrix, check_rank, put, whole_matrices
from pelt_jax.methods._merge_aware import check_mergeable
from pelt_jax.nodes import HiraWeight


def hira(
  rank: int = 32,
  *,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Multiplies weights by `1 + a @ b`, entry by entry: y = x W + dropout(x) (W * (a b)).

  b is zero at first, so the model computes what it computed before; a is U(-1/sqrt(in),
  1/sqrt(in)). There is no scaling. In a table used by lookups the roles change: a is zero and b is
  N(0, 1), and dropout does not act. r (in + out) parameters per matrix; the change W * (a b) may
  have any rank. It needs the whole W for every product, and builds it again in the backward pass.

  Args:
    rank: of the factor, at least 1.
    targets: roles, `"all-linear"`, or path patterns of modules or leaves.
    layers: layer numbers to keep; all by default.
    dropout: share of the input of the change dropped in training, 0 <= dropout < 1.
    dtype: dtype of a and b; by default the leaf's, float32 over a quantized one.
    group: label of a and b; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target matches nothing, is never called, trains
      already, is smaller than the rank, or is no single matrix.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((1, 2))
    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> method = pelt.hira(rank=1, targets="kernel")
    >>> node = method.init(jax.random.key(1), params, pelt.sites(model, x))["kernel"]
    >>> node = node.replace(a=jnp.array([[1.0], [0.0]]), b=jnp.array([[1.0, 2.0]]))
    >>> pelt.merge({"kernel": node})["kernel"].tolist()
    [[2.0, 6.0], [3.0, 4.0]]
  """
  check_whole(rank=rank)
  check_dropout(dropout)

  def of(matrix: Matrix, leaf: Any, key: jax.Array) -> HiraWeight:
    check_rank("hira", rank, matrix)
    if isinstance(leaf, Weight):
      check_mergeable("hira", matrix.site.path, leaf)
    n_in, n_out = matrix.inputs, matrix.outputs
    kind, wide = _numbers(leaf, dtype)
    if matrix.is_table:
      a = matrix.full((n_in, rank), 0, kind)
      b = jax.random.normal(key, (*matrix.site.stacked, rank, n_out), kind)
    else:
      a = matrix.uniform(key, (n_in, rank), n_in, kind)
      b = matrix.full((rank, n_out), 0, kind)
    return HiraWeight(
      leaf,
      None if matrix.is_table else _dropout(matrix.site, dropout, wide),
      matrix.axes,
      a=matrix.boxed(leaf, a, "ir"),
      b=matrix.boxed(leaf, b, "ro"),
      group=group,
      stacked=len(matrix.site.stacked),
    )

  def init(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    return put("hira", key, params, whole_matrices("hira", sites, targets, layers, True), of)

  return Transform(init)
