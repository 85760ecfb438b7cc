"""Products of kernels in 4 bits: whole, or few tokens tile by tile on CPU."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import contract
from pelt_jax.quantization._layout import Plan, dequantize, scales_of

_TILE = 2**21  # bytes of a dequantized part that a CPU multiplies
_FEW = 32  # tokens, beyond which a product outweighs what its kernel costs


class Tiles(NamedTuple):
  """A product cut along one axis of its input, and the same of the kernel."""

  count: int
  axis: int
  plan: Plan


def _tiles(how: tuple) -> Tiles | None:
  """How a CPU multiplies few tokens: in parts whose kernels stay in the cache.

  A kernel of 16 MB that is written, read and packed for 16 tokens costs up to twice as much.
  """
  eq, plan, _, shape, dtype, places = how
  inputs, kernel, out = eq.replace("->", ",").split(",")
  cut = plan.order[len(plan.order) - plan.inputs]
  letter, width = kernel[cut], plan.matrix[1]
  few = math.prod(shape) <= _FEW * width and jnp.finfo(dtype).bits >= 32
  if places or not few or plan.layout != "words" or letter not in inputs or letter in out:
    return None
  wanted = math.prod(plan.sizes) * jnp.dtype(dtype).itemsize // _TILE
  fits = lambda n: plan.sizes[cut] % n == 0 and width // n % plan.block == 0
  count = max((n for n in range(2, wanted + 1) if fits(n)), default=1)
  sizes = tuple(n // count if i == cut else n for i, n in enumerate(plan.sizes))
  axis = len(shape) - len(inputs) + inputs.index(letter)
  return Tiles(count, axis, plan._replace(sizes=sizes, double=False)) if count > 1 else None


def _tile(x: jax.Array, tiles: Tiles, i: Any, axis: int = 0) -> jax.Array:
  size = x.shape[axis] // tiles.count
  return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _multiplied(
  how: tuple, x: jax.Array, arrays: dict[str, jax.Array], whole: Callable, tiled: Callable
) -> jax.Array:
  """`whole(x, kernel)`; on CPU, for few tokens, `tiled(x, kernel_of, tiles)` of the i-th tile's."""
  _, plan, *_, places = how
  at_once = lambda x, arrays: whole(x, dequantize(plan, placed(arrays, places)))
  tiles = _tiles(how)
  if tiles is None:
    return at_once(x, arrays)

  def in_parts(x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
    lie = {"codes": arrays["codes"], "scales": scales_of(plan, arrays)}
    part = lambda i: dequantize(tiles.plan, {n: _tile(v, tiles, i) for n, v in lie.items()})
    return tiled(x, part, tiles)

  return jax.lax.platform_dependent(x, arrays, cpu=in_parts, default=at_once)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(how: tuple, x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
  """The product of x and a quantized kernel; how: equation, plan, precision, of x the shape and
  dtype, and where the arrays lie.
  """
  eq, _, precision, *_ = how
  whole = lambda x, kernel: contract(eq, x, kernel, precision)

  def tiled(x: jax.Array, kernel_of: Callable, tiles: Tiles) -> jax.Array:
    term = lambda i: whole(_tile(x, tiles, i, tiles.axis), kernel_of(i))
    zero = jnp.zeros_like(jax.eval_shape(term, 0))
    return jax.lax.fori_loop(0, tiles.count, lambda i, y: y + term(i), zero)

  return _multiplied(how, x, arrays, whole, tiled)


def _forward(how: tuple, x: jax.Array, arrays: dict[str, jax.Array]) -> tuple:
  return product(how, x, arrays), arrays


def _backward(how: tuple, arrays: dict[str, jax.Array], g: Any) -> tuple:
  eq, _, precision, shape, dtype, _ = how

  def whole(g: jax.Array, kernel: jax.Array, shape: tuple = shape) -> jax.Array:
    return to_input(eq, kernel, precision, jax.ShapeDtypeStruct(shape, dtype), g)

  def tiled(g: jax.Array, kernel_of: Callable, tiles: Tiles) -> jax.Array:
    axis, count = tiles.axis, tiles.count
    part = (*shape[:axis], shape[axis] // count, *shape[axis + 1 :])
    parts = jax.lax.map(lambda i: whole(g, kernel_of(i), part), jnp.arange(count))
    return jnp.moveaxis(parts, 0, axis).reshape(shape)

  # Without the barrier XLA would find that the forward pass dequantized already, and keep that.
  arrays, g = jax.lax.optimization_barrier((arrays, g))
  return _multiplied(how, g, arrays, whole, tiled), jax.tree.map(_no_gradient, arrays)


def to_input(eq: str, kernel: jax.Array, precision: Any, x: Any, g: jax.Array) -> jax.Array:
  """The gradient of a product with respect to `x`, of which shape and dtype are given."""
  (dx,) = jax.linear_transpose(lambda x: contract(eq, x, kernel, precision), x)(g)
  return dx


def placed(arrays: dict[str, jax.Array], places: tuple) -> dict[str, jax.Array]:
  """The codes brought together, so that devices exchange them and not what they stand for."""
  return {**arrays, **{n: jax.lax.with_sharding_constraint(arrays[n], at) for n, at in places}}


def _no_gradient(x: jax.Array) -> Any:
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)


product.defvjp(_forward, _backward)
