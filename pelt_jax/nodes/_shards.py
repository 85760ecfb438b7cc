"""Matrices repeated over blocks of the inputs (MiSS, arXiv:2409.15371)."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._leaf import materialize, product
from pelt_jax._node import own
from pelt_jax.nodes._matrix import PLAIN, KernelWeight, MatrixWeight


class MissWeight(MatrixWeight):
  """`base + delta` with `delta[i, o] = block[i mod rank, o mod width]`.

  A LoRA whose a is fixed: x a sums x over its blocks of `rank` inputs, which takes no product.

  Attributes:
    block: (rank, width), where width divides out.
  """

  block: Any = own()

  pads = False

  def along(self, x: jax.Array, precision: Any) -> jax.Array:
    rank, width = self.array("block").shape
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
    h = x.reshape(*x.shape[:-1], -1, rank).sum(-2)
    y = product(PLAIN, h, self.array("block"), None, precision)
    return jnp.tile(y, self.matrix[1] // width)

  def delta(self, dtype: Any) -> jax.Array:
    block = jnp.asarray(self.array("block"), dtype)
    inputs, outputs = self.matrix
    block = jnp.tile(block, outputs // block.shape[-1])
    return jnp.take(block, jnp.arange(inputs) % block.shape[-2], axis=-2)

  def rank(self) -> int:
    return min(*self.array("block").shape[-2:], *self.matrix)

  def specs(self, spec: tuple, tensor: tuple) -> "MissWeight":
    new = super().specs(spec, tensor)
    lead, _, outputs = self.flat_specs(tensor)
    if self.array("block").shape[-1] < self.matrix[1]:  # shards of out would cross the repeats
      return new
    return new.replace(block=jax.sharding.PartitionSpec(*lead, None, outputs))


class BatWeight(KernelWeight):
  """`base + delta`, the blocks of which come from the base's own: W_qp @ M_p + M_p.

  W_qp, (rank, rank) as torch lies (out, in), is the block of the base at inputs q, outputs p.

  Attributes:
    blocks: (out / rank, rank, rank), M_p; its axes are (p, in, in).
  """

  blocks: Any = own()

  pads = False

  def delta(self, dtype: Any) -> jax.Array:
    blocks = jnp.asarray(self.array("blocks"), dtype)
    whole = jnp.asarray(self.as_matrix(materialize(self.base)), dtype)
    *lead, count, rank, _ = blocks.shape
    whole = whole.reshape(*lead, -1, rank, count, rank)
    delta = jnp.einsum("...qcpa,...pcd->...qdpa", whole, blocks, precision="highest")
    added = jnp.einsum("...pad->...dpa", blocks)
    return (delta + added[..., None, :, :, :]).reshape(*lead, *self.matrix)

  def specs(self, spec: tuple, tensor: tuple) -> "BatWeight":
    lead, _, outputs = self.flat_specs(tensor)
    blocks = jax.sharding.PartitionSpec(*lead, outputs, None, None)
    return super().specs(spec, tensor).replace(blocks=blocks)
