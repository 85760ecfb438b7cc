"""VeRA (arXiv:2310.11454, equation 2): vectors per matrix between one pair for the whole model."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._leaf import product
from pelt_jax._node import Generator, extra, given, own, spread, static
from pelt_jax._walk import map_nodes
from pelt_jax.nodes._matrix import PLAIN, MatrixWeight, pair


class VeraWeight(MatrixWeight):
  """`base + (a * lambda_d) @ (b * lambda_b)`, where a and b are one random pair's first rows.

  Attributes:
    lambda_b: (out,).
    lambda_d: (rank,).
    a: (in, rank); None waits for the `VeraPair`.
    b: (rank, out); likewise.
    pair: name of the `VeraPair` among the generators.
    inputs: in.
  """

  lambda_b: Any = own()
  lambda_d: Any = own()
  a: Any = given()
  b: Any = given()
  pair: str = static("")
  inputs: int = static(0)

  def along(self, x: jax.Array, precision: Any) -> jax.Array:
    h = product(PLAIN, x, self._filled("a"), None, precision)
    h = h * spread(self.array("lambda_d"), h)
    y = product(PLAIN, h, self._filled("b"), None, precision)
    return y * spread(self.array("lambda_b"), y)

  def delta(self, dtype: Any) -> jax.Array:
    scaled = lambda n, by: jnp.asarray(self._filled(n), dtype) * by[..., None, :]
    lambda_b, lambda_d = (jnp.asarray(self.array(n), dtype) for n in ("lambda_b", "lambda_d"))
    return pair(scaled("a", lambda_d), scaled("b", lambda_b), dtype)

  def rank(self) -> int:
    return min(self.array("lambda_d").shape[-1], *self.matrix)

  def specs(self, spec: tuple, tensor: tuple) -> "VeraWeight":
    lead, _, outputs = self.flat_specs(tensor)
    new = super().specs(spec, tensor)
    return new.replace(lambda_b=jax.sharding.PartitionSpec(*lead, outputs))

  def _filled(self, name: str) -> jax.Array:
    if getattr(self, name) is None:
      raise ValueError(
        f"a VeRA weight waits for its pair, generators/{self.pair}: run pelt.bypass or pelt.merge"
      )
    return self.array(name)


class VeraPair(Generator):
  """The random pair of all VeRA weights that name it; each reads the rows that it needs.

  Attributes:
    a: (largest in, rank).
    b: (rank, largest out).
    name: its own among the generators.
  """

  a: Any = extra()
  b: Any = extra()
  name: str = static("")

  kept = True

  def expand(self, params: dict) -> dict:
    return map_nodes(self._given, params)

  def _given(self, node: Any) -> Any:
    if not isinstance(node, VeraWeight) or node.pair != self.name:
      return node
    lead = node.array("lambda_d").shape[: node.stacked]  # a scan wants an axis of layers
    a, b = self.array("a")[: node.inputs], self.array("b")[:, : node.array("lambda_b").shape[-1]]
    whole = lambda x: jnp.broadcast_to(x, (*lead, *x.shape))
    return node.replace(a=whole(a), b=whole(b))
