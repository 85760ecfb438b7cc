"""Merge-aware training: the forward pass sees the change as it will be merged into 4 bits."""

import functools
from typing import Any

import jax

from pelt_jax._node import Weight
from pelt_jax._site import Site
from pelt_jax._transform import Transform, over, require
from pelt_jax._walk import every_node, update_at
from pelt_jax.nodes import Dropout
from pelt_jax.quantization import MergeAware, NF4Weight
from pelt_jax.quantization._merge import over_codes


def merge_aware() -> Transform:
  """Trains changes over 4-bit weights so that merging them into 4 bits loses nothing.

  y = x Q(W + scaling a b), where Q quantizes as W was quantized, with the gradients of
  y = x (W + scaling a b): a straight-through estimator. Comes last in a chain: a change that is
  added later is none of its. `pelt.quantization.requantize` gives a 4-bit model whose weights are
  bit for bit those that a forward pass of the same params computes with. A step quantizes every
  kernel twice. Under double quantization it does not start quite from the base, as quantizing again
  moves scales in their last digits. An extension: QLoRA (arXiv:2305.14314) trains beside the codes,
  and never sees what a merge into them rounds away.

  Returns:
    A `Transform`, for every leaf with a node over a 4-bit weight.

  Raises:
    ValueError: at init, if there is no such leaf, or one cannot be merged: it has dropout on its
      input, a gate that depends on the input.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(32), jnp.ones((2, 64))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.chain(pelt.qlora(rank=2, targets="kernel"), pelt.merge_aware())
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> y = pelt.bypass(model.apply)({"params": params}, x)
    >>> merged, losses = pelt.quantization.requantize(params)
    >>> bool((pelt.bypass(model.apply)({"params": merged}, x) == y).all())
    True
  """

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    changes = {}
    for site in sites:
      if site.kind == "leaf":
        made = over(require(params, site), functools.partial(_aware, site))
        if any(isinstance(node, MergeAware) for node in every_node(made)):
          changes[site.path] = made
    if not changes:
      raise ValueError(
        "merge_aware: no weight in 4 bits has a change to merge. It comes last: "
        "chain(nf4(...), lora(...), merge_aware())"
      )
    return update_at(params, changes)

  return Transform(initialize)


def _aware(site: Site, leaf: Any) -> Any:
  if not over_codes(leaf) or isinstance(leaf, NF4Weight):
    return leaf
  check_mergeable("merge_aware", site.path, leaf)
  return MergeAware(leaf, stacked=len(site.stacked))


def check_mergeable(method: str, path: str, leaf: Any) -> None:
  """Raises ValueError if a leaf's nodes are no plain array in training."""
  weights = (node for node in every_node(leaf) if isinstance(node, Weight))
  if why := next((why for node in weights if (why := node.unmergeable())), None):
    raise ValueError(f"{method}: {path!r} cannot be merged: {why}")
  if any(isinstance(node, Dropout) for node in every_node(leaf)):
    raise ValueError(
      f"{method}: {path!r} has dropout on the input of its change, which no merged weight can "
      "have; set dropout=0"
    )
