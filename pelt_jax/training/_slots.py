"""The arrays of N jobs: what of them is padding, and how a slot takes a new one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pelt_jax.nodes._bank import member_axes


def real_entries(leaves: list, sizes: list) -> list:
  """Which entries of one member's arrays are its own."""

  def of(x: jax.Array, size: jax.Array) -> jax.Array:
    within = (lax.broadcasted_iota(size.dtype, x.shape, k) < size[k] for k in range(x.ndim))
    return functools.reduce(jnp.logical_and, within, jnp.ones(x.shape, bool))

  return [of(x, size) for x, size in zip(leaves, sizes, strict=True)]


def cleaned(leaves: list, real: list) -> list:
  """Arrays with zeros as padding, which is NaN in prompts."""
  return [jnp.where(r, x, jnp.zeros_like(x)) for x, r in zip(leaves, real, strict=True)]


def first_of_two(two: Any, like: Any) -> list:
  """The first one's arrays in a bank of two, of the dtypes of another bank; None of the base's.

  Raises:
    ValueError: if they are wider than those of the other bank, or of other nodes.
  """
  if jax.tree.structure(two) != jax.tree.structure(like):
    raise ValueError("params have other nodes than the jobs: make them by the same method")
  found = []
  paths = jax.tree_util.tree_leaves_with_path(like)
  for (path, x), new, axis in zip(paths, jax.tree.leaves(two), member_axes(like), strict=True):
    shape = None if axis is None else x.shape[:axis] + x.shape[axis + 1 :]
    if axis is not None:
      new = lax.index_in_dim(new, 0, axis, keepdims=False)
      if new.shape != shape:
        raise ValueError(
          f"params need {new.shape} at {jax.tree_util.keystr(path)}, wider than a slot's {shape}: "
          "start the jobs with one member as wide as any that will come"
        )
    found.append(None if axis is None else jnp.asarray(new, x.dtype))
  return found


def set_slot(x: jax.Array, new: jax.Array, slot: Any, axis: int) -> jax.Array:
  return x.at[(slice(None),) * axis + (slot,)].set(new, mode="drop")


def injected_with(optimizer: Any, values: dict[str, Any]) -> Any:
  """An optimizer's state with other hyperparameters.

  Raises:
    ValueError: for one that the transformation does not inject, or schedules, or another number of
      values than there are jobs.
  """
  injected = lambda x: hasattr(x, "hyperparams")
  known: set[str] = set()
  scheduled: set[str] = set()

  def set_in(x: Any) -> Any:
    if not injected(x):
      return x
    scheduled.update(getattr(x, "hyperparams_states", {}))
    known.update(x.hyperparams)
    new = {k: _like(v, x.hyperparams[k], k) for k, v in values.items() if k in x.hyperparams}
    inner = jax.tree.map(set_in, x.inner_state, is_leaf=injected)
    return x._replace(hyperparams=x.hyperparams | new, inner_state=inner)

  found = jax.tree.map(set_in, optimizer, is_leaf=injected)
  if odd := sorted(values.keys() - known):
    raise ValueError(
      f"{odd[0]}: tx injects {sorted(known) or 'nothing'}; what differs by job comes in by "
      f"optax.inject_hyperparams(...)({odd[0]}=...)"
    )
  if odd := sorted(values.keys() & scheduled):
    raise ValueError(
      f"{odd[0]} is a schedule in tx, which overrides any number: inject a function of the number "
      f"that makes its schedule inside, inject_hyperparams(lambda {odd[0]}: ...)"
    )
  return found


def _like(value: Any, old: jax.Array, name: str) -> jax.Array:
  value = jnp.asarray(value, old.dtype)
  if value.shape not in ((), old.shape):
    raise ValueError(f"{name} has shape {value.shape}: expected a number, or {old.shape}")
  return jnp.broadcast_to(value, old.shape)
