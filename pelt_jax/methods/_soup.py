"""The mean of several runs' parameters, a model soup (arXiv:2203.05482)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pelt_jax._node import is_node
from pelt_jax._tree import fold
from pelt_jax._walk import map_arrays, update_at, walk
from pelt_jax.methods._named import (
  check_alike,
  check_base,
  check_name,
  check_tasks,
  tuned,
  weights_of,
)
from pelt_jax.nodes._bank import owns, same


def soup(
  adapters: Mapping[str, dict],
  *,
  weights: Mapping[str, Any] | None = None,
  normalize: bool = True,
  head: str | None = None,
) -> dict:
  """The weighted mean of the parameters, as one adapter of the same size (arXiv:2203.05482).

  Any method's params may be averaged: sum_n w_n theta_n in float32 or wider, array by array. This
  is no average of functions (of LoRAs, it averages both factors), and works for runs that stayed
  near each other, such as seeds from one start.

  Args:
    adapters: by name, params of one method with the same options, trained on one base.
    weights: as for `average`.
    normalize: as for `average`.
    head: name of the adapter whose head, and other leaves of the model, the result has; by default
      they are averaged too, which seeds of one task allow.

  Returns:
    Params like each adapter's.

  Raises:
    ValueError: if there are no adapters, their nodes, widths, fixed numbers or bases differ, `head`
      names none of them, weights are as `average` refuses them, or do not sum to 1 where leaves of
      the model itself are averaged.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> seeds = {n: {"bias": pelt.nodes.Tuned(jnp.array(v))} for n, v in (("a", 1.0), ("b", 2.0))}
    >>> float(pelt.soup(seeds)["bias"].value)
    1.5
  """
  check_tasks("adapters", adapters)
  shares = weights_of(adapters, weights, normalize)
  check_name("head", head, adapters)
  leaves = {p for params in adapters.values() for p, v in tuned(params).items() if owns(v)}
  if head is None and leaves and not _sum_to_one(shares):
    raise ValueError(
      f"the weights do not sum to 1, but the adapters trained leaves of the model itself, "
      f"{sorted(leaves)[:4]}, of which only a mean makes sense: normalize, or choose head="
    )
  tables = {name: dict(walk(fold(params))) for name, params in adapters.items()}
  chosen = {} if head is None else {p: tables[head][p] for p in leaves & set(tables[head])}
  tables = {name: table | chosen for name, table in tables.items()}
  check_base(tables)
  (first, model), *others = tables.items()
  if not any(map(is_node, model.values())):
    raise ValueError(f"adapters[{first!r}] holds nothing that a method added")
  for name, table in others:
    if odd := sorted(set(table) ^ set(model)):
      raise ValueError(f"the adapters {first!r} and {name!r} are at different places: {odd[:4]}")
    for path, node in table.items():
      if is_node(node) or is_node(model[path]):
        check_alike(path, (first, model[path]), (name, node))

  def mixed(path: Any, kind: str, *arrays: Any) -> Any:
    if kind == "extra" and not all(same(arrays[0], x) for x in arrays):
      raise ValueError(
        f"the adapters have other fixed numbers at {jax.tree_util.keystr(path)!r}: a soup is of "
        "one method with the same options"
      )
    if kind != "own":
      return arrays[0]
    wide = np.promote_types(arrays[0].dtype, jnp.float32)
    terms = (
      jnp.asarray(w, wide) * jnp.asarray(x, wide) for w, x in zip(shares, arrays, strict=True)
    )
    return jnp.asarray(sum(terms, jnp.zeros((), wide)), arrays[0].dtype)

  trees = [update_at({}, table) for table in tables.values()]
  kinds = map_arrays(lambda kind, *_: kind, trees[0])
  return update_at(jax.tree_util.tree_map_with_path(mixed, kinds, *trees), chosen)


def _sum_to_one(weights: list[Any]) -> bool:
  """As far as it can be told without tracing."""
  return any(isinstance(w, Tracer) for w in weights) or abs(sum(weights) - 1) < 1e-6
