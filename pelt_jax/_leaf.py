"""What stands at a leaf of the params: an array, perhaps in a box, or weight nodes over one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from pelt_jax._node import Node, Weight, contract, strip


def innermost(leaf: Any) -> Any:
  """What lies below all weight nodes of a leaf: an array, in its box if it has one."""
  while isinstance(leaf, Weight):
    leaf = leaf.inner
  return leaf


def lowest(leaf: Any) -> Any:
  """What lies below the nodes that lie on others: an array, or a node of codes or values."""
  while "base" in getattr(leaf, "kinds", ()) and leaf.base is not None:
    leaf = leaf.base
  return leaf


def rebased(leaf: Any, below: Any) -> Any:
  """The nodes of a leaf, however many lie on each other, over something else than `lowest`."""
  wraps = "base" in getattr(leaf, "kinds", ())
  return leaf.based(rebased(leaf.base, below)) if wraps else below


def widened(leaf: Any) -> Any:
  """A leaf over the same numbers in float32 or wider, which rounds no small changes away."""
  below = lowest(leaf)
  wide = np.promote_types(strip(below).dtype, np.float32)
  if not isinstance(below, Weight):
    return rebased(leaf, jnp.asarray(strip(below), wide))
  return rebased(leaf, below.replace(kind=str(wide)) if "kind" in below.kinds else below)


def unbox(tree: Any) -> Any:
  """Strips partitioning boxes from a tree and inside its nodes, and keeps the nodes.

  `flax.linen.unbox` would merge the nodes silently: to Flax a node is a box of its plain array.
  """

  def visit(x: Any) -> Any:
    x = strip(x)
    if isinstance(x, Node):
      is_leaf = meta.is_axis_metadata
      return x.replace(**{n: jax.tree.map(visit, v, is_leaf=is_leaf) for n, v in x.children()})
    return x

  return jax.tree.map(visit, tree, is_leaf=meta.is_axis_metadata)


def product(eq: str, x: jax.Array, w: Any, call: Any = None, precision: Any = None) -> jax.Array:
  """The product of `x` with an array or a weight node."""
  if isinstance(w, Weight):
    return w.einsum(eq, x, call, precision)
  return contract(eq, x, w, precision)


def table_rows(table: Any, ids: jax.Array, call: Any = None) -> jax.Array:
  """Rows of an array or of a weight node."""
  return (
    table.lookup(ids, call) if isinstance(table, Weight) else jnp.take(strip(table), ids, axis=0)
  )


def materialize(w: Any) -> jax.Array:
  """The plain array of an array, a box or a weight node."""
  return w.materialize() if isinstance(w, Weight) else strip(w)
