"""Compositions of adapters that were trained alone: stacks and averages."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import BYPASS, Bypass
from pelt_jax._tree import fold
from pelt_jax._walk import update_at, walk
from pelt_jax.methods._named import (
  check_base,
  check_name,
  check_placed,
  check_places,
  frozen,
  one_owner,
  places_of,
  tuned,
  weights_of,
)
from pelt_jax.nodes import Guard, Series, WeightedSum
from pelt_jax.nodes._bank import owns


def stack(
  adapters: Mapping[str, dict], *, head: str | None = None, train: Iterable[str] | None = None
) -> dict:
  """At each place, every adapter reads what the place gives once those before it acted.

  For adapters u_1, u_2 that read the output h of their module (Houlsby's), h_1 = h + u_1(h) and
  then h_1 + u_2(h_1). Pfeiffer's read LN(h + r), then LN(h_1 + r). Parallel ones read a tap, not
  the output: h + u_1(x) + u_2(x). A task's adapter on a language's is MAD-X (arXiv:2005.00052).

  Args:
    adapters: by name and from first to last, params with adapters of one placement, trained on one
      base. One may lack layers that another has. Compositions are adapters too.
    head: name of the adapter whose head the result has, with all else that it trained of the
      model's own leaves. Needed where several trained any; what the others trained is left out.
    train: names of the adapters that train on, with the labels they have; by default all.

  Returns:
    Params, to be run, trained and saved as each adapter's.

  Raises:
    ValueError: if there are no adapters, they are placed differently or have other bases, several
      have heads and none is chosen, or `head` or `train` names none of them.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(1, use_bias=False), jnp.ones((1, 1))
    >>> net = lambda up: pelt.nodes.Bottleneck(x, None, up * x, None)
    >>> task = lambda up: {"kernel": pelt.nodes.Guard(x), "bypass": pelt.nodes.After(net(up))}
    >>> params = pelt.stack({"language": task(2.0), "task": task(3.0)})
    >>> float(pelt.bypass(model.apply)({"params": params}, x)[0, 0])  # (1 + 2) + 3 (1 + 2)
    12.0
  """
  tables = places_of(adapters)
  kinds = {name: {_without_numbers(path) for path in table} for name, table in tables.items()}
  first = next(iter(kinds))
  for name, kind in kinds.items():
    if odd := sorted(kind ^ kinds[first]):
      raise ValueError(
        f"the adapters {first!r} and {name!r} are at different places: {odd[:4]}; stack adapters "
        "of one placement"
      )
  check_placed(tables)

  def compose(nodes: list[Any]) -> Any:
    if len(nodes) == 1:
      return nodes[0].branch
    return Series(tuple(n.branch for n in nodes), group=None, stacked=nodes[0].stacked)

  return _joined(adapters, tables, compose, head, train)


def average(
  adapters: Mapping[str, dict],
  *,
  weights: Mapping[str, Any] | None = None,
  normalize: bool = True,
  head: str | None = None,
  train: Iterable[str] | None = None,
) -> dict:
  """At each place, the weighted mean of the adapters' outputs: h + sum_n w_n u_n(x).

  The residual h counts once, whatever the weights; as they sum to 1, the result is the weighted
  mean of what the places would give with each adapter alone. `soup` averages parameters instead,
  for the cost of one adapter.

  Args:
    adapters: by name, params with adapters at the same places, placed alike, trained on one base.
      Their widths may differ. Compositions are adapters too.
    weights: by name, for every adapter; negative ones subtract. By default 1 / N each.
    normalize: whether the weights are divided by their sum; False takes them as they are.
    head: as for `stack`.
    train: as for `stack`; the weights themselves do not train.

  Returns:
    Params, to be run, trained and saved as each adapter's.

  Raises:
    ValueError: as for `stack`, or if an adapter lacks a place of another, or weights miss an
      adapter, name another, are not finite, or sum to 0 and are to be divided by it.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(1, use_bias=False), jnp.ones((1, 1))
    >>> net = lambda up: pelt.nodes.Bottleneck(x, None, up * x, None)
    >>> task = lambda up: {"kernel": pelt.nodes.Guard(x), "bypass": pelt.nodes.After(net(up))}
    >>> params = pelt.average({"a": task(2.0), "b": task(6.0)}, weights={"a": 3, "b": 1})
    >>> float(pelt.bypass(model.apply)({"params": params}, x)[0, 0])  # 1 + (3 * 2 + 6) / 4
    4.0
  """
  tables = places_of(adapters)
  check_places(tables, "average adapters of one placement")
  shares = weights_of(adapters, weights, normalize)

  def compose(nodes: list[Any]) -> Any:
    axis, leaf = nodes[0].stacked, jax.tree.leaves(nodes[0].branch)[0]
    values = jnp.stack([jnp.asarray(w, np.promote_types(leaf.dtype, jnp.float32)) for w in shares])
    values = jnp.broadcast_to(values, (*leaf.shape[:axis], len(nodes)))
    return WeightedSum(tuple(n.branch for n in nodes), values, group=None, stacked=axis)

  return _joined(adapters, tables, compose, head, train)


def _joined(
  adapters: Mapping[str, dict],
  tables: Mapping[str, dict[str, Any]],
  compose: Callable[[list[Any]], Any],
  head: str | None,
  train: Iterable[str] | None,
) -> dict:
  """One adapter's params in which `compose(placements)` is the branch at every place."""
  keep = tuple(adapters) if train is None else (train,) if isinstance(train, str) else tuple(train)
  for name in keep:
    check_name("train", name, adapters)
  owner = _owner(adapters, head)
  leaves = {name: dict(walk(fold(params))) for name, params in adapters.items()}
  check_base(leaves)
  kept = lambda name, value: value if name in keep else frozen(value)
  out = {p: kept(owner, v) for p, v in leaves[owner].items() if not isinstance(v, Bypass)}
  places: dict[str, list[Any]] = {}
  for name, table in tables.items():
    for path, value in leaves[name].items():
      if isinstance(value, Guard) and path not in out:
        raise ValueError(
          f"the adapters {owner!r} and {name!r} are of different models: the first has no {path!r}"
        )
      if isinstance(value, Guard) and not isinstance(out[path], Guard):
        out[path] = value.based(out[path])
    for path, node in table.items():
      places.setdefault(path, []).append(kept(name, node))
  for path, nodes in places.items():
    at = f"{path}/{BYPASS}" if path else BYPASS
    out[at] = nodes[0].replace(branch=compose(nodes))
  return update_at({}, out)


def _owner(adapters: Mapping[str, dict], head: str | None) -> str:
  """The adapter whose own leaves of the model, such as its head, the composition has."""
  changed = {name: leaves for name, params in adapters.items() if (leaves := tuned(params))}
  for name, leaves in changed.items():
    for path, node in leaves.items():
      if not owns(node):
        inside = node.inner if isinstance(node, Guard) else node
        raise ValueError(
          f"adapters[{name!r}] holds a {type(inside).__name__} at {path!r}, no adapter; "
          "pelt.soup takes any method's params"
        )
  return one_owner(adapters, changed, head)


def _without_numbers(path: str) -> str:
  """A path that stands for those of all layers."""
  return re.sub(r"(?<![^/_])\d+(?![^/])", "*", path)
