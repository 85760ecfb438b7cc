"""LoRAs that start from a part of the weight, which the frozen weight then lacks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from pelt_jax._node import Weight, strip
from pelt_jax._site import Site
from pelt_jax._transform import Transform
from pelt_jax.methods._lora import on_lora
from pelt_jax.nodes import LoraWeight, Residual
from pelt_jax.nodes._axes import from_pair, to_matrices, to_pair, wide

# (matrix (..., in, out), rank, scaling, key) -> a (..., in, rank), b (..., rank, out)
Factor = Callable[[jax.Array, int, Any, jax.Array], tuple[jax.Array, jax.Array]]


def split(method: str, factor: Factor, *args: Any, **options: Any) -> Transform:
  """`lora(*args, **options)` whose a and b are factors of W, over W - scaling * a @ b."""

  def wrap(site: Site, node: LoraWeight, key: jax.Array) -> LoraWeight:
    if isinstance(node.base, Weight):
      raise ValueError(
        f"{method} takes a plain weight apart, and {site.path!r} has a {type(node.base).__name__}: "
        f"put {method} first in a chain, over weights that are not quantized"
      )
    return started(node, factor, key)

  return on_lora(method, wrap, *args, **options)


def started(node: LoraWeight, factor: Factor, key: jax.Array) -> LoraWeight:
  """A LoRA over a plain weight that starts from factors of it."""
  kernel, stacked = strip(node.base), node.stacked
  matrix = to_matrices(jnp.asarray(kernel, wide(kernel)), node.axes)
  scaling = jnp.asarray(node.scaling, matrix.dtype)
  rank = to_pair(node.array("a"), node.array("b"), node.axes)[0].shape[-1]
  one: Callable = lambda of: factor(of[0], rank, of[1], of[2])
  for _ in range(stacked):  # layer by layer: a decomposition is larger than what is kept of it
    one = functools.partial(jax.lax.map, one)
  left, right = one((matrix, scaling, jax.random.split(key, kernel.shape[:stacked])))
  pair = from_pair(left, right, node.axes, kernel.shape)
  a, b = (
    meta.replace_boxed(old, jnp.asarray(new, strip(old).dtype))
    for old, new in zip((node.a, node.b), pair, strict=True)
  )
  start = Residual(None, a, b, node.scaling, None, axes=node.axes, group=None, stacked=stacked)
  below = start.of(node.base)
  # Copies: a step that donates what trains must not take what stays.
  a, b = (jax.tree.map(jnp.copy, x) for x in (a, b))
  return node.replace(base=below, a=a, b=b)
