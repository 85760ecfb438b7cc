"""Attention: the core where prefixes act, masks, rotary positions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pelt_jax.models._config import Rope

Array = jax.Array | np.ndarray
_SCORES = 2**28  # attention scores that may exist at a time, in each layer: 1 GiB in float32


def at_least_float32(dtype: Any) -> Any:
  """The dtype in which reductions run: float32, or float64 for float64."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


class AttentionCore(nn.Module):
  """softmax(scale · q kᵀ + bias) v with grouped key/value heads; it has no parameters.

  It is a module so that a node can stand around it: a prefix hands it longer `k`, `v` and `mask`.
  Any number of keys S will do. Of long contexts some queries attend after others, and the backward
  pass computes their scores again, so that memory grows with T and not with T²; the numbers are
  the same. Dropout of the weights needs all of them at once.

  Attributes:
    dropout: of the weights.
    scale: 1 / √D if None.
  """

  dropout: float = 0.0
  scale: float | None = None

  @nn.compact
  def __call__(
    self,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    bias: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Attends.

    Args:
      q: (B, T, H, D).
      k: (B, S, K, D), where K divides H: head h reads group h // (H / K).
      v: (B, S, K, D).
      mask: bool, broadcastable to (B, 1, T, S); True means "may look".
      bias: added to the scores, broadcastable to (B, 1 or H, T, S).
      deterministic: False applies dropout to the weights.

    Returns:
      (B, T, H, D), in q's dtype.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    # Heads of one group are queries over the same keys: no copy of k and v is made.
    scale = width**-0.5 if self.scale is None else self.scale
    wide = at_least_float32(q.dtype)
    # Rounded once: 48 ** -0.5 in bfloat16 is 0.13 % off.
    q = (q.astype(wide) * jnp.asarray(scale, wide)).astype(q.dtype)
    q = q.reshape(batch, length, groups, heads // groups, width)
    bias = None if bias is None else _grouped(bias, groups)
    mask = None if mask is None else _grouped(mask, groups)
    drop = nn.Dropout(self.dropout, name="dropout") if self.dropout else None
    if drop is not None:
      drop = functools.partial(drop, deterministic=deterministic)
    row = batch * heads * k.shape[1]  # scores of one position
    if length * row <= _SCORES or (drop is not None and not deterministic):
      out = _attend(q, k, v, mask, bias, drop)
    else:
      out = _by_turns(max(1, _SCORES // row), q, k, v, mask, bias)
    return out.reshape(batch, length, heads, width)


def _attend(
  q: Array,
  k: Array,
  v: Array,
  mask: Array | None,
  bias: Array | None,
  drop: Callable[[Array], Array] | None = None,
) -> Array:
  """softmax(q kᵀ + bias) v of scaled queries (B, T, K, G, D); mask and bias (B, 1 or K, ..., S)."""
  wide = at_least_float32(q.dtype)
  scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide)
  if bias is not None:
    scores = scores + bias.astype(wide)
  if mask is not None:
    # Finite, so that a row which may look nowhere (padding) is a mean and not NaN.
    scores = jnp.where(mask, scores, jnp.finfo(wide).min)
  # The weights are normalised after they have met v: (T, D) numbers to divide and not (T, S).
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = jnp.moveaxis(jnp.sum(weights, axis=-1), -1, 1)[..., None]
  weights = weights.astype(v.dtype)
  if drop is not None:
    weights = drop(weights)
  out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=wide)
  return (out / total).astype(q.dtype)


def _by_turns(
  size: int, q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None
) -> Array:
  """The same, `size` queries after others; the backward pass computes each turn's scores again."""

  @functools.partial(jax.checkpoint, static_argnums=1)
  def turn(start: Any, size: int) -> Array:
    def taken(x: Any, axis: int) -> Any:
      if x is None or x.shape[axis] == 1:
        return x
      return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

    return _attend(taken(q, 1), k, v, taken(mask, -2), taken(bias, -2))

  count, rest = divmod(q.shape[1], size)
  out = jax.lax.map(lambda i: turn(i * size, size), jnp.arange(count))
  out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:])
  return jnp.concatenate([out, turn(count * size, rest)], 1) if rest else out


