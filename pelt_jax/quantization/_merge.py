"""Merging into 4 bits: what it costs, and a weight that trains what will be merged."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pelt_jax._leaf import lowest, rebased, widened
from pelt_jax._node import Weight, base, contract
from pelt_jax._tree import expanded, merge, refuse_unmergeable
from pelt_jax._walk import one_layer, update_at, walk
from pelt_jax.quantization._layout import coded
from pelt_jax.quantization._product import to_input
from pelt_jax.quantization._weight import NF4Weight


class MergeAware(Weight):
  """A change over 4-bit codes as it will be once merged into codes: y = x Q(W + change).

  Q quantizes as W was. Gradients pass Q as if it were not there (straight-through): those of the
  change are the change's own, and no product of the kernel's size is made for them.

  Attributes:
    base: a weight node over an `NF4Weight`.
  """

  base: Any = base()

  def materialize(self) -> jax.Array:
    return _rounded(self.base)

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    how = (eq, precision, x.shape, x.dtype, lowest(self.base).places(call))
    return _product(how, x, self.base)

  def unmergeable(self) -> str | None:
    return self.base.unmergeable()

  def changed(self) -> int:
    return self.base.changed()

  def rank(self) -> int:
    return min(lowest(self.base).plan.matrix)  # rounding has no rank


class Loss(NamedTuple):
  """What merging a change into 4-bit codes costs at one weight, in Frobenius norms.

  The change is what the weight computes with: of a merge-aware one, after rounding.

  Attributes:
    update: |change| / |W|.
    error: |Q(W + change) - (W + change)| / |change|; above 1 the noise outweighs the change.
    kept: <Q(W + change) - W, change> / |change|^2, the share of the change that is still there.
    codes: the share of the codes that differ.
  """

  update: float
  error: float
  kept: float
  codes: float


def requantize(params: Mapping[str, Any]) -> tuple[dict, dict[str, Loss]]:
  """Merges changes into the 4-bit codes below them, and says what is lost.

  A number goes to the nearest code, where W lies already: where the change is smaller than half the
  distance to the next, it is lost. `pelt.merge` loses nothing and takes 16 or 32 bits a number.
  `pelt.merge_aware` trains what will be merged, and loses nothing here.

  Args:
    params: params with nodes that can be merged, so without adapters, prefixes and prompts. Changes
      of weights that are not in 4 bits are merged as `pelt.merge` does.

  Returns:
    Params whose 4-bit weights are `NF4Weight` nodes and all others plain arrays, for
    `pelt.bypass(model.apply)` and `models.save_pretrained`; and a `Loss` by path of each change.

  Raises:
    TypeError: under `jax.jit`, since numbers are reported.
    ValueError: if there is no change over 4-bit codes; or listing what cannot be merged.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(32), jnp.ones((2, 64))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.qlora(rank=2, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> merged, losses = pelt.quantization.requantize(params)
    >>> type(merged["kernel"]).__name__, losses["kernel"].update  # nothing was trained
    ('NF4Weight', 0.0)
  """
  if any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
    raise TypeError(
      "params hold traced arrays: requantize reports numbers, call it outside jax.jit"
    )
  params = expanded(params)
  refuse_unmergeable(params)
  coded_at = {path: value for path, value in walk(params) if over_codes(value)}
  if all(isinstance(value, NF4Weight) for value in coded_at.values()):
    raise ValueError(
      "params hold no change over 4-bit codes. To quantize a merged model, apply pelt.nf4(...) to "
      "pelt.merge(params)"
    )
  found = {path: _requantized(value) for path, value in coded_at.items()}
  rest = merge(update_at(params, dict.fromkeys(coded_at)))
  losses = {path: loss for path, (_, loss) in found.items() if loss is not None}
  return update_at(rest, {path: node for path, (node, _) in found.items()}), losses


def over_codes(leaf: Any) -> bool:
  """Whether a leaf is a 4-bit weight, or nodes over one."""
  return isinstance(lowest(leaf), NF4Weight)


def _requantized(value: Weight) -> tuple[NF4Weight, Loss | None]:
  """The codes of a whole weight, and what that lost, if it has a change."""
  if isinstance(value, NF4Weight):
    return value, None
  made = _merged(value.base if isinstance(value, MergeAware) else value)
  before, change, error, along, codes = (float(x) for x in _sums(value, made))
  share = lambda part, of: part / of if of > 0 else 0.0
  return made, Loss(
    update=share(change, before) ** 0.5,
    error=share(error, change) ** 0.5,
    kept=share(along, change),
    codes=codes / math.prod(value.shape),
  )


@jax.jit
def _merged(node: Weight) -> NF4Weight:
  """The codes of W + change, layer by layer, as a forward pass of `MergeAware` sees them."""
  if node.stacked:
    made = jax.lax.map(lambda n: _merged(one_layer(n)), node)
    return made.replace(stacked=made.stacked + 1)
  below = lowest(node)
  # Compiled alike whatever stands round it: what is merged is what was trained, to the bit.
  whole = jax.lax.optimization_barrier(widened(node).materialize())
  return below.replace(**coded(below.plan, whole))


@jax.jit
def _sums(value: Weight, made: NF4Weight) -> jax.Array:
  """|W|^2, |change|^2, |error|^2, <what codes hold of it, change>, and how many codes differ."""
  if value.stacked:
    of_layers = jax.lax.map(lambda two: _sums(one_layer(two[0]), one_layer(two[1])), (value, made))
    return jnp.sum(of_layers, axis=0)
  below = lowest(value)
  three = (jnp.asarray(widened(w).materialize(), jnp.float32) for w in (below, value, made))
  before, whole, after = (x.reshape(-1) for x in jax.lax.optimization_barrier(tuple(three)))
  change, error = whole - before, after - whole
  differ = jnp.sum(below.numbers() != made.numbers(), dtype=jnp.float32)
  norms = (jnp.vdot(x, x) for x in (before, change, error))
  return jnp.stack([*norms, jnp.vdot(after - before, change), differ])


@jax.custom_vjp
def _rounded(node: Weight) -> jax.Array:
  return _merged(node).materialize()


def _rounded_forward(node: Weight) -> tuple:
  return _rounded(node), node


def _rounded_backward(node: Weight, g: jax.Array) -> tuple:
  _, back = jax.vjp(lambda n: n.materialize(), node)
  return back(g)


_rounded.defvjp(_rounded_forward, _rounded_backward)


def _kernel(node: Weight, places: tuple) -> jax.Array:
  return _merged(rebased(node, lowest(node).placed(places))).materialize()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: tuple, x: jax.Array, node: Weight) -> jax.Array:
  eq, precision, *_, places = how
  return contract(eq, x, _kernel(node, places), precision)


def _forward(how: tuple, x: jax.Array, node: Weight) -> tuple:
  return _product(how, x, node), (x, node)


def _backward(how: tuple, kept: tuple, g: jax.Array) -> tuple:
  eq, precision, shape, dtype, places = how
  # As in a quantized product: nothing of the kernel's size stays from the forward pass.
  (x, node), g = jax.lax.optimization_barrier((kept, g))
  dx = to_input(eq, _kernel(node, places), precision, jax.ShapeDtypeStruct(shape, dtype), g)
  _, back = jax.vjp(lambda n: n.einsum(eq, x, None, precision), node)
  return dx, *back(g)


_product.defvjp(_forward, _backward)
