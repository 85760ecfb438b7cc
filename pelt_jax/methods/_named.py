"""Adapters by name: params of several tasks, each trained alone on one frozen model."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pelt_jax._node import Bypass, Weight
from pelt_jax._tree import fold
from pelt_jax._walk import map_nodes, walk
from pelt_jax.nodes._bank import holds_own, other_base


def places_of(adapters: Mapping[str, dict]) -> dict[str, dict[str, Any]]:
  """By name, every adapter's placements by their module's path.

  Raises:
    TypeError: if they are no mapping of params.
    ValueError: if there are no adapters, or one's params hold none, or another bypass.
  """
  check_tasks("adapters", adapters)
  return {name: _places(name, params) for name, params in adapters.items()}


def check_tasks(argument: str, tasks: Any) -> None:
  """Raises TypeError unless an argument is a mapping of names to params, ValueError if empty."""
  if not isinstance(tasks, Mapping):
    raise TypeError(
      f'{argument} must be params by name, {{"task": params, ...}}, got {type(tasks).__name__}'
    )
  if not tasks:
    raise ValueError(f"{argument} is empty: name at least one task's params")
  for name, params in tasks.items():
    if not isinstance(params, Mapping):
      raise TypeError(
        f"{argument}[{name!r}] must be params, such as pelt.load(folder, base) gives, got "
        f"{type(params).__name__}"
      )


def _places(name: str, params: dict) -> dict[str, Any]:
  found = {}
  for path, value in walk(fold(params)):
    if not isinstance(value, Bypass):
      continue
    alone = hasattr(value, "branch") and not jax.tree.leaves(value.replace(branch=None))
    if not alone:  # a placement's own arrays, such as a gate, are no branch's
      raise ValueError(f"adapters[{name!r}] holds a {type(value).__name__} at {path!r}, no adapter")
    found[path.rpartition("/")[0]] = value
  if not found:
    raise ValueError(f"adapters[{name!r}] holds no adapter, such as pelt.adapter adds")
  return found


def tuned(params: dict) -> dict[str, Weight]:
  """The leaves that a task changed: its head, and norms if it trained them."""
  return {p: v for p, v in walk(fold(params)) if isinstance(v, Weight) and holds_own(v)}


def check_places(tables: Mapping[str, dict[str, Any]], remedy: str) -> None:
  """Raises ValueError unless all adapters are at the same places, placed alike."""
  (name, first), *others = tables.items()
  for other, table in others:
    if odd := sorted(set(table) ^ set(first)):
      raise ValueError(
        f"the adapters {name!r} and {other!r} are at different places: {odd[:4]}; {remedy}"
      )
  check_placed(tables)


def check_placed(tables: Mapping[str, dict[str, Any]]) -> None:
  """Raises ValueError where two adapters at one place read or add at different points."""
  seen: dict[str, tuple[str, Any]] = {}
  for name, table in tables.items():
    for path, node in table.items():
      other, first = seen.setdefault(path, (name, node))
      bare = [n.replace(branch=None, group=None) for n in (first, node)]
      if type(first) is not type(node) or len({jax.tree.structure(n) for n in bare}) > 1:
        raise ValueError(f"the adapters {other!r} and {name!r} are placed differently at {path!r}")


def check_alike(path: str, one: tuple[str, Any], other: tuple[str, Any]) -> None:
  """Raises ValueError unless two named nodes have the same structure and shapes."""
  (a, first), (b, second) = one, other
  structures = [jax.tree.structure(n) for n in (first, second)]
  if type(first) is not type(second) or structures[0] != structures[1]:
    raise ValueError(
      f"the adapters {a!r} and {b!r} are placed or built differently at {path!r}: their style, "
      "activation and other options must be the same"
    )
  shapes = [[jnp.shape(x) for x in jax.tree.leaves(n)] for n in (first, second)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"the adapters {a!r} and {b!r} have other widths at {path!r}: {shapes[0]} and {shapes[1]}; "
      "pelt.average and pelt.bank take adapters of unequal width"
    )


def frozen(node: Any) -> Any:
  """A node none of whose arrays train."""
  return map_nodes(lambda n: n.replace(group=None), node)


def check_name(argument: str, name: str | None, adapters: Mapping[str, dict]) -> None:
  """Raises ValueError unless an argument is None or names one of the adapters."""
  if name is not None and name not in adapters:
    raise ValueError(f"{argument}={name!r} is none of the adapters {list(adapters)}")


def one_owner(
  adapters: Mapping[str, dict], changed: Mapping[str, Collection[str]], head: str | None
) -> str:
  """The adapter whose own leaves of the model, such as its head, what is made of all has.

  Args:
    adapters: by name.
    changed: the paths of such leaves, of those adapters that have any.
    head: the one chosen, or None.

  Raises:
    ValueError: if several have some and none is chosen.
  """
  check_name("head", head, adapters)
  if head is None and len(changed) > 1:
    some = sorted({path for paths in changed.values() for path in paths})[:4]
    raise ValueError(
      f"the adapters {list(changed)} all trained leaves of the model itself, {some}, which it has "
      f"once: choose whose they are, head={next(iter(changed))!r}"
    )
  return next(iter(changed), next(iter(adapters))) if head is None else head


def check_base(tables: Mapping[str, dict[str, Any]]) -> None:
  """Raises ValueError unless trees, given as `dict(walk(params))`, have one base."""
  (first, one), *others = tables.items()
  for name, table in others:
    if path := other_base(one, table):
      raise ValueError(
        f"the adapters {first!r} and {name!r} have other values at {path!r} of the base: they must "
        "be trained on one frozen model"
      )


def weights_of(
  adapters: Mapping[str, dict], weights: Mapping[str, Any] | None, normalize: bool
) -> list[Any]:
  """One number per adapter, perhaps traced."""
  if weights is None:
    return [1 / len(adapters)] * len(adapters)
  if not isinstance(weights, Mapping):
    raise TypeError(f"weights must be numbers by name, got {type(weights).__name__}")
  if odd := sorted(set(weights) ^ set(adapters)):
    raise ValueError(
      f"weights name {list(weights)} and adapters {list(adapters)}, which differ in {odd}; give "
      "one weight to each"
    )
  values = [weights[name] for name in adapters]
  if any(isinstance(w, Tracer) for w in values):
    return [w / sum(values) for w in values] if normalize else values
  for name, w in weights.items():
    number = isinstance(w, int | float | np.number) or (hasattr(w, "dtype") and not np.ndim(w))
    if not number or not np.isfinite(w):
      raise ValueError(f"weights[{name!r}] must be a finite number, got {w!r}")
  values = [float(w) for w in values]
  total, size = sum(values), sum(map(abs, values))
  if not normalize:
    return values
  if abs(total) <= 1e-6 * size:
    raise ValueError(
      f"weights {dict(weights)} sum to {total:g}, so they cannot be divided by their sum; take "
      "them as they are with normalize=False"
    )
  return [w / total for w in values]
