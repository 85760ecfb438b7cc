"""Transforms: what a method is. `init` adds nodes, `post_step` acts after an optimizer step."""

import dataclasses
import math
import numbers
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax.core import meta

from pelt_jax._leaf import innermost
from pelt_jax._node import BYPASS, Bypass, Chain, Node, Weight, strip
from pelt_jax._site import Site
from pelt_jax._walk import get_at, update_at
from pelt_jax.nodes._tuned import Guard


class PostStep(NamedTuple):
  """What a method does once per optimizer step, with static shapes.

  Attributes:
    init: `params -> state`.
    update: `(state, old, new, grads, record=None) -> (params, state)` on trainable trees with
      holes; `grads` are those after clipping.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Transform:
  """A method.

  Attributes:
    init: `(key, params, sites) -> params` adds nodes; can be jitted with sites static.
    post_step: a `PostStep`, or None.
  """

  init: Callable[[jax.Array, dict, tuple[Site, ...]], dict]
  post_step: PostStep | None = None


def chain(*transforms: Transform) -> Transform:
  """Applies transforms left to right; a later one sees the nodes of the earlier ones.

  Args:
    *transforms: at least one.

  Returns:
    One transform; its post-step runs theirs in the same order.

  Raises:
    TypeError: if an argument is no `Transform`.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.lora(rank=8, alpha=16), pelt.train("head"))
  """
  wrong = [t for t in transforms if not isinstance(t, Transform)]
  if wrong or not transforms:
    raise TypeError(f"chain takes transforms such as pelt.lora(...), got {wrong or 'none'}")

  def init(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    for transform in transforms:
      params = transform.init(key, params, sites)
    return params

  steps = [t.post_step for t in transforms if t.post_step is not None]

  def update(state: tuple, old: Any, new: Any, grads: Any, record: Any = None) -> tuple[Any, tuple]:
    states = []
    for step, mine in zip(steps, state, strict=True):
      new, mine = step.update(mine, old, new, grads, record)
      states.append(mine)
    return new, tuple(states)

  post = PostStep(lambda params: tuple(s.init(params) for s in steps), update) if steps else None
  return Transform(init, post)


def check_whole(**values: int) -> None:
  """Raises ValueError for an option that is no whole number of at least 1."""
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_dropout(dropout: float) -> None:
  """Raises ValueError for a share that is not in [0, 1)."""
  if not 0.0 <= dropout < 1.0:
    raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")


def check_alpha(alpha: float | None) -> None:
  """Raises ValueError for what is no positive number, or None."""
  number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
  if alpha is not None and not (number and math.isfinite(alpha) and alpha > 0):
    raise ValueError(f"alpha must be a positive number, got {alpha!r}")


def site_key(key: jax.Array, path: str, leaf: Any = None) -> jax.Array:
  """The key of one site: folded from its path and the number of nodes already there.

  So neither the order of sites nor other sites matter, and two nodes on one leaf differ.
  """
  depth = 0
  while isinstance(leaf, Node):
    depth, leaf = depth + 1, leaf.inner if isinstance(leaf, Weight) else None
  return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF), depth)


def require(params: dict, site: Site) -> Any:
  """The leaf or node at a leaf site.

  Raises:
    ValueError: if params have nothing there, or (for a plain array) another shape.
  """
  leaf = get_at(params, site.path)
  if leaf is None or isinstance(leaf, dict):
    raise ValueError(
      f"params have no leaf {site.path!r}: pass the params of the model that sites were made of, "
      'such as model.init(key, ...)["params"]'
    )
  shape = leaf.shape if isinstance(leaf, Weight) else strip(leaf).shape
  if tuple(shape) != site.stacked + site.shape:
    raise ValueError(
      f"{site.path!r} has shape {tuple(shape)}, but sites say {site.stacked + site.shape}; "
      "sites and params are of different models"
    )
  return leaf


def over(leaf: Any, make: Callable[[Any], Any]) -> Any:
  """`make(leaf)`, inside the nodes that stay outermost: the guard, a prompt."""
  if isinstance(leaf, Weight) and leaf.outermost:
    return leaf.based(over(leaf.base, make))  # type: ignore[attr-defined]
  return make(leaf)


def like_box(leaf: Any, value: jax.Array, names: tuple[str | None, ...]) -> Any:
  """`value` in a box like the base leaf's, with these axis names; bare if that is bare.

  A tree without boxes stays without; one with boxes has one round every array.
  """
  leaf = innermost(leaf)
  if not meta.is_axis_metadata(leaf):
    return value
  return leaf.replace(value=value, names=names)


def box_names(leaf: Any, ndim: int) -> tuple[str | None, ...]:
  """The axis names of the box round a base leaf, Nones where there is none.

  A box may name the first axes alone, as a partition spec may: attention of Flax, for one, makes
  kernels of three axes by initializers that know two.
  """
  leaf = innermost(leaf)
  names = tuple(leaf.names) if meta.is_axis_metadata(leaf) else ()
  return (*names, *(None,) * (ndim - len(names)))


def letter_names(leaf: Any, stacked: int, kernel: str) -> tuple[tuple, dict[str, str | None]]:
  """`box_names` of the stacked axes, and of the kernel's by letter."""
  names = box_names(leaf, stacked + len(kernel))
  return names[:stacked], dict(zip(kernel, names[stacked:], strict=True))


def add_bypass(params: dict, sites: tuple[Site, ...], path: str, node: Bypass) -> dict:
  """Params with a bypass node at a module, outermost there, and a leaf guarded.

  The guard goes round a leaf of the module itself or below it, else of the nearest enclosing call
  that has one.

  Raises:
    ValueError: if no module call at `path` was traced, or the model reads no leaf to guard.
  """
  if not any(s.kind == "call" and s.path == path for s in sites):
    raise ValueError(
      f"no call of a module at {path!r} was traced, so a bypass there would never run"
    )
  at = f"{path}/{BYPASS}" if path else BYPASS
  before = get_at(params, at)
  if before is not None:
    nodes = before.nodes if isinstance(before, Chain) else (before,)
    node = Chain((*nodes, node), stacked=node.stacked)
  params = update_at(params, {at: node})
  leaves = [s for s in sites if s.kind == "leaf" and s.called]
  owner = path
  while True:
    below = [s for s in leaves if not owner or s.path.startswith(f"{owner}/")]
    if below:  # the shallowest: the module's own, if it has any
      return _guarded(params, min(below, key=lambda s: s.path.count("/")))
    if not owner:
      raise ValueError(f"the model reads no leaf, so a bypass at {path!r} could not be guarded")
    owner = owner.rpartition("/")[0]


def _guarded(params: dict, site: Site) -> dict:
  leaf = get_at(params, site.path)
  if isinstance(leaf, Guard):
    return params
  return update_at(params, {site.path: Guard(leaf, stacked=len(site.stacked))})
