"""What nodes share that change a kernel as one matrix, its inputs by its outputs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import materialize, product
from pelt_jax._node import Weight, base, contract, extra, static, strip
from pelt_jax.nodes._axes import from_matrices, to_matrices, wide
from pelt_jax.nodes._lora import _below, _refuse_dropout, matrix_sizes, subscripts

PLAIN = "...i,io->...o"


class MatrixWeight(Weight):
  """`base + delta`, where delta is a matrix (in, out), several axes of the kernel being one of it.

  y = product(x, base) + dropout(x) delta. Classes say what delta is, and may know a product with it
  that builds none.

  Attributes:
    base: an array or another weight node.
    dropout: None or a `Dropout` for the input of the change alone.
    axes: kernel axes : its inputs, its outputs.
  """

  base: Any = base()
  dropout: Any = extra()
  axes: str = static("io:i,o")

  def delta(self, dtype: Any) -> jax.Array:
    """The change, (in, out) behind stacked axes, computed in `dtype`."""
    raise NotImplementedError

  def along(self, x: jax.Array, precision: Any) -> jax.Array:
    """`x @ delta` for rows (..., in); the backward pass builds delta again, which is not kept."""

    def run(node: Any, x: jax.Array) -> jax.Array:
      return contract(PLAIN, x, node.delta(node.wide), precision)

    return jax.checkpoint(run)(self, x)

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    y = product(eq, x, self.base, _below(call), precision)
    h = x if self.dropout is None else self.dropout(call, x)
    rows = _rows(eq, self.axes)
    if rows is None:  # the table read the other way round, or a product with more axes
      return y + contract(eq, h, self.as_kernel(self.delta(self.wide)), precision)
    kernel, _, outputs = subscripts(self.axes)
    size = dict(zip(kernel, self.shape[self.stacked :], strict=True))
    outputs = [size[c] for c in outputs]
    return y + rows.back(self.along(rows.of(h), precision), outputs)

  def materialize(self) -> jax.Array:
    _refuse_dropout(self.dropout)
    # Not fused into one rounding: the sum is the same in whatever program it stands.
    whole = materialize(self.base)
    wide = np.promote_types(whole.dtype, self.wide)
    whole, delta = jax.lax.optimization_barrier((whole, self.as_kernel(self.delta(wide))))
    return jnp.asarray(jnp.asarray(whole, wide) + delta, whole.dtype)

  def rank(self) -> int:
    return min(self.matrix)

  @property
  def wide(self) -> Any:
    """The dtype in which the change is computed: at least float32."""
    own = (strip(x) for n, x in self.children() if self.kinds[n] == "own" and x is not None)
    return wide(*own)

  @property
  def matrix(self) -> tuple[int, int]:
    """Inputs and outputs."""
    return matrix_sizes(self.axes, self.shape[self.stacked :])

  def as_kernel(self, matrix: jax.Array) -> jax.Array:
    """A matrix (in, out) as the kernel lies, stacked axes first."""
    return from_matrices(matrix, self.axes, self.shape)

  def as_matrix(self, kernel: jax.Array) -> jax.Array:
    """The kernel as a matrix (in, out), stacked axes first."""
    return to_matrices(kernel, self.axes)

  def flat_specs(self, tensor: tuple) -> tuple[tuple, Any, Any]:
    """What partitions stacked axes, inputs and outputs: the first of several axes that are one."""
    kernel, inputs, outputs = subscripts(self.axes)
    axis = dict(zip(kernel, tensor[self.stacked :], strict=True))
    return tensor[: self.stacked], axis[inputs[0]], axis[outputs[0]]


class KernelWeight(MatrixWeight):
  """A change that is made from the base itself, so that products need the whole kernel.

  In float32 or wider y = product(x, base + delta). In fewer bits the sum would round small changes
  away, so there are two products, as under dropout. The backward pass builds both again.
  """

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    fused = self.dropout is None and x.dtype.itemsize >= 4
    h = x if self.dropout is None else self.dropout(call, x)
    wide = np.promote_types(self.wide, self.dtype)

    def run(node: Any, h: jax.Array) -> jax.Array:
      kernel = node.as_kernel(node.delta(wide))
      if fused:
        kernel = kernel + jnp.asarray(materialize(node.base), wide)
      return contract(eq, h, kernel, precision)

    change = jax.checkpoint(run)(self, h)
    return change if fused else product(eq, x, self.base, _below(call), precision) + change


class _Rows(NamedTuple):
  """How a product's input becomes rows (..., in), and rows (..., out) what the equation says."""

  x: str
  lead: str
  inputs: str
  outputs: str
  out: str

  def of(self, x: jax.Array) -> jax.Array:
    free = x.ndim - len(self.x)
    order = (free + self.x.index(c) for c in self.lead + self.inputs)
    return x.transpose(*range(free), *order).reshape(*self._kept(x, free), -1)

  def _kept(self, x: jax.Array, free: int) -> list[int]:
    return [*x.shape[:free], *(x.shape[free + self.x.index(c)] for c in self.lead)]

  def back(self, y: jax.Array, outputs: list[int]) -> jax.Array:
    free, have = y.ndim - 1 - len(self.lead), self.lead + self.outputs
    y = y.reshape(*y.shape[:-1], *outputs)
    return y.transpose(*range(free), *(free + have.index(c) for c in self.out))


@functools.cache
def _rows(eq: str, axes: str) -> "_Rows | None":
  """How to multiply rows, None where the equation does not contract exactly the inputs."""
  x, kernel, out = eq.replace("->", ",").split(",")
  mine, inputs, outputs = subscripts(axes)
  rename = dict(zip(mine, kernel, strict=True))
  inputs, outputs = ("".join(map(rename.__getitem__, s)) for s in (inputs, outputs))
  x, out = x.removeprefix("..."), out.removeprefix("...")
  lead = "".join(c for c in x if c in out)
  wanted = set(lead + inputs), set(lead + outputs)
  if "." in x + out or (set(x), set(out)) != wanted or set(lead) & set(kernel):
    return None
  return _Rows(x, lead, inputs, outputs, out)


def pair(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
  """`a @ b` in `dtype`, behind stacked axes."""
  left, right = (jnp.asarray(x, dtype) for x in (a, b))
  return jnp.einsum("...ir,...ro->...io", left, right, precision="highest")
