"""AdapterFusion: several tasks' adapters, combined by attention (arXiv:2005.00247)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import BYPASS, Branch
from pelt_jax._site import Site
from pelt_jax._transform import Transform, add_bypass, check_dropout, site_key
from pelt_jax._walk import walk
from pelt_jax.methods._adapter_drop import adapters_of
from pelt_jax.methods._lora import _dropout
from pelt_jax.methods._named import check_alike, check_places, check_tasks, frozen, places_of, tuned
from pelt_jax.nodes import Fusion
from pelt_jax.nodes._bank import other_base


def adapter_fusion(
  adapters: Mapping[str, dict],
  *,
  static: bool = False,
  regularization: float = 0.01,
  dropout: float = 0.0,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains, where several tasks have an adapter, which of them to use for each token.

  With x what the adapters read and z_n what adapter n gives, without the residual,
  o = sum_n s_n z_n V, s = softmax_n((x Q + b_q) . (z_n K + b_k)), which takes the place of one
  adapter's output. The adapters and the model stay as they are, and V stays near the identity by
  `regularization` * |V - I|², which `pelt.penalty` gives and `training.train_step` adds. Q and K
  start from N(0, 0.02²), V as the identity with 1e-6 beside its diagonal: 3 d² + 2 d numbers per
  place.

  The tasks' adapters were trained before, each alone on the frozen model (ST-A), or all together
  with the model (MT-A, see `pelt.unbank`); their heads and the new task's are separate
  (`pelt.train("head")`). The weights s come out by `record="fusion"`, (B, T, N) per place.

  Args:
    adapters: by name, params with bottleneck adapters at the same places, of the same widths.
    static: leave V out.
    regularization: weight of |V - I|².
    dropout: share of the weights s dropped in training; none by default. The released code instead
      drops scores before the softmax, by the model's own rate for attention.
    dtype: dtype of the arrays; by default that of the adapters.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`, for params of the model without the adapters.

  Raises:
    TypeError: if adapters are no mapping of names to params.
    ValueError: for fewer than one adapter, or adapters at other places, of other placements or
      widths; at init, if they change the model's own leaves besides a head, were trained on another
      base, or params hold adapters there.

  Example:
    >>> import pelt_jax as pelt
    >>> node = pelt.nodes.Bottleneck(None, None, None, None)
    >>> tasks = {n: {"ffn": {"bypass": pelt.nodes.After(node)}} for n in ("sst2", "trec")}
    >>> method = pelt.chain(pelt.adapter_fusion(tasks), pelt.train("head"))
  """
  check_dropout(dropout)
  if regularization < 0:
    raise ValueError(f"regularization must be at least 0, got {regularization!r}")
  check_tasks("adapters", adapters)
  names = tuple(adapters)
  tables = places_of(adapters)
  bases = {name: dict(walk(params)) for name, params in adapters.items()}
  changed = {name: tuned(params) for name, params in adapters.items()}
  first = tables[names[0]]
  check_places(tables, "fuse adapters of one placement")
  for name, table in tables.items():
    for path, node in table.items():
      check_alike(path, (names[0], first[path]), (name, node))

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    known = {s.path: s for s in sites if s.kind == "call"}
    heads = {s.path for s in sites if any(r.role == "head" for r in s.roles)}
    for name, paths in changed.items():
      if own := sorted(set(paths) - heads):
        raise ValueError(
          f"adapters[{name!r}] changes leaves of the model, {own[:4]}, which several cannot do at "
          "once; train it without (train_norms=False)"
        )
    own = dict(walk(params))
    for name, leaves in bases.items():
      if path := other_base(own, {p: v for p, v in leaves.items() if p not in heads}):
        raise ValueError(
          f"adapters[{name!r}] was trained on another base: params have other values at {path!r}. "
          "Pass the params that the adapters were trained on"
        )
    for path, node in first.items():
      if path not in known:
        raise ValueError(f"the adapters have a place {path!r} that the model does not call")
      if adapters_of(own.get(f"{path}/{BYPASS}")):
        raise ValueError(
          f"params hold an adapter at {path!r} already, which would act beside the fusion: pass "
          "the model's own params"
        )
      if known[path].shape[-1] != known[path].out[-1]:
        raise ValueError(f"the adapters at {path!r} read another width than they give")
      branches = [tables[name][path].branch for name in names]
      axis = node.stacked
      stack = lambda *arrays, axis=axis: jnp.stack(arrays, axis)
      members = frozen(jax.tree.map(stack, *branches))
      branch = fused(site_key(key, path), known[path], members, axis)
      new = node.replace(branch=branch, group=group)
      params = add_bypass(params, sites, path, new)
    return params

  def fused(key: jax.Array, site: Site, members: Branch, stacked: int) -> Fusion:
    d, lead = site.out[-1], site.stacked
    kind = jnp.dtype(dtype or jax.tree.leaves(members)[0].dtype)
    first, second = jax.random.split(key)
    draw = lambda k: 0.02 * jax.random.normal(k, (*lead, d, d), kind)
    near = jnp.eye(d, dtype=kind) + 1e-6 * (1 - jnp.eye(d, dtype=kind))
    zeros = jnp.zeros((*lead, d), kind)
    return Fusion(
      members,
      draw(first),
      zeros,
      draw(second),
      zeros,
      None if static else jnp.broadcast_to(near, (*lead, d, d)),
      _dropout(site, dropout, jnp.float32),
      names=names,
      regularization=float(regularization),
      group=group,
      stacked=stacked,
    )

  return Transform(initialize)
