"""Several members at one place; each batch row uses the one that `rows` names."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pelt_jax import _call
from pelt_jax._leaf import lowest, rebased
from pelt_jax._node import (
  Branch,
  Bypass,
  Chain,
  Generator,
  Node,
  Weight,
  base,
  is_node,
  own,
  strip,
)
from pelt_jax._tree import HOLE, combine, fold
from pelt_jax._walk import every_node, map_arrays, update_at, walk
from pelt_jax.nodes._composed import Composed
from pelt_jax.nodes._prompt import ExtendedEmbedding
from pelt_jax.nodes._residual import Residual
from pelt_jax.nodes._tuned import Guard


class BankWeight(Weight):
  """Weight nodes over one base: row i of the batch multiplies with member `rows[i]`.

  Attributes:
    base: what all members share.
    members: one weight node without base; its arrays carry the member axis after stacked axes.
  """

  base: Any = base()
  members: Any = own()

  @property
  def inner(self) -> Any:
    return self.members.inner if self.base is None else self.base

  @property
  def shape(self) -> tuple[int, ...]:
    shape = tuple(jnp.shape(strip(self.inner)))
    return shape if self.base is not None else shape[: self.stacked] + shape[self.stacked + 1 :]

  @property
  def count(self) -> int:
    """How many members."""
    return jax.tree.leaves(self.members)[0].shape[self.stacked]

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    inputs, kernel, out = eq.replace("->", ",").split(",")
    if not inputs.startswith("..."):
      if out[0] != inputs[0]:
        raise ValueError(f"a bank needs the batch as first axis of input and output, not {eq!r}")
      eq = f"{inputs[1:]},{kernel}->{out[1:]}"
    return self._by_row(lambda m, row, c: m.einsum(eq, row, c, precision), x, call)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    return self._by_row(lambda m, row, c: m.lookup(row, c), ids, call)

  def spread(self, like: Any, call: Any = None) -> jax.Array:
    row = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)  # `like` may itself be only a shape
    numbers = jnp.arange(like.shape[0])
    return self._by_row(lambda m, _, c: m.spread(row, c), numbers, call)

  def materialize(self) -> jax.Array:
    context = _call.active()
    if context is not None and context.in_setup:  # a rule will serve the module's calls instead
      return jnp.zeros(self.shape, self.dtype)
    raise RuntimeError(
      "a bank has no plain array: each row of the batch has its own. Run it through "
      "pelt.bypass(model.apply) with rows=, in a module that has a rule (pelt.rule)"
    )

  def unmergeable(self) -> str | None:
    return f"a bank of {self.count} members has no single array"

  def rank(self) -> int:
    take = lambda x: jax.lax.index_in_dim(x, 0, self.stacked, keepdims=False)
    one = jax.eval_shape(lambda m: jax.tree.map(take, m), self.members)
    return over(one, self.base).rank()

  def specs(self, spec: tuple, tensor: tuple) -> "BankWeight":
    whole = over(self.members, self.base).specs(spec, tensor)  # as one member's
    split, lead = jax.sharding.PartitionSpec, self.stacked
    members = whole if self.base is None else rebased(whole, None)
    members = jax.tree.map(lambda s: split(*s[:lead], None, *s[lead:]), members)
    return self.replace(base=None if self.base is None else lowest(whole), members=members)

  def _by_row(self, run: Callable, x: jax.Array, call: Any) -> jax.Array:
    if call is None:
      return self.materialize()  # raises: there are no rows to choose by
    mine, common = (
      map_arrays(
        lambda kind, _, x, __, g=given: x if (kind == "given") == g else HOLE, self.members
      )
      for given in (False, True)
    )
    members = call.picked(mine, x.shape[0], self.count)

    def one(member: Weight, row: jax.Array, number: jax.Array) -> jax.Array:
      return run(over(combine(member, common), self.base), row, call.of_row(number))

    return jax.vmap(one)(members, x, jnp.arange(x.shape[0]))


class Bank(Branch):
  """Branches of one kind: row i of the batch runs member `rows[i]`.

  Attributes:
    members: one branch whose arrays carry the member axis after stacked axes.
  """

  members: Any = own()

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    count = jax.tree.leaves(self.members)[0].shape[0]
    members = call.picked(self.members, x.shape[0], count)
    one = lambda m, row, i: m(call.of_row(i), row[None])[0]
    return jax.vmap(one)(members, x, jnp.arange(x.shape[0]))


def bank(members: Sequence[dict] | Mapping[str, dict]) -> dict:
  """One tree that serves several adapters of one base: `rows` chooses a member for each batch row.

  The member axis goes after stacked axes. LoRAs and adapters of unequal width are padded with
  zeros, prompts of unequal length with NaN.

  Each row gathers its member's arrays, so that a product of R rows costs R products of one member,
  however many members there are. (On CPU `jax.lax.ragged_dot` over rows sorted by member costs as
  many as there are members: of LoRAs on 8 rows of 64 tokens and width 576 it takes 2 times as long
  with 8 members, 15 times with 64, and 5 and 37 times with gradients.)

  Args:
    members: params with nodes at the same sites, over the same base; by name, `rows` counts them in
      the order in which they stand.

  Returns:
    Params whose nodes hold all members.

  Raises:
    ValueError: if there are no members, their sites or bases differ, or leaves that they train,
      such as heads, have other shapes; naming both.
  """
  names = list(members) if isinstance(members, Mapping) else list(range(len(members)))
  members = [fold(m) for m in (members.values() if isinstance(members, Mapping) else members)]
  if not members:
    raise ValueError("bank needs at least one member")
  tables = [dict(walk(m)) for m in members]
  for name, table in zip(names, tables, strict=True):
    which = f"members {names[0]!r} and {name!r} of the bank"
    kinds = [{p: type(v) for p, v in t.items() if is_node(v)} for t in (table, tables[0])]
    odd = sorted(dict(set(kinds[0].items()) ^ set(kinds[1].items())))
    if odd:
      raise ValueError(f"{which} differ at {odd[:4]}: give them the same sites")
    if path := other_base(tables[0], table):
      hint = ""
      if any(isinstance(lowest(t[path]), Residual) for t in (tables[0], table)):
        hint = "; their residuals are one base if they started alike, of the same rank and scaling"
      raise ValueError(
        f"{which} have other values at {path!r} of the base: a bank serves adapters of one base"
        f"{hint}"
      )
    for path, value in table.items():
      shapes = [tuple(v.shape) for v in (tables[0][path], value) if isinstance(v, Weight)]
      if len(set(shapes)) > 1:
        raise ValueError(
          f"{which} have {path!r} of shapes {shapes[0]} and {shapes[1]}: the heads of one bank "
          "have the same number of labels"
        )
  out = {}
  for path, first in tables[0].items():
    nodes = [t[path] for t in tables]
    if isinstance(first, Weight):
      out[path] = _bank_weight(nodes, path)
    elif isinstance(first, Bypass):
      out[path] = _bank_bypass(nodes, path)
    elif isinstance(first, Generator) and not all(same_arrays(first, n) for n in nodes):
      raise ValueError(
        f"the members of the bank have different numbers at {path!r}, which all members of a bank "
        "share: give their methods the same options (the seed of vera)"
      )
    else:
      out[path] = first
  return update_at({}, out)


def members_of(params: dict) -> int | None:
  """How many members the bank in params has; None without one."""
  for node in every_node(params):
    if isinstance(node, BankWeight) and jax.tree.leaves(node.members):  # none where all wait
      return node.count
    if isinstance(node, Bank) or getattr(node, "banked", False):
      return jax.tree.leaves(node)[0].shape[node.stacked]
  return None


def member_axes(tree: Any) -> list[int | None]:
  """The member axis of every array, in the order of `jax.tree.leaves`; None outside the bank.

  Args:
    tree: what `bank` made, or a part of it with holes.
  """

  def of(value: Any) -> Any:
    if isinstance(value, Guard):
      return value.based(jax.tree.map(of, value.base, is_leaf=is_node))
    if isinstance(value, BankWeight):
      base = jax.tree.map(lambda _: -1, value.base)
      return value.replace(base=base, members=jax.tree.map(lambda _: value.stacked, value.members))
    axis = value.stacked if isinstance(value, Bypass) else -1
    return jax.tree.map(lambda _: axis, value)

  axes = jax.tree.leaves(jax.tree.map(of, tree, is_leaf=is_node))
  return [None if axis < 0 else axis for axis in axes]


def other_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
  """The first path at which the bases of two trees differ, given as `dict(walk(params))`.

  A leaf that a method replaced is no longer the base's, and may differ; one that only one model
  has, such as its head, is not compared.
  """
  for path, value in one.items():
    if path not in other or owns(value) or owns(other[path]):
      continue
    if not same(lowest(value), lowest(other[path])):
      return path
  return None


def owns(value: Any) -> bool:
  """Whether what lies innermost is the method's own, as in a leaf that trains as it is."""
  below = lowest(value)
  return isinstance(below, Node) and "own" in below.kinds.values()


