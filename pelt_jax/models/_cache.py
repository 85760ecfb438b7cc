"""Where a decoder's tokens stand: slots of the cache, positions, masks, the last real token."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax.models._attention import Array, padding_mask, segment_positions


class Slots(NamedTuple):
  """Where the tokens of one call stand.

  Attributes:
    queries: (T,) slot numbers of the tokens given.
    keys: (S,) slot numbers that they may look at.
    mask: bool, broadcastable to (B, 1, T, S), or None: what masks besides causality say.
    positions: (B or 1, T) int.
    index: the first slot of the tokens given; None without a cache.
  """

  queries: Array
  keys: Array
  mask: Array | None
  positions: Array
  index: Array | None


def place(
  module: nn.Module,
  attention_mask: Array | None,
  position_ids: Array | None,
  segment_ids: Array | None,
  batch: int,
  length: int,
  cache_length: int | None,
) -> Slots:
  """Places the tokens of one call; with a cache, notes them there.

  Positions count the real tokens from 0 unless they are given.

  Raises:
    ValueError: a cache that is not mutable, too short or of another size, or used with packing.
  """
  if cache_length is None:
    slots = jnp.arange(length, dtype=jnp.int32)
    if position_ids is None:
      position_ids = _positions(attention_mask, segment_ids, length)
    return Slots(slots, slots, padding_mask(attention_mask, segment_ids), position_ids, None)
  if segment_ids is not None or (attention_mask is not None and attention_mask.ndim != 2):
    raise ValueError("a cache takes an attention_mask (B, T) only, and no segment_ids")
  index, valid = _advance(module, attention_mask, batch, length, cache_length)
  if position_ids is None:
    position_ids = jax.lax.dynamic_slice_in_dim(_count(valid), index, length, axis=1)
  queries = index + jnp.arange(length, dtype=jnp.int32)
  keys = jnp.arange(cache_length, dtype=jnp.int32)
  return Slots(queries, keys, valid[:, None, None, :], position_ids, index)


def need_mutable(module: nn.Module) -> None:
  """Raises unless the caller lets the cache change."""
  if not module.is_mutable_collection("cache"):
    raise ValueError('cache_length needs apply(..., mutable=["cache"]); "cache" is not mutable')


def _advance(
  module: nn.Module, attention_mask: Array | None, batch: int, length: int, slots: int
) -> tuple[Array, Array]:
  """Notes the new tokens in the cache; returns their first slot and which slots are real."""
  need_mutable(module)
  if length > slots:
    raise ValueError(f"cache_length={slots} is shorter than the {length} tokens given")
  index = module.variable("cache", "index", jnp.zeros, (), jnp.int32)
  valid = module.variable("cache", "mask", jnp.zeros, (batch, slots), jnp.bool_)
  if valid.value.shape != (batch, slots):
    raise ValueError(
      f"the cache holds (batch, slots) = {valid.value.shape}, this call needs {(batch, slots)}"
    )
  new = jnp.ones((batch, length), bool) if attention_mask is None else attention_mask.astype(bool)
  start = index.value
  valid.value = jax.lax.dynamic_update_slice_in_dim(valid.value, new, start, axis=1)
  index.value = start + length
  return start, valid.value


def remember(module: nn.Module, name: str, new: Array, index: Any, length: int) -> Array:
  """Writes keys or values (B, T, K, D) into the slots from `index` on; returns all `length`."""
  shape = (new.shape[0], length, *new.shape[2:])
  store = module.variable("cache", name, jnp.zeros, shape, new.dtype)
  store.value = jax.lax.dynamic_update_slice_in_dim(store.value, new, index, axis=1)
  return store.value


def last_token(
  x: Array, input_ids: Array, attention_mask: Array | None, pad_token_id: int | None
) -> Array:
  """Each row's hidden state at its last real token: (B, T, D) to (B, D).

  The mask tells which tokens are real, else the padding id; with neither, all are.
  """
  slots = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  if attention_mask is not None and attention_mask.ndim == 2:
    last = jnp.max(jnp.where(attention_mask.astype(bool), slots, 0), axis=1)
  elif pad_token_id is not None:
    last = jnp.max(jnp.where(input_ids != pad_token_id, slots, 0), axis=1)
  else:
    last = jnp.full((x.shape[0],), x.shape[1] - 1, jnp.int32)
  return position(x, last)


def position(x: Array, at: Array) -> Array:
  """Each row's hidden state at one position, (B, T, D) to (B, D); NaN outside of the row."""
  return jnp.take_along_axis(x, at[:, None, None], axis=1, mode="fill")[:, 0]


def _count(mask: Array) -> Array:
  return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def _positions(attention_mask: Array | None, segment_ids: Array | None, length: int) -> Array:
  if segment_ids is not None:
    return segment_positions(segment_ids)
  if attention_mask is not None and attention_mask.ndim == 2:
    return _count(attention_mask)
  return jnp.arange(length, dtype=jnp.int32)[None]
