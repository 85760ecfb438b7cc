"""Walks over params: nested dicts whose leaves are arrays and nodes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pelt_jax._node import Node, is_node


def walk(params: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
  """Yields `(path, value)` for every leaf and node of nested dicts, in order."""
  if isinstance(params, Mapping):
    for key, value in params.items():
      yield from walk(value, (*path, str(key)))
  else:
    yield "/".join(path), params


def every_node(tree: Any) -> Iterator[Node]:
  """All nodes of a tree, those inside other nodes too."""
  for value in jax.tree.leaves(tree, is_leaf=is_node):
    if isinstance(value, Node):
      yield value
      for _, below in value.children():
        yield from every_node(below)


def named_nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Node]]:
  """All nodes of a tree with the paths that `map_arrays` gives to what they hold."""
  if isinstance(tree, Node):
    yield path, tree
    tree = dict(tree.children())
  if isinstance(tree, Mapping):
    for name, below in tree.items():
      yield from named_nodes(below, f"{path}/{name}" if path else str(name))
  elif type(tree) is tuple:
    for i, below in enumerate(tree):
      yield from named_nodes(below, f"{path}/{i}")


def map_nodes(fn: Callable[[Any], Any], tree: Any) -> Any:
  """A tree with `fn(node)` in place of every node, those inside a node before it."""
  if isinstance(tree, Node):
    return fn(tree.replace(**{n: map_nodes(fn, v) for n, v in tree.children()}))
  if isinstance(tree, Mapping):
    return {k: map_nodes(fn, v) for k, v in tree.items()}
  return tuple(map_nodes(fn, v) for v in tree) if type(tree) is tuple else tree


def one_layer(node: Any) -> Any:
  """A node whose arrays lost their leading axis."""
  return map_nodes(lambda n: n.replace(stacked=n.stacked - 1), node)


def update_at(params: Any, changes: Mapping[str, Any]) -> dict:
  """A copy of nested dicts with the values at some paths set; missing dicts are made."""
  new = dict(params)
  below: dict[str, dict[str, Any]] = {}
  for path, value in changes.items():
    head, _, rest = path.partition("/")
    if rest:
      below.setdefault(head, {})[rest] = value
    else:
      new[head] = value
  for head, some in below.items():
    new[head] = update_at(new.get(head, {}), some)
  return new


def next_number(named: Mapping[str, Any]) -> int:
  """One more than the largest of the numbers that names start with, `000_prefix`."""
  return max((int(name.partition("_")[0]) for name in named), default=-1) + 1


def get_at(params: Any, path: str) -> Any:
  """The value at a path of nested dicts, or None."""
  for key in path.split("/") if path else ():
    if not isinstance(params, Mapping) or key not in params:
      return None
    params = params[key]
  return params


def map_arrays(fn: Callable[[str, str | None, Any, str], Any], tree: Any, *, is_leaf=None) -> Any:
  """Maps `fn(kind, group, value, path)` over all arrays; arrays outside nodes have kind `base`."""

  def visit(value: Any, kind: str, group: str | None, path: str) -> Any:
    if isinstance(value, Node):
      new = {
        n: visit(v, value.kinds[n], value.group_of(n), f"{path}/{n}") for n, v in value.children()
      }
      return value.replace(**new)
    if isinstance(value, Mapping):
      return {k: visit(v, kind, group, f"{path}/{k}" if path else str(k)) for k, v in value.items()}
    if type(value) in (tuple, list):
      return type(value)(visit(v, kind, group, f"{path}/{i}") for i, v in enumerate(value))
    return jax.tree.map(lambda x: fn(kind, group, x, path), value, is_leaf=is_leaf)

  return visit(tree, "base", None, "")