def holds_own(value: Any) -> bool:
  """Whether a leaf or node has arrays of a method anywhere: 4-bit codes alone are a base."""
  return any("own" in node.kinds.values() for node in every_node(value))


def same(a: Any, b: Any) -> bool:
  """Whether two arrays are equal, as far as it can be told without tracing."""
  a, b = strip(a), strip(b)
  if isinstance(a, Weight) or isinstance(b, Weight):
    return same_arrays(a, b)
  if a is b or not all(isinstance(x, jax.Array | np.ndarray) for x in (a, b)):
    return True
  if isinstance(a, Tracer) or isinstance(b, Tracer):
    return True
  return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


def same_arrays(a: Any, b: Any) -> bool:
  """Whether two trees have one structure and equal arrays."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  return all(map(same, jax.tree.leaves(a), jax.tree.leaves(b)))


def _bank_weight(nodes: list[Any], path: str) -> Any:
  first = nodes[0]
  if isinstance(first, Guard):
    inner = [n.base for n in nodes]
    return first.based(_bank_weight(inner, path) if isinstance(inner[0], Weight) else inner[0])
  if not holds_own(first):
    return first
  below = lowest(first)
  shared = None if below is first else below
  bare = [n if shared is None else rebased(n, None) for n in nodes]
  return BankWeight(
    shared, _stack(bare, first.stacked, path), group=first.group, stacked=first.stacked
  )


def over(member: Weight, shared: Any) -> Weight:
  """A member over what all share; one that shares nothing as it is."""
  return member if shared is None else rebased(member, shared)


def _bank_bypass(nodes: list[Any], path: str) -> Any:
  """Stacks the arrays; branches are wrapped in `Bank`, array-holding bypasses are told."""
  first = nodes[0]
  if isinstance(first, Chain):
    parts = zip(*(n.nodes for n in nodes), strict=True)
    return first.replace(nodes=tuple(_bank_bypass(list(p), path) for p in parts))
  whole = _stack(nodes, first.stacked, path)

  changes = {n: _banked(v) if isinstance(v, Branch) else v for n, v in whole.children()}
  if "banked" in first.kinds:
    changes["banked"] = True
  return whole.replace(**changes)


def _banked(branch: Branch) -> Branch:
  """A branch with a member axis in a `Bank`; of composed ones, what they are composed of."""
  if not isinstance(branch, Composed):
    return Bank(branch, group=branch.group, stacked=branch.stacked)
  changes = {"banked": True} if "banked" in branch.kinds else {}
  return branch.replace(branches=tuple(map(_banked, branch.branches)), **changes)


def _stack(nodes: Sequence[Any], axis: int, path: str) -> Any:
  """Nodes of one structure as one, with a new axis in every array; smaller arrays are padded."""
  structures = {jax.tree.structure(n) for n in nodes}
  if len(structures) > 1:
    raise ValueError(f"the members of the bank have different nodes at {path!r}: {structures}")

  for alike in zip(*map(every_node, nodes), strict=True):
    shapes = [tuple(jnp.shape(x) for x in jax.tree.leaves(node)) for node in alike]
    if not getattr(alike[0], "pads", True) and len(set(shapes)) > 1:
      raise ValueError(
        f"the members of the bank have a {type(alike[0]).__name__} of different sizes at {path!r}, "
        "which cannot be padded: give them one rank and one way of cutting matrices"
      )
  fill = math.nan if isinstance(nodes[0], ExtendedEmbedding) else 0.0

  def join(*arrays: jax.Array | np.ndarray) -> jax.Array:
    shape = tuple(max(s) for s in zip(*(jnp.shape(a) for a in arrays), strict=True))
    missing = lambda a: [(0, n - m) for n, m in zip(shape, jnp.shape(a), strict=True)]
    whole = lambda a: a if jnp.shape(a) == shape else jnp.pad(a, missing(a), constant_values=fill)
    return jnp.stack([whole(a) for a in arrays], axis=axis)

  return jax.tree.map(join, *nodes)
