"""Merging into 4 bits: what it costs, and a weight that trains what will be merged."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pelt_jax._node import Weight, base, contract
from pelt_jax._tree import fold, merge, refuse_unmergeable
from pelt_jax._walk import map_nodes, update_at, walk
from pelt_jax.quantization._weight import NF4Weight, coded


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
    below = codes_below(self.base)
    places = () if below is None else below.places(call)
    return _product((eq, precision, x.shape, x.dtype, places), x, self.base)

  def unmergeable(self) -> str | None:
    return self.base.unmergeable()

  def changed(self) -> int:
    return self.base.changed()

  def rank(self) -> int:
    below = codes_below(self.base)
    return self.base.rank() if below is None else min(below.plan.matrix)  # rounding has no rank


class Loss(NamedTuple):
  """What merging a change into 4-bit codes costs at one weight, in Frobenius norms.

  Attributes:
    update: |change| / |W|, of what was trained.
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
    params: params with nodes. Changes of weights that are not in 4 bits are merged by `pelt.merge`.

  Returns:
    Params whose 4-bit weights are `NF4Weight` nodes and all others plain arrays, for
    `pelt.bypass(model.apply)` and `models.save_pretrained`; and a `Loss` by path of each change.

  Raises:
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
  params = fold(params)
  refuse_unmergeable(params)
  coded_at = {path: value for path, value in walk(params) if codes_below(value) is not None}
  if all(isinstance(value, NF4Weight) for value in coded_at.values()):
    raise ValueError(
      "params hold no change over 4-bit codes. To quantize a merged model, apply pelt.nf4(...) to "
      "pelt.merge(params)"
    )
  found = {path: _requantized(value) for path, value in coded_at.items()}
  rest = merge(update_at(params, dict.fromkeys(coded_at)))
  losses = {path: Loss(*map(float, loss)) for path, (_, loss) in found.items() if loss is not None}
  return update_at(rest, {path: node for path, (node, _) in found.items()}), losses


def codes_below(leaf: Any) -> NF4Weight | None:
  """The 4-bit weight under all other nodes of a leaf, if there is one."""
  while isinstance(leaf, Weight) and not isinstance(leaf, NF4Weight):
    leaf = leaf.inner
  return leaf if isinstance(leaf, NF4Weight) else None


def _requantized(value: Weight) -> tuple[NF4Weight, tuple | None]:
  """The codes of a whole weight, and the numbers of its `Loss`, if it has a change."""
  below = codes_below(value)
  assert below is not None  # the caller looked
  if value is below:
    return below, None
  made = _merged(value.base if isinstance(value, MergeAware) else value)
  return made, _loss(value, below, made)


@jax.jit
def _merged(node: Weight) -> NF4Weight:
  """The codes of W + change, layer by layer, as a forward pass of `MergeAware` sees them."""
  if node.stacked:
    one = lambda n: _merged(map_nodes(lambda x: x.replace(stacked=x.stacked - 1), n))
    made = jax.lax.map(one, node)
    return made.replace(stacked=made.stacked + 1)
  below = codes_below(node)
  assert below is not None  # the callers looked
  # Compiled alike whatever stands round it: what is merged is what was trained, to the bit.
  whole = jax.lax.optimization_barrier(node.materialize())
  return below.replace(**coded(below.plan, whole))


@jax.jit
def _loss(value: Weight, below: NF4Weight, made: NF4Weight) -> tuple[jax.Array, ...]:
  three = (jnp.asarray(w.materialize(), jnp.float32) for w in (below, value, made))
  before, whole, after = jax.lax.optimization_barrier(tuple(three))
  change, norm = whole - before, jnp.linalg.norm
  share = lambda part, of: jnp.where(of > 0, part / jnp.where(of > 0, of, 1.0), 0.0)
  size = norm(change.reshape(-1))
  return (
    share(size, norm(before.reshape(-1))),
    share(norm((after - whole).reshape(-1)), size),
    share(jnp.vdot(after - before, change), size**2),
    below.differing(made),
  )


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
  return _merged(_gathered(node, places)).materialize()


def _gathered(node: Weight, places: tuple) -> Weight:
  """The node over codes that were brought together."""
  if isinstance(node, NF4Weight):
    return node.placed(places)
  return node.based(_gathered(node.inner, places)) if places else node


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
  kernel = _kernel(node, places)
  through = lambda x: contract(eq, x, kernel, precision)
  (dx,) = jax.linear_transpose(through, jax.ShapeDtypeStruct(shape, dtype))(g)
  _, back = jax.vjp(lambda n: n.einsum(eq, x, None, precision), node)
  return dx, *back(g)


_product.defvjp(_forward, _backward)
