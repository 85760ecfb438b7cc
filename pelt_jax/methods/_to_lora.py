"""Any change of the weights as a LoRA, by singular values."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pelt_jax._leaf import lowest, materialize
from pelt_jax._node import Weight
from pelt_jax._site import Site, Targets, find
from pelt_jax._transform import box_names, like_box, require
from pelt_jax._tree import expanded, refuse_unmergeable
from pelt_jax._walk import get_at, update_at, walk
from pelt_jax.methods._lora import _axes, are_matrices
from pelt_jax.methods._low_rank import (
  check_rank,
  joined,
  lora_over,
  svd_of_change,
  svd_of_product,
  truncated,
)
from pelt_jax.nodes import LoraWeight, Tuned
from pelt_jax.nodes._bank import holds_own, owns, same
from pelt_jax.nodes._pairs import Pair, pairs_of


def to_lora(
  params: Mapping[str, Any],
  rank: int | float,
  *,
  sites: tuple[Site, ...],
  base: Mapping[str, Any] | None = None,
  keep: Targets | None = None,
  refit: bool = False,
  dtype: Any = None,
  group: str | None = "trainable",
) -> tuple[dict, dict[str, np.ndarray]]:
  """Turns the changes of all matrices into LoRAs of a rank, and says how far off each is.

  With K_after - K_before = U S V^T, a = U_k and b = S_k V_k^T: no other pair of rank k is nearer
  (Eckart and Young), and the relative error is sqrt(sum_{i>k} s_i^2 / sum_i s_i^2). The scaling is
  1. Whatever `pelt.merge` can merge has such a change: LoRAs of a larger rank or with other
  structure, matrices that trained as they are, a fully fine-tuned checkpoint. It is taken in
  float32 or wider, before the sum is rounded to the weights' dtype. Kernels of any axes are
  matrices as `pelt.lora` sees them, each layer of a stack and each expert for itself.

  Args:
    params: params with nodes, or plain ones of the same model as `base`.
    rank: k, at most the smaller side of a matrix; or a float in (0, 1]: the smallest k with that
      share of sum_i s_i^2, for each matrix on its own (in a stack, smaller ones are filled up with
      zeros). 1.0 is the rank of the change, as far as rounding lets it be seen.
    sites: what `pelt.sites` returned for the model: which axes are inputs.
    base: the params from which the change counts, plain or in 4 bits, and on which the LoRAs lie.
      By default the leaves below the nodes; needed where there are none: for matrices that trained
      as they are, and for plain params.
    keep: roles or path patterns of leaves that stay whole, as they are; by default the head.
    refit: also rewrite LoRAs that are small enough already. By default they stay, bit for bit.
    dtype: dtype of a and b, by default the change's: float32 or wider.
    group: label of what is made.

  Returns:
    Params with a `LoraWeight` over each matrix that changed and a `Tuned` in place of other leaves
    that did; and the relative error by path, one number per layer and expert. Rounding a and b to a
    narrower `dtype` comes on top.

  Raises:
    TypeError: under `jax.jit`, since numbers are reported.
    ValueError: for a bad rank; if nothing changed; naming the nodes that no weight can stand for
      (gates, adapters, prefixes, prompts), or matrices whose base is not known.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3, use_bias=False), jnp.ones((1, 4))
    >>> base = model.init(jax.random.key(0), x)["params"]
    >>> tuned = {"kernel": base["kernel"] + jnp.diag(jnp.array([2.0, 1, 1, 0]))[:, :3]}
    >>> params, errors = pelt.to_lora(tuned, 1, sites=pelt.sites(model, x), base=base)
    >>> params["kernel"].b.shape, round(float(errors["kernel"]) ** 2, 4)  # (1 + 1) / (4 + 1 + 1)
    ((1, 3), 0.3333)
    >>> params, _ = pelt.to_lora(tuned, 0.67, sites=pelt.sites(model, x), base=base)
    >>> params["kernel"].b.shape
    (2, 3)
  """
  check_rank(rank)
  if any(isinstance(x, Tracer) for x in jax.tree.leaves((params, base))):
    raise TypeError("params hold traced arrays: to_lora reports numbers, call it outside jax.jit")
  params = expanded(params)
  refuse_unmergeable(params)
  _check_base(base)
  found = [t.site for t in find(sites, "*", kind="leaf")]
  matrices, whole = are_matrices(found), _kept(sites, keep)

  def convert(site: Site, leaf: Any, below: Any, pairs: list[Pair]) -> tuple[Any, Any]:
    """A LoRA over `below` and its error; below and None if the change is zero."""
    own_rank = pairs[0].rank if len(pairs) == 1 and type(leaf) is LoraWeight else None
    if not refit and own_rank is not None and isinstance(rank, int) and own_rank <= rank:
      return leaf, np.zeros(pairs[0].a.shape[:-2])
    axes = pairs[0].axes if pairs else _axes(site)
    # Of pairs the factors are exact: no difference of large numbers.
    svd = svd_of_product(*joined(pairs)) if pairs else svd_of_change(leaf, below, axes)
    a, b, error = truncated(svd, rank)
    if not bool(jnp.isfinite(error).all()):
      raise ValueError(f"to_lora: the change of {site.path!r} holds infinities or NaNs")
    if not refit and own_rank is not None and own_rank <= a.shape[-1]:
      return leaf, np.zeros(error.shape)
    if not bool(svd.s.any()) or not a.shape[-1]:
      return below, None
    stacked = len(site.stacked)
    made = lora_over(below, a, b, axes, stacked=stacked, dtype=dtype, group=group)
    return made, np.asarray(error)

  made: dict[str, Any] = {}
  errors: dict[str, np.ndarray] = {}
  unknown = []
  for site in found:
    leaf, path = require(params, site), site.path
    below = lowest(leaf) if base is None else _before(base, site, optional=path in whole)
    at_home = base is None or (below is not None and same(lowest(leaf), below))
    if path not in matrices or path in whole:
      stays = at_home and (path in whole or not isinstance(leaf, Weight))
      made[path] = leaf if stays else _tuned(leaf, below, site, group)
    elif base is None and owns(leaf):
      unknown.append(path)
    elif at_home and leaf is lowest(leaf):
      made[path] = below
    else:
      made[path], error = convert(site, leaf, below, _pairs(leaf) if at_home else [])
      errors |= {} if error is None else {path: error}
  if unknown:
    raise ValueError(
      f"to_lora: {unknown[:5]} trained as they are, and what they were is not in params: pass "
      "base=, the params from before, or let them stay as they are by keep="
    )
  if not errors:
    raise ValueError(
      "to_lora: no matrix changed. Pass params with nodes of a method, or plain ones and base="
    )
  return update_at(params, made), errors


def _check_base(base: Mapping[str, Any] | None) -> None:
  for path, value in walk(base or {}):
    if holds_own(value):
      raise ValueError(
        f"base holds a {type(value).__name__} at {path!r}: pass the params from before training, "
        "plain or in 4 bits"
      )


def _kept(sites: tuple[Site, ...], keep: Targets | None) -> set[str]:
  if keep is None:
    return {s.path for s in sites if any(served.role == "head" for served in s.roles)}
  return {t.site.path for t in find(sites, keep, kind="leaf")} if keep else set()


def _before(base: Mapping[str, Any], site: Site, *, optional: bool) -> Any:
  """The leaf of another tree; a task's own may be missing there."""
  return get_at(base, site.path) if optional else require(dict(base), site)


def _tuned(leaf: Any, below: Any, site: Site, group: str | None) -> Any:
  """A leaf that stays whole: `Tuned` if it changed."""
  if isinstance(leaf, Tuned):
    return leaf
  value = materialize(leaf)
  if below is not None and same(value, materialize(below)):
    return below
  boxed = like_box(leaf, value, box_names(leaf, value.ndim))
  return Tuned(boxed, group=group, stacked=len(site.stacked))


def _pairs(leaf: Any) -> list[Pair]:
  """The changes of a leaf, if all are pairs over the same axes; else none."""
  try:
    found = pairs_of(leaf)
  except ValueError:
    return []
  return found if len({p.axes for p in found}) == 1 else []
