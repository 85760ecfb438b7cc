"""Weights of learned magnitude (DoRA, arXiv:2402.09353, equation 5)."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._leaf import lowest, materialize, product, rebased, table_rows
from pelt_jax._node import Weight, base, contract, extra, own, static
from pelt_jax._walk import one_layer
from pelt_jax.nodes._axes import to_matrices, to_pair, wide
from pelt_jax.nodes._lora import (
  LoraWeight,
  _below,
  _refuse_dropout,
  _scaled,
  matrix_sizes,
  subscripts,
)


class DoraWeight(Weight):
  """`magnitude / n * base`, n the norm of every output's column: y = magnitude / n (x base).

  The base is a weight with a change, W + scaling * a @ b. A product scales its outputs, so the
  change is not built there; nor for n, if it is a LoRA's. A column of zeros, which has no
  direction, is not scaled. With dropout, what it takes from the input passes the frozen weight as
  it is: y = x W + magnitude / n (dropout(x) base) - dropout(x) W.

  Attributes:
    base: a weight node: W and its change.
    magnitude: (out,), batch axes (experts) first.
    dropout: None or a `Dropout` for the input of all that is changed.
    axes: kernel axes : input axes, output axes. A letter in both is a batch axis.
    detach_norm: n counts as a constant in gradients, section 4.3 of the paper.
  """

  base: Any = base()
  magnitude: Any = own()
  dropout: Any = extra()
  axes: str = static("io:i,o")
  detach_norm: bool = static(default=True)

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    kept = x if self.dropout is None else self.dropout(call, x)
    y = self._product(eq, kept, _below(call), precision)
    if kept is x:
      return y
    return y + product(eq, x - kept, self.base.inner, _below(call), precision)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    kernel, _, out = subscripts(self.axes)
    if kernel[0] in out:
      return super().lookup(ids, call)
    return self._along(table_rows(self.base, ids, _below(call)), kernel[1:], out)

  def materialize(self) -> jax.Array:
    _refuse_dropout(self.dropout)
    return self._plain()

  def unmergeable(self) -> str | None:
    return self.base.unmergeable() if isinstance(self.base, Weight) else None

  def rank(self) -> int:
    return min(matrix_sizes(self.axes, self.shape[self.stacked :]))

  def specs(self, spec: tuple, tensor: tuple) -> "DoraWeight":
    kernel, _, out = subscripts(self.axes)
    lead, axis = tensor[: self.stacked], dict(zip(kernel, tensor[self.stacked :], strict=True))
    P = jax.sharding.PartitionSpec
    return super().specs(spec, tensor).replace(magnitude=P(*lead, *map(axis.get, out)))

  def norm(self) -> jax.Array:
    """n, shaped as the magnitude, in at least float32."""
    return jnp.sqrt(self._squares())

  def _squares(self) -> jax.Array:
    """n^2; layers of a stack one by one, as a 4-bit base is dequantized for it."""
    if self.stacked:
      return jax.lax.map(lambda node: one_layer(node)._squares(), self)
    if isinstance(self.base, LoraWeight):
      squares = _squares_of_lora(self.base)
    else:
      squares = jnp.sum(to_matrices(self._whole(), self.axes) ** 2, axis=-2)
    kernel, _, out = subscripts(self.axes)
    size = dict(zip(kernel, self.shape, strict=True))
    return squares.reshape([size[c] for c in out])

  def _whole(self) -> jax.Array:
    """The base, not yet rounded to the leaf's dtype."""
    below = materialize(lowest(self.base))
    return materialize(rebased(self.base, jnp.asarray(below, wide(below))))

  def _scale(self) -> jax.Array:
    """What outputs are multiplied with: magnitude / n, 1 where n is zero."""
    node = jax.lax.stop_gradient(self) if self.detach_norm else self
    squares = node._squares()
    some = squares > 0
    n = jnp.sqrt(jnp.where(some, squares, jnp.ones_like(squares)))
    scale = jnp.asarray(self.array("magnitude"), wide(n, self.array("magnitude"))) / n
    return jnp.where(some, scale, jnp.ones_like(scale))

  def _product(self, eq: str, x: jax.Array, call: Any, precision: Any) -> jax.Array:
    inputs, kernel, outputs = eq.replace("->", ",").split(",")
    own_kernel, _, out = subscripts(self.axes)
    rename = dict(zip(own_kernel, kernel, strict=True))
    out = "".join(rename[c] for c in out)
    after = lambda spec: spec.rpartition("...")[2]
    if set(out) <= set(after(outputs)):
      return self._along(product(eq, x, self.base, call, precision), after(outputs), out)
    if set(out) <= set(after(inputs)):  # a tied table read the other way
      return product(eq, self._along(x, after(inputs), out), self.base, call, precision)
    return contract(eq, x, self._plain(), precision)

  def _plain(self) -> jax.Array:
    kernel, _, out = subscripts(self.axes)
    return jnp.asarray(self._along(self._whole(), kernel, out), self.dtype)

  def _along(self, value: jax.Array, letters: str, out: str) -> jax.Array:
    """`value`, whose last axes are `letters`, times the scale, whose last axes are `out`."""
    scale = self._scale()
    lead = scale.ndim - len(out)
    order = [lead + out.index(c) for c in letters if c in out]
    scale = scale.transpose(*range(lead), *order)
    sizes = iter(scale.shape[lead:])
    shape = [*scale.shape[:lead], *(next(sizes) if c in out else 1 for c in letters)]
    return _scaled(value, scale.reshape([1] * (value.ndim - len(shape)) + shape))


def _squares_of_lora(node: LoraWeight) -> jax.Array:
  """(batch, out): |W + scaling a b|^2 of every column, without the change.

  |w + a b|^2 = |w|^2 + b (2 a^T w + a^T a b), column by column.
  """
  whole, a, b = materialize(node.base), node.array("a"), node.array("b")
  dtype = wide(whole, a, b)
  whole = to_matrices(jnp.asarray(whole, dtype), node.axes)
  a, b = to_pair(jnp.asarray(a, dtype), jnp.asarray(b, dtype), node.axes)
  a = a * jnp.asarray(node.scaling, dtype)
  turned, times = jnp.swapaxes(a, -1, -2), lambda x, y: jnp.matmul(x, y, precision="highest")
  within = 2 * times(turned, whole) + times(times(turned, a), b)
  return jnp.sum(whole**2, axis=-2) + jnp.sum(b * within, axis=-2)
