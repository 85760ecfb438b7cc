"""What is left of a frozen weight once a low-rank part of it trains (PiSSA, OLoRA)."""

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax.core import meta

from pelt_jax._node import Weight, derived, extra, static, strip
from pelt_jax._save import fingerprint
from pelt_jax.nodes._axes import from_matrices, to_matrices, to_pair, wide
from pelt_jax.nodes._lora import factor_specs, subscripts


class Residual(Weight):
  """`W - scaling * a @ b`, frozen, where a and b are what a LoRA above it started from.

  Files hold a and b. Loading takes them from W again: a sum of rank-one products, one by one, which
  rounds alike wherever it runs, while decompositions do not.

  Attributes:
    residual: the array, in the kernel's dtype.
    a: (in, rank), as of `LoraWeight`.
    b: (rank, out).
    scaling: (), or one per stacked layer.
    source: fingerprint of W, (); one per stacked layer.
    axes: as of `LoraWeight`.
  """

  residual: Any = derived()
  a: Any = extra()
  b: Any = extra()
  scaling: Any = extra()
  source: Any = extra()
  axes: str = static("io:ir,ro")

  @property
  def inner(self) -> Any:
    return self.residual

  def materialize(self) -> jax.Array:
    return strip(self.residual)

  def changed(self) -> int:
    return 0

  def of(self, kernel: Any) -> Self:
    """The node with the residual of a kernel, in the kernel's box."""
    value = strip(kernel)
    arrays = (value, *(jnp.asarray(self.array(n)) for n in ("a", "b", "scaling")))
    residual, source = _taken(*arrays, axes=self.axes, stacked=self.stacked)
    return self.replace(residual=meta.replace_boxed(kernel, residual), source=source)

  def rebuild(self, source: Any) -> Self:
    if isinstance(strip(source), Weight):
      raise ValueError(
        f"it is a {type(strip(source)).__name__} here, and its residual is of the plain weight"
      )
    (kernel, *letters), lead = subscripts(self.axes), self.stacked
    pair = zip(letters, (self.array("a").shape, self.array("b").shape), strict=True)
    size = {c: n for axes, shape in pair for c, n in zip(axes, shape[lead:], strict=True)}
    had, shape = tuple(size[c] for c in kernel), tuple(strip(source).shape)
    if shape[lead:] != had:
      raise ValueError(
        f"it had shape {had} when its residual was taken, here it has {shape[lead:]}"
      )
    made = self.of(source)
    if not bool(jnp.array_equal(made.source, self.source)):
      raise ValueError(
        "it holds other values, or has another dtype. Load the base that the adapter was trained on"
      )
    return made

  def specs(self, spec: tuple, tensor: tuple) -> Self:
    pair = factor_specs(self.axes, self.stacked, tensor)
    whole = jax.sharding.PartitionSpec(*spec)
    return super().specs(spec, tensor).replace(residual=whole, **pair)


@functools.partial(jax.jit, static_argnames=("axes", "stacked"))
def _taken(
  kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array, *, axes: str, stacked: int
) -> tuple[jax.Array, jax.Array]:
  """The residual and the kernel's fingerprint."""
  dtype = wide(kernel, a, b, scaling)
  whole, a, b, scaling = (jnp.asarray(x, dtype) for x in (kernel, a, b, scaling))
  left, right = to_pair(a, b, axes)
  left = left * scaling.reshape(*scaling.shape, *(1,) * (left.ndim - stacked))

  def step(k: jax.Array, rest: jax.Array) -> jax.Array:
    column = jax.lax.dynamic_index_in_dim(left, k, -1)
    row = jax.lax.dynamic_index_in_dim(right, k, -2)
    # Rounded on its own: no device may fuse it with the sum.
    return rest - jax.lax.optimization_barrier(column * row)

  rest = jax.lax.fori_loop(0, left.shape[-1], step, to_matrices(whole, axes))
  rest = from_matrices(rest, axes, kernel.shape)
  mark = fingerprint
  for _ in range(stacked):
    mark = functools.partial(jax.lax.map, mark)
  return jnp.asarray(rest, kernel.dtype), mark(kernel)
