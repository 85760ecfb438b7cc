"""Leaves that train as they are: full fine-tuning and parts of it."""

from collections.abc import Iterable
from typing import Any

from pelt_jax._node import Node, Weight, strip
from pelt_jax._site import Site, Targets, find
from pelt_jax._transform import Transform, over, require
from pelt_jax._walk import update_at
from pelt_jax.nodes import Tuned


def train(
  targets: Targets, *, layers: Iterable[int] | None = None, group: str | None = "trainable"
) -> Transform:
  """Trains the leaves that targets name, as they are.

  A role or a module pattern claims every leaf below that holds no node yet. A pattern that names a
  leaf exactly must find it free.

  Args:
    targets: roles (`"head"`), module patterns, leaf patterns (`"LayerNorm/*"`, `"*"`), or several.
    layers: layer numbers to keep; all by default.
    group: the label of these leaves.

  Returns:
    A `Transform`.

  Raises:
    ValueError: at init, if a target matches nothing or a leaf it names exactly holds a node.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> pelt.count(
    ...   pelt.train("bias").init(jax.random.key(1), params, pelt.sites(model, x))
    ... ).trainable
    3
  """

  def init(key: Any, params: dict, sites: tuple[Site, ...]) -> dict:
    changes = {}
    for site in claimed(sites, targets, layers):
      leaf = require(params, site)
      if _is_free(leaf):
        changes[site.path] = over(leaf, lambda x, s=site: _tuned(x, s, group))
      elif _names_exactly(targets, site):
        raise ValueError(
          f"train({targets!r}): {site.path!r} holds a {type(leaf).__name__} already; two methods "
          "cannot train one leaf"
        )
    if not changes:
      raise ValueError(f"train({targets!r}): every leaf it names holds a node of another method")
    return update_at(params, changes)

  return Transform(init)


def full() -> Transform:
  """Full fine-tuning: every leaf trains (specification: theta <- theta - optimizer(grad)).

  Returns:
    A `Transform`.

  Raises:
    ValueError: at init, if params hold nodes already.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> pelt.count(pelt.full().init(jax.random.key(1), params, pelt.sites(model, x))).trainable
    15
  """

  def init(key: Any, params: dict, sites: tuple[Site, ...]) -> dict:
    changes = {}
    for site in (s for s in sites if s.kind == "leaf"):
      leaf = require(params, site)
      if isinstance(leaf, Node):
        raise ValueError(
          f"full() trains every leaf, but {site.path!r} holds a {type(leaf).__name__}"
        )
      changes[site.path] = _tuned(leaf, site, "trainable")
    return update_at(params, changes)

  return Transform(init)


def claimed(sites: tuple[Site, ...], targets: Targets, layers: Any) -> list[Site]:
  """Leaf sites that targets name, and those below the modules they name."""
  targets = (targets,) if isinstance(targets, str) else tuple(targets)
  picked: dict[str, Site] = {}
  for target in targets:
    calls = [s for s in sites if s.kind == "call"]
    try:
      modules = {t.site.path for t in find((*calls,), target, kind="call")}
    except ValueError:
      modules = set()
    below = [
      s for s in sites if s.kind == "leaf" and any(s.path.startswith(f"{m}/") for m in modules if m)
    ]
    try:
      exact = [t.site for t in find(sites, target, kind="leaf")]
    except ValueError:
      if not below:
        raise
      exact = []
    picked |= {s.path: s for s in (*below, *exact)}
  found = tuple(s for s in sites if s.path in picked)
  if layers is None:
    return list(found)
  return [t.site for t in find(found, tuple(s.path for s in found), kind="leaf", layers=layers)]


def _is_free(leaf: Any) -> bool:
  while isinstance(leaf, Weight) and leaf.outermost:
    leaf = leaf.inner
  return not isinstance(leaf, Weight)


def _tuned(leaf: Any, site: Site, group: str | None) -> Tuned:
  dtype = strip(leaf).dtype
  kind = str(dtype) if dtype.itemsize < 4 else None  # a float32 master may take its place
  return Tuned(leaf, kind=kind, group=group, stacked=len(site.stacked))


def _names_exactly(targets: Targets, site: Site) -> bool:
  targets = (targets,) if isinstance(targets, str) else tuple(targets)
  return any(t == site.path or site.path.endswith(f"/{t}") for t in targets)
