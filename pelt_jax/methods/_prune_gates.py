"""Params without the parts that `close_gates` closed: an extension, in no paper."""

from typing import Any

import numpy as np
from jax.core import Tracer

from pelt_jax._node import Bypass, Chain, Node, Weight
from pelt_jax._tree import fold
from pelt_jax._walk import update_at, walk
from pelt_jax.methods._gates import gated_parts
from pelt_jax.nodes import Closable, Guard


def closed_gates(params: dict) -> dict[str, np.ndarray]:
  """Which gated parts are closed.

  Args:
    params: of a method with `close_gates`.

  Returns:
    Per module or leaf with a gated part: (), or (L,) under a scan, whether it is closed.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> gate = pelt.nodes.Closable(jnp.full((2,), 0.5), jnp.array([1.0, 0.0]), stacked=1)
    >>> keys = jnp.zeros((2, 3, 1, 4))
    >>> prefix = pelt.nodes.Prefix(keys, keys, gate, stacked=1)
    >>> pelt.closed_gates({"core": {"bypass": prefix}})
    {'core': array([False,  True])}
  """
  shut = lambda part: np.asarray(np.asarray(part.gate.open) < 0.5)
  return {part.path.removesuffix("/bypass"): shut(part) for part in gated_parts(params)}


def prune_gates(params: dict) -> dict:
  """Params without the parts that `close_gates` closed; they compute the same function.

  Open parts keep their gates and cannot be closed any more. Generated prefixes are folded: what
  is left of them trains as it is. If nothing is left at all, params are the plain model's.

  Args:
    params: of a method with `close_gates`.

  Returns:
    Params with fewer nodes.

  Raises:
    ValueError: if params hold no closable gates or are traced; if a scan stacks layers of which
      some are closed and others open, since one program runs them all: unstack them first.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> gate = pelt.nodes.Closable(jnp.array(0.5), jnp.array(0.0))
    >>> prefix = pelt.nodes.Prefix(jnp.zeros((3, 1, 4)), jnp.zeros((3, 1, 4)), gate)
    >>> pelt.prune_gates({"core": {"bypass": prefix}, "bias": jnp.zeros(2)}).keys()
    dict_keys(['bias'])
  """
  params, mixed = fold(params), []
  parts = list(gated_parts(params))
  if not parts:
    raise ValueError("prune_gates: params hold no gates of pelt.close_gates")
  for part in parts:
    if isinstance(part.gate.open, Tracer):
      raise ValueError("prune_gates changes the tree, so it cannot be traced: call it outside jit")
    closed = np.asarray(part.gate.open) < 0.5
    if closed.any() and not closed.all():
      mixed.append(f"{part.path}: of its layers {np.flatnonzero(closed).tolist()} are closed")
  if mixed:
    raise ValueError(
      "prune_gates: a scan runs all layers by one program, so a part goes from all or none. Use "
      "pelt.models.to_looped(pelt.fold(params), model) and scan=False first:\n  "
      + "\n  ".join(mixed)
    )
  kept = {path: new for path, value in walk(params) if (new := _pruned(value)) is not None}
  if not any(isinstance(value, Bypass) for value in kept.values()):
    kept = {p: v.base if isinstance(v, Guard) else v for p, v in kept.items()}
  return update_at({}, kept)


def _pruned(value: Any) -> Any:
  """A leaf or node without closed parts, None if nothing is left."""
  if not isinstance(value, Node):
    return value
  if isinstance(value, Chain):
    left = tuple(n for n in map(_pruned, value.nodes) if n is not None)
    return left[0] if len(left) == 1 else value.replace(nodes=left) if left else None
  gate = next(((n, v) for n, v in value.children() if isinstance(v, Closable)), None)
  if gate is not None and not np.asarray(gate[1].open).any():
    return _pruned(value.base) if isinstance(value, Weight) else None  # type: ignore[attr-defined]
  changes = {n: _pruned(v) for n, v in value.children() if isinstance(v, Node)}
  if any(v is None for v in changes.values()):
    return None
  return value.replace(**changes | ({gate[0]: gate[1].gate} if gate is not None else {}))
