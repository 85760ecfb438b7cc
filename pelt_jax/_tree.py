"""What the params tree tells: plain functions of a tree with nodes."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from pelt_jax._leaf import innermost
from pelt_jax._node import GENERATORS, Bypass, Node, Weight, strip
from pelt_jax._site import Site
from pelt_jax._walk import every_node, map_arrays, walk

HOLE = optax.MaskedNode()


def is_hole(x: Any) -> bool:
  """Whether `x` marks a place that another tree fills."""
  return isinstance(x, optax.MaskedNode)


def labels(tree: Any) -> Any:
  """A tree of group labels: the node's `group` for arrays that train, `"frozen"` for all others.

  What `optax.multi_transform` takes; works on params and on updates.

  Args:
    tree: params, or a tree of the same structure.

  Returns:
    The same structure with strings.

  Example:
    >>> import pelt_jax as pelt, jax.numpy as jnp
    >>> pelt.labels({"w": jnp.ones(2), "b": pelt.nodes.Tuned(jnp.ones(2))})["b"].value
    'trainable'
  """
  return map_arrays(lambda kind, group, _, __: _label(kind, group), tree)


def _label(kind: str, group: str | None) -> str:
  return group if kind == "own" and group is not None else "frozen"


def partition(params: Any, *, extra: bool = False) -> tuple:
  """Splits params into trees of the same structure whose holes are `optax.MaskedNode()`.

  Args:
    params: params with nodes.
    extra: also split what belongs to the method but does not train from the base.

  Returns:
    `(trainable, frozen)`, or with `extra` `(trainable, extra, base)`.

  Raises:
    ValueError: if nothing trains.
  """

  def kept(want: Callable[[str, str | None], bool]) -> Any:
    return map_arrays(lambda k, g, x, _: x if want(k, g) else HOLE, params, is_leaf=is_hole)

  trains = lambda k, g: _label(k, g) != "frozen"
  trainable = kept(trains)
  if not jax.tree.leaves(trainable):
    raise ValueError(
      "nothing in params trains: add nodes first, method.init(key, params, pelt.sites(model, ...))"
    )
  if not extra:
    return trainable, kept(lambda k, g: not trains(k, g))
  mine = lambda k, g: k in ("own", "extra") and not trains(k, g)
  return trainable, kept(mine), kept(lambda k, g: not trains(k, g) and not mine(k, g))


def combine(*trees: Any) -> Any:
  """Joins trees that `partition` made: each place is filled by the tree without a hole there.

  Args:
    *trees: at least one tree.

  Returns:
    The joined tree; a place where all have holes stays a hole.

  Raises:
    ValueError: if two trees have a value at one place, naming it; or if structures differ.
  """
  if not trees:
    raise ValueError("combine needs at least one tree")

  def pick(path: Any, *values: Any) -> Any:
    filled = [v for v in values if not is_hole(v)]
    if len(filled) > 1:
      raise ValueError(f"combine: {len(filled)} trees have a value at {jax.tree_util.keystr(path)}")
    return filled[0] if filled else HOLE

  return jax.tree_util.tree_map_with_path(pick, *trees, is_leaf=is_hole)


def value_and_grad(loss: Callable, has_aux: bool = False) -> Callable:
  """`jax.value_and_grad` with respect to the trainable part alone.

  Args:
    loss: `loss(params, *args)`.
    has_aux: whether it returns `(loss, aux)`.

  Returns:
    A function `(trainable, frozen, *args, **kwargs) -> (value, grads)`; grads have trainable's
    structure, holes included.
  """

  def joined(trainable: Any, frozen: Any, *args: Any, **kwargs: Any) -> Any:
    return loss(combine(trainable, frozen), *args, **kwargs)

  return jax.value_and_grad(joined, has_aux=has_aux)


def fold(params: Mapping[str, Any]) -> dict:
  """Runs the generators once and drops them: what serves needs none.

  Those stay that put one array into many nodes (`vera`, `ia3`), so that a file holds it once.

  Args:
    params: params with or without generators.

  Returns:
    Params without the key `generators`, or with those that stay.
  """
  return _run(params, lambda generator: not generator.kept)


def expanded(params: Mapping[str, Any]) -> dict:
  """Params without generators: what every node computes with."""
  return _run(params, lambda _: True)


def _run(params: Mapping[str, Any], which: Callable[[Any], bool]) -> dict:
  generators = params.get(GENERATORS, {})
  left = {name: g for name, g in generators.items() if not which(g)}
  out = {k: v for k, v in params.items() if k != GENERATORS}
  out |= {GENERATORS: left} if left else {}
  for name in sorted(generators.keys() - left.keys(), key=_number):
    out = generators[name].expand(out)
  return out


def _number(name: str) -> tuple[int, str]:
  digits = "".join(c for c in name if c.isdigit())
  return (int(digits) if digits else 0, name)


def merge(params: Mapping[str, Any]) -> dict:
  """Plain params that compute the same function without nodes.

  Changes are added in float32 (or wider) and cast back to the leaf's dtype; the base's partitioning
  boxes are restored (a kernel that was quantized has none any more).

  Args:
    params: params with nodes.

  Returns:
    Nested dicts of arrays.

  Raises:
    ValueError: listing every path that cannot be merged, and why.
  """
  params = expanded(params)
  refuse_unmergeable(params)
  return _map_nodes(_plain, params)


def refuse_unmergeable(params: Mapping[str, Any]) -> None:
  """Raises ValueError listing every path that cannot be merged, and why."""
  nodes = ((p, v) for p, v in walk(params) if isinstance(v, Bypass | Weight))
  if stuck := [f"{path}: {why}" for path, v in nodes if (why := v.unmergeable())]:
    raise ValueError(
      "these nodes cannot be merged into plain params; run them by pelt.bypass(model.apply), keep "
      "them by pelt.save:\n  " + "\n  ".join(stuck)
    )


def _plain(value: Any) -> Any:
  if not isinstance(value, Weight):
    return value
  box, plain = innermost(value), value.materialize()
  return meta.replace_boxed(box, plain) if meta.is_axis_metadata(box) else plain


def _map_nodes(fn: Callable, tree: Any) -> Any:
  if isinstance(tree, Mapping):
    return {k: _map_nodes(fn, v) for k, v in tree.items()}
  return fn(tree)


def delta(params: Mapping[str, Any]) -> dict:
  """What the method added: all `own` and `extra` arrays, holes elsewhere.

  Args:
    params: params with nodes.

  Returns:
    The same structure; `combine(delta(params), rest)` gives params back.
  """
  keep = lambda kind, group, x, path: x if kind in ("own", "extra") else HOLE
  return map_arrays(keep, params, is_leaf=is_hole)


def penalty(params: Mapping[str, Any]) -> jax.Array:
  """The sum of the nodes' own regularisers, weights included; 0.0 where there are none.

  Args:
    params: params with nodes.

  Returns:
    A scalar to add to the loss.
  """
  found = [n.penalty() for n in penalised(params)]
  wide = functools.reduce(np.promote_types, (p.dtype for p in found), np.dtype(np.float32))
  return sum((p.astype(wide) for p in found), jnp.zeros((), wide))


def penalised(tree: Any) -> list[Node]:
  """The nodes of a tree whose class has a regulariser."""
  return [n for n in every_node(tree) if type(n).penalty is not Node.penalty]


@dataclasses.dataclass(frozen=True)
class Count:
  """Parameter counts; all but `head` leave the head out when it is known.

  Attributes:
    trainable: entries with optimizer state.
    stored: entries a task's file holds after folding generators.
    changed: entries of the base that may differ.
    rank: largest rank of the change of one matrix.
    head: trainable entries of the task's head, None if no sites were given.
    total: entries of the base.
    bytes: bytes of the trainable entries, head included.
  """

  trainable: int
  stored: int
  changed: int
  rank: int
  head: int | None
  total: int
  bytes: int


def count(params: Mapping[str, Any], sites: tuple[Site, ...] | None = None) -> Count:
  """Counts what trains, what is stored, what changes and by which rank.

  Args:
    params: params with nodes.
    sites: what `pelt.sites` returned; with them the head is counted apart.

  Returns:
    A `Count`.
  """
  heads = {s.path for s in sites or () if any(r.role == "head" for r in s.roles)}
  apart = lambda path: any(path == h or path.startswith(f"{h}/") for h in heads)
  found: collections.Counter[str] = collections.Counter()

  def visit(kind: str, group: str | None, x: Any, path: str) -> None:
    size = math.prod(jnp.shape(x))
    if _label(kind, group) != "frozen":
      found["head" if apart(path) else "trainable"] += size
      found["bytes"] += size * x.dtype.itemsize

  map_arrays(visit, params)
  folded = jax.eval_shape(fold, params) if GENERATORS in params else params  # shapes suffice

  def stored(kind: str, group: str | None, x: Any, path: str) -> None:
    if kind == "own" and not apart(path):
      found["stored"] += math.prod(jnp.shape(x))

  map_arrays(stored, folded)
  rank = 0
  for path, value in walk(folded):
    if isinstance(value, Weight):
      found["total"] += math.prod(value.shape)
      if not apart(path):
        found["changed"] += value.changed()
        rank = max(rank, value.rank())
    elif not isinstance(value, Node):
      found["total"] += math.prod(jnp.shape(strip(value)))
  return Count(
    trainable=found["trainable"],
    stored=found["stored"],
    changed=found["changed"],
    rank=rank,
    head=found["head"] if sites is not None else None,
    total=found["total"],
    bytes=found["bytes"],
  )
