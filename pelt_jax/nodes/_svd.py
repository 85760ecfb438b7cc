"""A low-rank weight node with singular values (AdaLoRA, arXiv:2303.10512, equation 3)."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import Weight, base, extra, own, static
from pelt_jax.nodes._axes import wide
from pelt_jax.nodes._lora import LoraWeight, factor_specs, matrix_sizes

RANKNUM = 1e-5  # the reference code divides alpha by the first rank plus this


class SvdWeight(Weight):
  """`base + scaling * (a * lam) @ b`: the paper's P Λ Q, with a = Qᵀ and b = Pᵀ.

  Attributes:
    base: (in, out) in the plain case, an array or another weight node.
    a: (in, rank), right singular vectors in its columns.
    b: (rank, out), left singular vectors in its rows.
    lam: (rank,), singular values; a triplet that is pruned has a zero here.
    scaling: (), or one per stacked layer.
    gamma: (), weight of this matrix in the regulariser; or one per stacked layer.
    dropout: None or a `Dropout` for the input of `a` alone.
    axes: as in `LoraWeight`.
    orth: which distance from orthogonality is penalised, see `penalty`.
  """

  base: Any = base()
  a: Any = own()
  b: Any = own()
  lam: Any = own()
  scaling: Any = extra()
  gamma: Any = extra()
  dropout: Any = extra()
  axes: str = static("io:ir,ro")
  orth: str = static("code")

  scheduled = True

  @property
  def lora(self) -> LoraWeight:
    """The LoRA that computes the same."""
    a, lam = self.array("a"), self.array("lam")
    between = (1,) * (a.ndim - lam.ndim)
    return LoraWeight(
      self.base,
      a * lam.reshape(*lam.shape[:-1], *between, lam.shape[-1]),
      self.array("b"),
      self.scaling,
      self.dropout,
      axes=self.axes,
      group=self.group,
      stacked=self.stacked,
    )

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    return self.lora.einsum(eq, x, call, precision)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    return self.lora.lookup(ids, call)

  def materialize(self) -> jax.Array:
    return self.lora.materialize()

  def rank(self) -> int:
    return min(self.array("lam").shape[-1], *matrix_sizes(self.axes, self.shape[self.stacked :]))

  def specs(self, spec: tuple, tensor: tuple) -> "SvdWeight":
    return super().specs(spec, tensor).replace(**factor_specs(self.axes, self.stacked, tensor))

  def penalty(self) -> jax.Array:
    """`gamma (d(aᵀ a) + d(b bᵀ))`, where d is the distance of a Gram matrix G from the identity.

    d is the Frobenius norm |G - I| with `orth="code"`, its square with `"paper"` (equation 4).
    """
    a, b, gamma = self.array("a"), self.array("b"), self.array("gamma")
    rank, lead = a.shape[-1], a.shape[: a.ndim - len(self.axes.partition(":")[2].partition(",")[0])]
    rows = (jnp.swapaxes(a.reshape(*lead, -1, rank), -1, -2), b.reshape(*lead, rank, -1))
    return jnp.sum(sum(_distance(x, self.orth) for x in rows) * jnp.asarray(gamma, wide(a)))


def _distance(rows: jax.Array, orth: str) -> jax.Array:
  """How far rows (..., r, n) are from being orthonormal, (...)."""
  rows = jnp.asarray(rows, wide(rows))
  gram = jnp.einsum("...in,...jn->...ij", rows, rows, precision="highest")
  off = gram - jnp.eye(rows.shape[-2], dtype=rows.dtype).reshape(
    (1,) * (gram.ndim - 2) + gram.shape[-2:]
  )
  square = jnp.sum(off * off, axis=(-2, -1))
  if orth == "paper":
    return square
  # The norm has no gradient at zero, where torch's is zero.
  some = square > 0
  return jnp.where(
    some, jnp.sqrt(jnp.where(some, square, jnp.ones_like(square))), jnp.zeros_like(square)
  )
