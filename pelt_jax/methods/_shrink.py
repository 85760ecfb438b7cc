"""The ranks that AdaLoRA chose, and factors cut to them (arXiv:2303.10512)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pelt_jax._tree import fold
from pelt_jax._walk import map_nodes, named_nodes
from pelt_jax.nodes import SvdWeight
from pelt_jax.nodes._lora import rank_letter, subscripts


def ranks(params: dict) -> dict[str, int | list[int]]:
  """How many singular values of each matrix are not zero.

  While `adalora` still chooses, what was pruned may be back between two choices: the numbers are
  the budget's at a choice, and final when the schedule's last phase begins. A run that ends before
  keeps more than its budget.

  Args:
    params: params with `SvdWeight` nodes, which `adalora` makes.

  Returns:
    A number per path of the leaf; under a scan a list, one number per layer.

  Raises:
    TypeError: under `jax.jit`, since numbers are reported.
    ValueError: if params hold no such nodes.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> svd = pelt.nodes.SvdWeight(
    ...   jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.array([0.0, 0.5]), 1.0, 0.0
    ... )
    >>> pelt.ranks({"kernel": svd})
    {'kernel': 1}
  """
  found = {}
  for path, node in named_nodes(params):
    if isinstance(node, SvdWeight):
      alive = np.sum(_singular_values(path, node) != 0, -1)
      while path.endswith("/base"):  # of the leaf, not of a node within others
        path = path.removesuffix("/base")
      found[path] = alive.tolist()
  if not found:
    raise ValueError("params hold no SvdWeight nodes: ranks are told of what pelt.adalora made")
  return found


def shrink(params: dict) -> dict:
  """Params without the pruned triplets: every matrix has its own rank, and computes the same.

  The scaling stays as it was: it is of the rank at the start. A matrix of rank 0 is plain again.
  Layers stacked by a scan have the largest rank among them. For what was trained: a run in progress
  would lose what may come back.

  Args:
    params: params with `SvdWeight` nodes.

  Returns:
    Params of the same kind; other nodes are as they were.

  Raises:
    TypeError: under `jax.jit`, since shapes depend on values.
    ValueError: if params hold no such nodes.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> svd = pelt.nodes.SvdWeight(
    ...   jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.array([0.0, 0.5]), 1.0, 0.0
    ... )
    >>> pelt.shrink({"kernel": svd})["kernel"].a.shape
    (4, 1)
  """
  ranks(params)  # for its errors
  return map_nodes(lambda node: _cut(node) if isinstance(node, SvdWeight) else node, fold(params))


def _singular_values(path: str, node: SvdWeight) -> np.ndarray:
  lam = node.array("lam")
  if isinstance(lam, Tracer):
    raise TypeError(f"the singular values at {path!r} are traced: call this outside jax.jit")
  if lam.ndim != node.stacked + 1:
    raise ValueError(f"{path!r} is in a bank: take it apart by pelt.unbank")
  return np.asarray(lam)


def _cut(node: SvdWeight) -> Any:
  """A node with as many triplets as a layer has at most, the others' zeros at the end."""
  alive = _singular_values("", node) != 0
  most = int(alive.sum(-1).max(initial=0))
  if most == 0:
    return node.base
  order = np.argsort(~alive, axis=-1, kind="stable")[..., :most]
  lead, first = node.stacked, subscripts(node.axes)[2].index(rank_letter(node.axes))

  def taken(x: Any, axis: int) -> Any:
    index = order.reshape(
      *order.shape[:-1], *(1,) * (axis - lead), most, *(1,) * (x.ndim - axis - 1)
    )
    return jnp.take_along_axis(x, index, axis=axis)

  cut = lambda name, axis: jax.tree.map(lambda x: taken(x, axis), getattr(node, name))
  return node.replace(
    a=cut("a", node.array("a").ndim - 1), b=cut("b", lead + first), lam=cut("lam", lead)
  )
