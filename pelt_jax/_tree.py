"""What the params tree tells: plain functions of a tree with nodes."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from pelt_jax._node import GENERATORS, Bypass, Node, Weight, innermost, strip, unbox
from pelt_jax._site import Site
from pelt_jax._walk import every_node, map_arrays, update_at, walk

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

  Args:
    params: params with or without generators.

  Returns:
    Params without the key `generators`.
  """
  generators = params.get(GENERATORS, {})
  folded = {k: v for k, v in params.items() if k != GENERATORS}
  for name in sorted(generators, key=_number):
    folded = generators[name].expand(folded)
  return folded


def _number(name: str) -> tuple[int, str]:
  digits = "".join(c for c in name if c.isdigit())
  return (int(digits) if digits else 0, name)


def merge(params: Mapping[str, Any]) -> dict:
  """Plain params that compute the same function without nodes.

  Changes are added in float32 (or wider) and cast back to the leaf's dtype; the base's partitioning
  boxes are restored.

  Args:
    params: params with nodes.

  Returns:
    Nested dicts of arrays.

  Raises:
    ValueError: listing every path that cannot be merged, and why.
  """
  stuck, params = [], fold(params)
  for path, value in walk(params):
    if isinstance(value, Bypass | Weight) and (why := value.unmergeable()):
      stuck.append(f"{path}: {why}")
  if stuck:
    raise ValueError(
      "these nodes cannot be merged into plain params; run them by pelt.bypass(model.apply), keep "
      "them by pelt.save:\n  " + "\n  ".join(stuck)
    )
  return _map_nodes(_plain, params)


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


def shardings(
  params: Mapping[str, Any],
  base_specs: Any,
  mesh: jax.sharding.Mesh,
  *,
  fsdp: Sequence[str] = ("fsdp", "data"),
) -> dict:
  """A `NamedSharding` for every array of params, nodes included.

  A node follows the leaf it stands for: of a kernel partitioned P(in, out), LoRA's a gets P(in,
  None) and b P(None, out). Additions are never partitioned over the axes of fully sharded data
  parallelism, nor along the rank. An axis that does not divide an array is dropped from it.

  Args:
    params: params with nodes.
    base_specs: the plain params' tree of `jax.sharding.PartitionSpec`.
    mesh: the device mesh.
    fsdp: names of the mesh axes used for fully sharded data parallelism.

  Returns:
    The structure of params.

  Raises:
    ValueError: if a leaf of params has no spec.
  """
  P = jax.sharding.PartitionSpec
  known = dict(walk(base_specs))

  def of(path: str, value: Any) -> Any:
    value = unbox(value)  # one sharding in place of each box: it serves the array inside
    if isinstance(value, Node) and not isinstance(value, Weight):
      spec = P(*(None,) * value.stacked)
      return fitted(value, value.specs(tuple(spec), tuple(spec)), mesh)
    spec = _spec_of(known, path, value)
    if not isinstance(value, Weight):
      return fitted(value, P(*spec), mesh)
    tensor = tuple(_without(axis, tuple(fsdp)) for axis in spec)
    return fitted(value, value.specs(spec, tensor), mesh)

  return update_at({}, {path: of(path, value) for path, value in walk(params)})


def gathered(
  params: Mapping[str, Any],
  base_specs: Any,
  mesh: jax.sharding.Mesh,
  *,
  fsdp: Sequence[str] = ("fsdp", "data"),
) -> dict[str, jax.sharding.NamedSharding]:
  """How frozen kernels of 4 bits lie while a product uses them, for `bypass(apply, gathered=...)`.

  Under fully sharded data parallelism a kernel is brought together for each product. XLA by itself
  dequantizes the shards and moves what that gives, 8 times the bytes of the codes (4 in bfloat16).
  With this a product first asks for the codes without the FSDP axes, so codes travel. Tensor axes
  stay: there each device computes with its own part.

  Args:
    params: params with nodes.
    base_specs: as of `shardings`.
    mesh: the device mesh.
    fsdp: as of `shardings`.

  Returns:
    The sharding of one layer's kernel, by path, for every weight node.

  Raises:
    ValueError: if a node has no spec.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> from jax.sharding import PartitionSpec as P
    >>> model, x = nn.Dense(8), jnp.ones((2, 64))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> params = pelt.nf4(targets="kernel").init(jax.random.key(1), params, pelt.sites(model, x))
    >>> mesh, specs = jax.make_mesh((1,), ("fsdp",)), {"kernel": P("fsdp", None), "bias": P()}
    >>> where = pelt.gathered(params, specs, mesh)
    >>> tuple(where["kernel"].spec)
    (None, None)
    >>> params = jax.device_put(params, pelt.shardings(params, specs, mesh))
    >>> pelt.bypass(model.apply, gathered=where)({"params": params}, x).shape
    (2, 8)
  """
  known = dict(walk(base_specs))
  found = {}
  for path, value in walk(params):
    value = unbox(value)
    if not isinstance(value, Weight):
      continue
    spec = _spec_of(known, path, value)[value.stacked :]
    tensor = (_without(axis, tuple(fsdp)) for axis in spec)
    found[path] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*tensor))
  return found


def _spec_of(known: Mapping[str, Any], path: str, value: Any) -> tuple:
  """A leaf's partition spec, one entry per axis."""
  if path not in known:
    raise ValueError(f"base_specs has no PartitionSpec for {path!r}; give P() to replicate it")
  ndim = value.ndim if isinstance(value, Weight) else jnp.ndim(value)
  return (*known[path], *(None,) * (ndim - len(known[path])))


def _without(axis: Any, names: tuple[str, ...]) -> Any:
  left = tuple(a for a in (axis if isinstance(axis, tuple) else (axis,)) if a not in (*names, None))
  return left if len(left) > 1 else (left[0] if left else None)


def fitted(value: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """Specs as shardings, without the axes that do not divide the array."""

  def fit(x: Any, spec: Any) -> jax.sharding.NamedSharding:
    size = lambda a: math.prod(mesh.shape[n] for n in (a if isinstance(a, tuple) else (a,)))
    shape = jnp.shape(x)
    kept = [None if a is None or shape[i] % size(a) else a for i, a in enumerate(spec)]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))

  return jax.tree.map(fit, value, specs)
