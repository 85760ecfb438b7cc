"""Elementwise products with low-rank matrices: LoHa (arXiv:2108.06098) and HiRA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import materialize, product, table_rows
from pelt_jax._node import extra, own
from pelt_jax.nodes._lora import _below
from pelt_jax.nodes._matrix import PLAIN, KernelWeight, MatrixWeight, pair


class LohaWeight(MatrixWeight):
  """`base + scaling * (a1 @ b1) * (a2 @ b2)`, entry by entry: of rank up to rank squared.

  Attributes:
    a1: (in, rank).
    b1: (rank, out).
    a2: (in, rank).
    b2: (rank, out).
    scaling: (), or one per stacked layer; alpha / rank.
  """

  a1: Any = own()
  b1: Any = own()
  a2: Any = own()
  b2: Any = own()
  scaling: Any = extra()

  def delta(self, dtype: Any) -> jax.Array:
    one, two = (pair(self.array(f"a{i}"), self.array(f"b{i}"), dtype) for i in (1, 2))
    return one * two * jnp.asarray(self.scaling, dtype)[..., None, None]

  def rank(self) -> int:
    return min(self.array("a1").shape[-1] ** 2, *self.matrix)

  def specs(self, spec: tuple, tensor: tuple) -> "LohaWeight":
    lead, inputs, outputs = self.flat_specs(tensor)
    P = jax.sharding.PartitionSpec
    a, b = P(*lead, inputs, None), P(*lead, None, outputs)
    return super().specs(spec, tensor).replace(a1=a, b1=b, a2=a, b2=b)


class HiraWeight(KernelWeight):
  """`base * (1 + a @ b)`, entry by entry: of any rank.

  Attributes:
    a: (in, rank).
    b: (rank, out).
  """

  a: Any = own()
  b: Any = own()

  def delta(self, dtype: Any) -> jax.Array:
    whole = jnp.asarray(self.as_matrix(materialize(self.base)), dtype)
    return whole * pair(self.array("a"), self.array("b"), dtype)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    rows = table_rows(self.base, ids, _below(call))
    wide = np.promote_types(rows.dtype, self.wide)
    factors = jnp.asarray(jnp.take(self.array("a"), ids, axis=0), wide)
    change = product(PLAIN, factors, self.array("b"))
    return jnp.asarray(jnp.asarray(rows, wide) * (1 + change), rows.dtype)

  def specs(self, spec: tuple, tensor: tuple) -> "HiraWeight":
    lead, inputs, outputs = self.flat_specs(tensor)
    P = jax.sharding.PartitionSpec
    new = super().specs(spec, tensor)
    return new.replace(a=P(*lead, inputs, None), b=P(*lead, None, outputs))
