"""Generators: shared parameters that fill nodes elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import BYPASS, Chain, Generator, own, static
from pelt_jax._walk import get_at, update_at
from pelt_jax.nodes._placements import Prefix


class PrefixMLP(Generator):
  """One MLP makes the keys and values of every layer (prefix tuning's reparametrisation).

  `tanh(embedding @ w1 + b1) @ w2 + b2`, (P, 2 * layers * heads * width), laid out k0, v0, k1, ...

  Attributes:
    embedding: (P, e).
    w1: (e, hidden).
    b1: (hidden,).
    w2: (hidden, 2 * layers * heads * width).
    b2: (2 * layers * heads * width,).
    sites: paths of the modules whose waiting `Prefix` is filled, in order.
    heads: (key-value heads, head width).
  """

  embedding: Any = own()
  w1: Any = own()
  b1: Any = own()
  w2: Any = own()
  b2: Any = own()
  sites: tuple[str, ...] = static(())
  heads: tuple[int, int] = static((1, 1))

  def expand(self, params: dict) -> dict:
    embedding, w1, b1, w2, b2 = (self.array(n) for n in ("embedding", "w1", "b1", "w2", "b2"))
    table = jnp.tanh(embedding @ w1 + b1[None]) @ w2 + b2[None]
    table = table.reshape(table.shape[0], -1, 2, *self.heads)  # (P, layers, 2, heads, width)
    changes, layer = {}, 0
    for site in self.sites:
      path = f"{site}/{BYPASS}" if site else BYPASS
      bypass = get_at(params, path)
      stacked = _waiting(bypass).stacked
      if stacked > 1:
        raise ValueError(f"{path}: a prefix generator serves one stacked axis, not {stacked}")
      if stacked:  # a scan: all the layers left belong to this site
        keys, values = (jnp.moveaxis(table[:, layer:, i], 1, 0) for i in (0, 1))
      else:
        keys, values = table[:, layer, 0], table[:, layer, 1]
        layer += 1
      changes[path] = _fill(bypass, keys, values)
    return update_at(params, changes)


def _fill(bypass: Any, keys: jax.Array, values: jax.Array) -> Any:
  """The bypass with its first waiting prefix filled; generators run in the order of addition."""
  if isinstance(bypass, Chain):
    first = next(i for i, n in enumerate(bypass.nodes) if _is_waiting(n))
    filled = _fill(bypass.nodes[first], keys, values)
    return bypass.replace(nodes=(*bypass.nodes[:first], filled, *bypass.nodes[first + 1 :]))
  return bypass.replace(keys=keys, values=values)


def _is_waiting(node: Any) -> bool:
  return isinstance(node, Prefix) and node.keys is None


def _waiting(bypass: Any) -> Prefix:
  nodes = bypass.nodes if isinstance(bypass, Chain) else (bypass,)
  return next(n for n in nodes if _is_waiting(n))
