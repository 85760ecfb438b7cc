"""Lists the sites of a Linen model: one abstract run with the backend's interceptor."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax import _call
from pelt_jax._call import Context, Frame
from pelt_jax._leaf import unbox
from pelt_jax._linen import interceptor
from pelt_jax._node import Weight, base, contract, static
from pelt_jax._site import Roles, Site, with_roles
from pelt_jax._walk import update_at, walk


class Probe(Weight):
  """Stands for a leaf while sites are listed, and tells the listener how it is used."""

  base: Any = base()
  path: str = static("")

  def _heard(self, equation: str | None) -> None:
    context = _call.active()
    if isinstance(context, Listening) and not context.in_setup:
      _, uses = context.uses.setdefault(self.path, (self.ndim, []))
      if equation is not None and equation not in uses:
        uses.append(equation)

  def materialize(self) -> jax.Array:
    self._heard(None)
    return self.base

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    self._heard(eq)
    return contract(eq, x, self.base, precision)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    self._heard("lookup")
    return jnp.take(self.base, ids, axis=0)


@dataclasses.dataclass
class Listening(Context):
  """A context that collects calls and uses of leaves."""

  uses: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)
  calls: dict[str, Site] = dataclasses.field(default_factory=dict)

  def listen(self, frame: Frame, out: Any, owned: bool) -> None:
    if owned:
      return
    first = next((v for v in jax.tree.leaves((frame.args, frame.kwargs)) if _is_array(v)), None)
    given = next((v for v in jax.tree.leaves(out) if _is_array(v)), None)
    if frame.method != "__call__" and frame.path in self.calls:
      return
    self.calls[frame.path] = Site(
      path=frame.path,
      kind="call",
      module=type(frame.module).__name__,
      shape=() if first is None else tuple(first.shape),
      dtype="" if first is None else str(first.dtype),
      inputs=tuple(tuple(a.shape) for a in frame.args if _is_array(a)),
      out=() if given is None else tuple(given.shape),
    )


def sites(
  model: nn.Module,
  *args: Any,
  roles: Roles | None = None,
  method: Any = None,
  rngs: Any = None,
  **kwargs: Any,
) -> tuple[Site, ...]:
  """Lists where a method can act in `model`, by an abstract trace: no weights, no FLOPs.

  Args:
    model: a Linen module.
    *args: example inputs of `model.apply`, arrays or `jax.ShapeDtypeStruct`.
    roles: role name -> `Role`s (or `(pattern, placement, tap)`); by default `model.roles`.
    method: the method to trace, as in `model.apply`.
    rngs: random keys for streams the call needs besides `params` and `dropout`.
    **kwargs: keyword inputs; anything that is no array is passed as it is.

  Returns:
    Call sites in the order of their paths, then leaf sites. Hashable.

  Raises:
    TypeError: if `model` is not a Linen module.
    ValueError: if params are stacked on another axis than the first.

  Example:
    >>> import flax.linen as nn, jax.numpy as jnp, pelt_jax as pelt
    >>> [s.path for s in pelt.sites(nn.Dense(3), jnp.ones((2, 4))) if s.kind == "leaf"]
    ['bias', 'kernel']
  """
  if not isinstance(model, nn.Module):
    raise TypeError(f"model must be a flax.linen Module, got {type(model)}")
  flat, tree = jax.tree.flatten((args, kwargs))
  is_array = [_is_array(x) for x in flat]
  arrays = [
    jax.ShapeDtypeStruct(x.shape, x.dtype) for x, a in zip(flat, is_array, strict=True) if a
  ]
  key = jax.eval_shape(lambda: jax.random.key(0))

  def inputs(given):
    given = iter(given)
    merged = [next(given) if a else x for x, a in zip(flat, is_array, strict=True)]
    return jax.tree.unflatten(tree, merged)

  def streams(k):
    return {"params": k, "dropout": k, **(rngs or {})}

  def init(k, given):
    args, kwargs = inputs(given)
    return model.init(streams(k), *args, method=method, **kwargs)

  variables = dict(jax.eval_shape(init, key, arrays))
  params = unbox(variables.pop("params", {}))
  probes = update_at({}, {path: Probe(leaf, path=path) for path, leaf in walk(params)})
  heard = Listening()

  def run(probes, variables, k, given):
    args, kwargs = inputs(given)
    with _call.activate(heard), nn.intercept_methods(interceptor(heard, heard.listen)):
      variables = {**variables, "params": probes}
      return model.apply(variables, *args, method=method, rngs=streams(k), mutable=True, **kwargs)

  jax.eval_shape(run, probes, variables, key, arrays)
  leaves = [_leaf_site(heard, path, leaf) for path, leaf in walk(params)]
  stacked = {site.parent: site.stacked for site in leaves}
  calls = [
    dataclasses.replace(site, stacked=_stacked_at(path, stacked))
    for path, site in sorted(heard.calls.items())
  ]
  roles = getattr(model, "roles", None) if roles is None else roles
  return with_roles((*calls, *leaves), roles)


def _leaf_site(heard: Listening, path: str, leaf: Any) -> Site:
  owner = heard.calls.get(path.rpartition("/")[0])
  ndim, uses = heard.uses.get(path, (leaf.ndim, []))
  lead = leaf.ndim - ndim
  return Site(
    path=path,
    kind="leaf",
    module=owner.module if owner else "",
    shape=tuple(leaf.shape[lead:]),
    dtype=str(leaf.dtype),
    equations=tuple(uses),
    stacked=tuple(leaf.shape[:lead]),
    called=path in heard.uses,
  )


def _stacked_at(path: str, stacked: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
  """A module's stacked axes: its own leaves', those below it, else the nearest enclosing one's."""
  if path in stacked:
    return stacked[path]
  below = [s for p, s in stacked.items() if p.startswith(f"{path}/")] if path else []
  while path:
    if below:
      return min(below, key=len)
    path = path.rpartition("/")[0]
    if path in stacked:
      return stacked[path]
    below = [s for p, s in stacked.items() if p.startswith(f"{path}/")] if path else []
  return ()


def _is_array(x: Any) -> bool:
  return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
