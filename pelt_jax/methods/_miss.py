"""MiSS: one small matrix repeated over blocks of the inputs (arXiv:2409.15371)."""

from collections.abc import Iterable
from typing import Any

import jax

from pelt_jax._node import Weight
from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, check_dropout, check_whole
from pelt_jax.methods._lora import _dropout, _numbers
from pelt_jax.methods._matrices import Matrix, put, whole_matrices
from pelt_jax.methods._merge_aware import check_mergeable
from pelt_jax.nodes import BatWeight, MissWeight

KINDS = ("standard", "mini", "bat")


def miss(
  rank: int = 64,
  *,
  kind: str = "standard",
  mini_rank: int = 1,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Adds `(sum_j x[j r : (j + 1) r]) @ block` to y = x W: a LoRA whose a sums blocks of x.

  block, (r, out), is zero at first, so the model computes what it computed before. Where r does not
  divide the inputs, x is filled up with zeros. Kinds:

  - "standard": r out parameters per matrix.
  - "mini": block is (r, mini_rank), repeated along the outputs: r mini_rank parameters.
  - "bat": the change depends on W. With W cut into blocks W_pq (r, r), as (out, in), it is
    W_pq M_p + M_p with a matrix M_p for the outputs of p: r out parameters, of any rank. It needs
    the whole W for every product.

  Args:
    rank: r, at least 1 and at most the number of inputs.
    kind: `"standard"`, `"mini"` or `"bat"`.
    mini_rank: width of the block of "mini"; divides the number of outputs.
    targets: roles, `"all-linear"`, or path patterns of modules or leaves.
    layers: layer numbers to keep; all by default.
    dropout: share of the input of the change dropped in training, 0 <= dropout < 1; not for "bat".
    dtype: dtype of the block; by default the leaf's, float32 over a quantized one.
    group: label of the block; None freezes it.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target matches nothing, is never called, trains
      already, is a table or no single matrix, or cannot be cut into such blocks.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3, use_bias=False), jnp.array([[1.0, 2.0, 3.0, 4.0]])
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.miss(rank=2, targets="kernel")
    >>> node = method.init(jax.random.key(1), params, pelt.sites(model, x))["kernel"]
    >>> node = node.replace(base=jnp.zeros((4, 3)), block=jnp.eye(2, 3))
    >>> pelt.bypass(model.apply)({"params": {"kernel": node}}, x).tolist()
    [[4.0, 6.0, 0.0]]
  """
  check_whole(rank=rank, mini_rank=mini_rank)
  check_dropout(dropout)
  if kind not in KINDS:
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
  if kind == "bat" and dropout:
    raise ValueError(f"dropout={dropout}: kind='bat' changes the whole kernel and drops nothing")

  def of(matrix: Matrix, leaf: Any, _: jax.Array) -> MissWeight | BatWeight:
    _check(matrix, rank, kind, mini_rank)
    dtypes = _numbers(leaf, dtype)
    more: dict[str, Any] = {
      "axes": matrix.axes,
      "group": group,
      "stacked": len(matrix.site.stacked),
    }
    if kind == "bat" and isinstance(leaf, Weight):
      check_mergeable("miss", matrix.site.path, leaf)
    if kind == "bat":
      blocks = matrix.full((matrix.outputs // rank, rank, rank), 0, dtypes[0])
      return BatWeight(leaf, blocks=matrix.boxed(leaf, blocks, "prr"), **more)
    width, letter = (mini_rank, "r") if kind == "mini" else (matrix.outputs, "o")
    block = matrix.boxed(leaf, matrix.full((rank, width), 0, dtypes[0]), f"r{letter}")
    return MissWeight(leaf, _dropout(matrix.site, dropout, dtypes[1]), block=block, **more)

  def init(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    return put("miss", key, params, whole_matrices("miss", sites, targets, layers), of)

  return Transform(init)


def _check(matrix: Matrix, rank: int, kind: str, mini_rank: int) -> None:
  """Raises ValueError for a matrix that cannot be cut so."""
  shape = f"the matrix at {matrix.site.path!r}, which is {matrix.inputs} x {matrix.outputs}"
  if rank > matrix.inputs:
    raise ValueError(f"miss: rank {rank} exceeds the inputs of {shape}; lower rank")
  if kind == "mini" and matrix.outputs % mini_rank:
    raise ValueError(f"miss: mini_rank={mini_rank} does not divide the outputs of {shape}")
  if kind == "bat" and (matrix.inputs % rank or matrix.outputs % rank):
    raise ValueError(f"miss: rank {rank} of kind='bat' does not divide both sides of {shape}")
