"""A bank taken apart: the base, and each member's params over it."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import Bypass, Chain, Generator, Node, Weight
from pelt_jax._tree import fold
from pelt_jax._walk import map_nodes, update_at, walk
from pelt_jax.nodes._bank import Bank, BankWeight, members_of, over
from pelt_jax.nodes._tuned import Guard, Tuned


def unbank(params: dict) -> tuple[dict, list[dict]]:
  """The base and the members of what `bank` made, in order.

  Leaves that trained beside the members, for all of them, are the new base. So tasks' adapters are
  trained together with the model that they share (multi-task adapters, MT-A, arXiv:2005.00247):

      both = pelt.train("*").init(key, pelt.bank(tasks), sites)  # rows= names each row's task
      base, members = pelt.unbank(trained)

  Args:
    params: with a bank, looped or scanned.

  Returns:
    Params without nodes, in which a head of the members' own is the first one's, and a list of
    params over them. Members that the bank had to widen stay so and compute the same.

  Raises:
    ValueError: if params hold no bank.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> tasks = [{"w": jnp.ones(2), "b": pelt.nodes.Tuned(jnp.full(2, i))} for i in (3.0, 5.0)]
    >>> base, members = pelt.unbank(pelt.bank(tasks))
    >>> base["b"].tolist(), members[1]["b"].value.tolist()
    ([3.0, 3.0], [5.0, 5.0])
  """
  params = fold(params)
  count = members_of(params)
  if count is None:
    raise ValueError("params hold no bank: pass those of pelt.bank(...)")
  members = [member(params, i) for i in range(count)]
  bare = {p: _bare(v) for p, v in walk(members[0]) if not isinstance(v, Bypass | Generator)}
  return update_at({}, bare), members


def member(params: dict, number: int) -> dict:
  """Params of one member of a bank without generators."""
  return update_at({}, {path: _member(value, number) for path, value in walk(params)})


def _member(value: Any, number: int) -> Any:
  """A leaf or node as member `number` has it."""
  if isinstance(value, Guard):
    return value.based(_member(value.base, number))
  if isinstance(value, BankWeight):
    one = _taken(value.members, number, value.stacked)
    return over(one, value.base)
  if isinstance(value, Tuned):
    return value.materialize()
  if isinstance(value, Chain):
    return value.replace(nodes=tuple(_member(node, number) for node in value.nodes))
  if isinstance(value, Bypass) and members_of({"bypass": value}) is not None:
    return _taken(map_nodes(_unwrapped, value), number, value.stacked)
  return value


def _taken(node: Any, number: int, axis: int) -> Any:
  return jax.tree.map(lambda x: jnp.take(x, number, axis=axis), node)


def _unwrapped(node: Node) -> Any:
  """A node without its bank, the member axis still there."""
  if isinstance(node, Bank):
    return node.members
  return node.replace(banked=False) if "banked" in node.kinds else node


def _bare(value: Any) -> Any:
  """The leaf below a member's nodes."""
  while isinstance(value, Weight):
    below = getattr(value, "base", None)
    if below is None:
      return value.materialize() if isinstance(value, Tuned) else value
    value = below
  return value
