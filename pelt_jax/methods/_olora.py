"""OLoRA: a LoRA that starts from an orthonormal basis of the weight (arXiv:2406.01775)."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._site import Targets
from pelt_jax._transform import Transform
from pelt_jax.methods._residual import split


def olora(
  rank: int = 8,
  alpha: float | None = None,
  *,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  rslora: bool = False,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  plus: bool = False,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Starts b as orthonormal rows, the first of a QR decomposition, and a as what goes with them.

  Of W^T = Q R (outputs first, as torch keeps W), b (r, out) = Q_r^T and a (in, r) = R_r^T, and
  y = x (W - scaling a_0 b_0) + scaling (dropout(x) a) b, so that the model computes what it did, up
  to rounding. The scaling is not folded into a and b, as it is in `pissa`: unless it is 1, the
  frozen part keeps some of W in the directions that train. Parameters, files, merging and options
  are as of `pissa`.

  Args:
    rank: as of `lora`.
    alpha: as of `lora`.
    targets: as of `lora`, plain weights all of them.
    layers: as of `lora`.
    dropout: as of `lora`.
    rslora: as of `lora`.
    rank_pattern: as of `lora`.
    alpha_pattern: as of `lora`.
    plus: as of `lora`.
    dtype: dtype of a and b; by default the leaf's.
    group: label of a and b; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: as `pissa`.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((1, 2))
    >>> params = {"kernel": jnp.array([[0.0, 4.0], [3.0, 0.0]])}
    >>> method = pelt.olora(rank=1, targets="kernel")
    >>> node = method.init(jax.random.key(0), params, pelt.sites(model, x))["kernel"]
    >>> jnp.abs(node.b).tolist(), jnp.abs(node.a).tolist(), node.base.materialize().tolist()
    ([[0.0, 1.0]], [[4.0], [0.0]], [[0.0, 0.0], [3.0, 0.0]])
  """
  return split(
    "olora",
    basis,
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


def basis(matrix: jax.Array, rank: int, scaling: Any, key: Any) -> tuple[jax.Array, jax.Array]:
  """Factors of that rank, b orthonormal rows: a @ b is W in the space that they span."""
  q, r = jnp.linalg.qr(jnp.swapaxes(matrix, -1, -2))
  turned = lambda x: jnp.swapaxes(x, -1, -2)
  return turned(r[..., :rank, :]), turned(q[..., :, :rank])
