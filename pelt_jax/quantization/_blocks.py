"""Numbers to 4-bit codes and back, block by block, on flat arrays.

Bit for bit what bitsandbytes computes. Blocks whose largest magnitude is denormal (below 1.18e-38)
count as zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax.quantization._code_books import CodeBook, dynamic_map, dynamic_thresholds

NESTED_BLOCK = 256  # scales that share one scale under double quantization
_TINY = np.float32(np.finfo(np.float32).tiny)


def absmax(blocks: jax.Array) -> jax.Array:
  """Largest magnitude along the last axis, float32.

  By integers: reductions of floats flush denormals on some platforms and not on others. Infinities
  and NaNs come out as such.
  """
  bits = jax.lax.bitcast_convert_type(blocks, jnp.int32) & jnp.int32(0x7FFFFFFF)
  largest = jax.lax.bitcast_convert_type(jnp.max(bits, axis=-1), jnp.float32)
  return jnp.where(largest < _TINY, 0.0, largest)


def encode(x: jax.Array, book: CodeBook, block: int) -> tuple[jax.Array, jax.Array]:
  """Codes (uint8, one per number) and scales (float32, one per block) of a flat array.

  scale = max |x| over the block; code = the ordinal of x * (1 / scale) among the thresholds.
  """
  x = jnp.asarray(x, jnp.float32)
  blocks = jnp.pad(x, (0, -x.size % block)).reshape(-1, block)
  if book.scale == "std":
    scales = jnp.broadcast_to(jnp.std(x), blocks.shape[:1])
  else:
    scales = absmax(blocks)
  inverse = jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)
  scaled = blocks * inverse[:, None]
  if book.scale == "absmax":
    scaled = jnp.clip(scaled, -1, 1)
  ordinal = sum(
    (jnp.asarray(scaled > np.float32(t), jnp.uint8) for t in book.thresholds),
    jnp.zeros(blocks.shape, jnp.uint8),
  )
  codes = ordinal
  if book.order != tuple(range(len(book.order))):
    codes = lookup(np.asarray(book.order, np.uint8), ordinal)
  return codes.reshape(-1)[: x.size], scales


def lookup(table: np.ndarray, codes: jax.Array) -> jax.Array:
  """`table[codes]` for a small table: a gather, on TPU a chain of selections."""

  def gather(codes: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table), codes, axis=0, mode="clip")

  return jax.lax.platform_dependent(codes, tpu=functools.partial(selected, table), default=gather)


def selected(table: np.ndarray, codes: jax.Array) -> jax.Array:
  """`table[codes]` without a gather, each value tied to the codes.

  What does not depend on a scan's layers JAX takes out of the loop: 15 arrays of a kernel's size,
  which XLA then keeps in memory (6 GB for 7B parameters) unless it looks hard for something better.
  """
  nothing = jnp.asarray(codes & 0, table.dtype)
  out = table[0] - nothing
  for code, value in enumerate(table[1:], 1):
    out = jnp.where(codes == code, value - nothing, out)
  return out


def encode_scales(scales: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Double quantization: 8-bit codes of scales - offset, and a scale for every 256 of them."""
  rest = jnp.asarray(scales - offset, jnp.float32)
  blocks = jnp.pad(rest, (0, -rest.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
  nested = absmax(blocks)
  scaled = blocks / jnp.where(nested > 0, nested, 1)[:, None]
  codes = jnp.searchsorted(dynamic_thresholds(), scaled, side="left")
  return jnp.asarray(codes, jnp.uint8).reshape(-1)[: rest.size], nested


def decode_scales(codes: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
  """The scales that `encode_scales` keeps, float32."""
  values = jnp.take(jnp.asarray(dynamic_map()), jnp.asarray(codes, jnp.int32), axis=0)
  return values * jnp.repeat(nested, NESTED_BLOCK)[: codes.size] + offset


def pack_bytes(codes: jax.Array, zero: int) -> jax.Array:
  """Two codes a byte along the last axis, the first in the upper half; `zero` fills up."""
  room = [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]
  codes = jnp.pad(codes, room, constant_values=zero)
  return codes[..., 0::2] << 4 | codes[..., 1::2]


def unpack_bytes(packed: jax.Array) -> jax.Array:
  """The codes of `pack_bytes`, those of a byte along a last axis of two."""
  return jnp.stack([packed >> 4, packed & 15], axis=-1)


def pack_words(codes: jax.Array) -> jax.Array:
  """Eight codes a 32-bit word along the first of two axes, the first in the lowest bits."""
  eights = jnp.asarray(codes, jnp.uint32).reshape(-1, 8, codes.shape[-1])
  shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32)[None, :, None]
  return jnp.sum(eights << shifts, axis=1, dtype=jnp.uint32)


def unpack_words(packed: jax.Array) -> jax.Array:
  """The codes of `pack_words`, uint8, those of a word along a second axis of eight."""
  shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32)[None, :, None]
  return jnp.asarray(packed[:, None, :] >> shifts & jnp.uint32(15), jnp.uint8)