def _grouped(x: Array, groups: int) -> Array:
  """(B, 1 or H, T, S) to (B, 1 or K, 1 or G, T, S)."""
  x = x.reshape((1,) * (4 - x.ndim) + x.shape)
  batch, heads, *rest = x.shape
  return x.reshape(batch, 1 if heads == 1 else groups, 1 if heads == 1 else heads // groups, *rest)


class Positions(nn.Module):
  """The tokens' positions, as they are; a module so that a node can shift them."""

  @nn.compact
  def __call__(self, position_ids: Array) -> Array:
    return position_ids


def causal_mask(
  queries: Array, keys: Array, window: int | None, extra: tuple[Array | None, ...]
) -> Array:
  """May slot t look at slot s? s <= t, t - s < window, and what `extra` masks say.

  Args:
    queries: (T,) slot numbers of the queries.
    keys: (S,) slot numbers of the keys.
    window: how many slots a query sees, its own included; None for all.
    extra: bool masks broadcastable to (B, 1, T, S), or None.

  Returns:
    bool (1 or B, 1, T, S).
  """
  distance = queries[:, None] - keys[None, :]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  mask = mask[None, None]
  for m in extra:
    if m is not None:
      mask = mask & m
  return mask


def padding_mask(attention_mask: Array | None, segment_ids: Array | None) -> Array | None:
  """The part of the mask that comes from the caller, bool (B, 1, 1 or T, S), or None.

  `attention_mask` is (B, S) of 0/1 over keys or (B, T, S); `segment_ids` (B, T) lets a token look
  at its own segment only (0 is padding).
  """
  mask = None
  if attention_mask is not None:
    if attention_mask.ndim not in (2, 3):
      raise ValueError(
        f"attention_mask must be (B, S) or (B, T, S), got shape {attention_mask.shape}"
      )
    mask = attention_mask.astype(bool)
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
  if segment_ids is not None:
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    same = (same & (segment_ids != 0)[:, None, :])[:, None]
    mask = same if mask is None else mask & same
  return mask


def segment_positions(segment_ids: Array) -> Array:
  """Positions that start at 0 in every run of equal segment ids, (B, T) int32.

  >>> segment_positions(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
  [[0, 1, 2, 0, 1, 0]]
  """
  slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
  new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  return slots - jax.lax.cummax(jnp.where(new, slots, 0), axis=1)


def rope_tables(rope: Rope, width: int, positions: Array, dtype: Any) -> tuple[Array, Array]:
  """Cosines and sines of the rotary angles.

  Args:
    rope: the settings.
    width: D, a head's width.
    positions: (B or 1, T) int.
    dtype: compute dtype of the model; angles are computed in float32 at least.

  Returns:
    cos, sin: each (B or 1, T, 1, D / 2), in `dtype`.
  """
  wide = at_least_float32(dtype)
  frequencies, scale = _frequencies(rope, width)
  if rope.rope_type == "dynamic":
    frequencies = _dynamic(rope, width, positions, wide)
  else:
    frequencies = jnp.asarray(frequencies, wide)
  angles = positions.astype(wide)[..., None, None] * frequencies[None, None, None]
  scale = jnp.asarray(scale, wide)
  return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates the pairs (i, i + D/2) of x (B, T, H, D)."""
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _frequencies(rope: Rope, width: int) -> tuple[np.ndarray, float]:
  plain = 1.0 / rope.rope_theta ** (np.arange(0, width, 2) / width)
  if rope.rope_type == "linear":
    return plain / rope.factor, 1.0
  if rope.rope_type == "llama3":
    return _llama3(rope, plain), 1.0
  if rope.rope_type == "yarn":
    return _yarn(rope, width, plain)
  return plain, 1.0


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
  """Long waves are slowed by `factor`, short ones kept, the band between is interpolated."""
  turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
  smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
  smooth = np.clip(smooth, 0.0, 1.0)
  return plain * ((1 - smooth) / rope.factor + smooth)


def _yarn(rope: Rope, width: int, plain: np.ndarray) -> tuple[np.ndarray, float]:
  """YaRN, arXiv:2309.00071, with the released code's defaults."""
  length = rope.original_max_position_embeddings

  def dim_of(turns: float) -> float:
    return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

  low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
  frequencies = plain / rope.factor * ramp + plain * (1 - ramp)

  def mscale(weight: float = 1.0) -> float:
    return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

  scale = rope.attention_factor
  if scale is None:
    one, all_dims = rope.mscale, rope.mscale_all_dim
    scale = mscale(one) / mscale(all_dims) if one and all_dims else mscale()
  return frequencies, scale


def _dynamic(rope: Rope, width: int, positions: Array, wide: Any) -> Array:
  """NTK scaling: the base grows with the longest position seen in this call."""
  trained = rope.original_max_position_embeddings
  length = jnp.maximum(jnp.max(positions) + 1, trained).astype(wide)
  growth = rope.factor * length / trained - (rope.factor - 1)
  base = rope.rope_theta * growth ** (width / (width - 2))
  return 1.0 / base ** jnp.asarray(np.arange(0, width, 2) / width, wide)
