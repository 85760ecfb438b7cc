"""What gated methods share: new gates, and nodes rebuilt round them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pelt_jax._node import Bypass, Chain, Node, Weight
from pelt_jax._transform import over, site_key
from pelt_jax._walk import named_nodes, update_at, walk
from pelt_jax.nodes import Closable, MeanGate, Shift, Tuned


def drawn_gate(
  key: jax.Array,
  path: str,
  like: jax.Array,
  width: int,
  gates: int = 1,
  *,
  start: float = 0.0,
  stacked: int,
  **fields: Any,
) -> MeanGate:
  """A gate that reads `width` numbers, its kernel N(0, 0.02²) and its bias `start`.

  Its arrays are stacked and typed as `like`.
  """
  lead = like.shape[:stacked]
  drawn = jax.random.normal(site_key(key, f"{path}/gate"), (*lead, width, gates), like.dtype)
  bias = jnp.full((*lead, gates), start, like.dtype)
  return MeanGate(0.02 * drawn, bias, stacked=stacked, **fields)


def rewrapped(before: dict, after: dict, wrap: Callable[[str, Any], Any]) -> dict:
  """Params whose nodes that `before` lacks are replaced by `wrap(site's path, node)`.

  Guards, leaves that train as they are, and shifted positions stay.
  """
  old, changes = dict(walk(before)), {}
  for path, value in walk(after):
    new = _bare(value)
    if new is _bare(old.get(path)):
      continue
    if isinstance(value, Chain):  # the last one came last
      new = value.nodes[-1]
    if isinstance(new, Shift | Tuned):
      continue
    if isinstance(value, Chain):
      made = wrap(path.rpartition("/")[0], new)
      changes[path] = value.replace(nodes=(*value.nodes[:-1], made))
    elif isinstance(new, Bypass):
      changes[path] = wrap(path.rpartition("/")[0], new)
    elif isinstance(new, Weight):
      changes[path] = over(value, lambda node, p=path: wrap(p, node))
  return update_at(after, changes)


def _bare(value: Any) -> Any:
  """What lies below the nodes that stay outermost."""
  while isinstance(value, Weight) and value.outermost:
    value = value.inner
  return value


class GatedPart(NamedTuple):
  """A node that a closable gate scales.

  Attributes:
    path: of the outermost node around it.
    module: of the module that this belongs to.
    field: its path with the fields that lead to it.
    node: itself.
    gate: its gate.
  """

  path: str
  module: str
  field: str
  node: Node
  gate: Closable


def gated_parts(tree: Any) -> Iterator[GatedPart]:
  """The nodes in a tree that a closable gate scales."""
  for path, value in walk(tree):
    module = path.rpartition("/")[0]
    for field, node in named_nodes(value, path):
      gate = next((v for _, v in node.children() if isinstance(v, Closable)), None)
      if gate is not None:
        yield GatedPart(path, module, field, node, gate)
