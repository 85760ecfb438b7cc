"""What encoder-decoders share: shifted targets, the cache of cross attention, the outer call."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pelt_jax.models._attention import Array
from pelt_jax.models._cache import need_mutable
from pelt_jax.models._layers import Remat
from pelt_jax.models._loss import IGNORED, chunked_losses


def shift_right(ids: Array, start: int, pad: int | None) -> Array:
  """Decoder inputs that belong to targets: `[start, ids[:-1]]`, -100 replaced by `pad`.

  >>> shift_right(jnp.array([[7, 8, 1, -100, -100]]), 0, 3).tolist()
  [[0, 7, 8, 1, 3]]
  """
  shifted = jnp.pad(jnp.asarray(ids)[:, :-1], ((0, 0), (1, 0)), constant_values=start)
  return shifted if pad is None else jnp.where(shifted == IGNORED, pad, shifted)


def keep(module: nn.Module, name: str, value: Array | None, cache_length: int | None) -> Array:
  """Cross attention's keys or values: noted in the cache when given, read from there when not."""
  if value is None:
    if not module.has_variable("cache", name):
      raise ValueError("input_ids=None continues from a cache, and the cache holds no source")
    return module.get_variable("cache", name)
  if cache_length is not None:
    module.put_variable("cache", name, value)
  return value


class Seq2Seq(nn.Module):
  """An encoder-decoder with a language model's head.

  A family says in `setup` what `shared`, `encoder` and `decoder` are, and how it embeds and heads.
  `loss_chunk` bounds how many positions' logits exist at a time when `labels` are given.
  """

  config: Any
  dtype: Any = jnp.float32
  scan: bool = False
  remat: Remat = False
  loss_chunk: int = 1024

  def __call__(
    self,
    input_ids: Array | None,
    attention_mask: Array | None = None,
    *,
    decoder_input_ids: Array | None = None,
    decoder_attention_mask: Array | None = None,
    labels: Array | None = None,
    cache_length: int | None = None,
    last_only: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Logits, or with `labels` the loss of every target.

    With a cache, the first call encodes `input_ids` and notes cross attention's keys and values;
    later calls pass None and go on from there.

    Args:
      input_ids: (B, S) int, the source. Ids past the vocabulary reach the embedding as they are.
      attention_mask: (B, S), 1 for real tokens of the source.
      decoder_input_ids: (B, T) int. By default `labels` shifted right behind
        `decoder_start_token_id`, and without labels the source shifted so.
      decoder_attention_mask: (B, T), 1 for real tokens; by default all are. Padding on the right of
        the targets needs none.
      labels: (B, T) int: `labels[:, t]` is the target of decoder position t; -100 is left out.
      cache_length: N keeps keys and values of N decoder slots in the collection "cache", which must
        be mutable. The caller sees to it that no more than N tokens come.
      last_only: logits of the last position alone, (B, 1, V): all that generation needs.
      deterministic: False applies dropout.

    Returns:
      Logits (B, T, V); with `labels`, cross entropies (B, T) in float32 at least, 0 where the
      label is -100. The full logits never exist then.

    Raises:
      ValueError: no source and no cache to go on from, or a mask of another shape.
    """
    c = self.config
    if cache_length is not None:
      need_mutable(self)
    if decoder_input_ids is None:
      source = input_ids if labels is None else labels
      if cache_length is not None or source is None:
        raise ValueError("decoder_input_ids are needed with a cache and without input_ids")
      decoder_input_ids = shift_right(source, c.decoder_start_token_id, c.pad_token_id)
    memory = None
    if input_ids is not None:
      if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
          f"attention_mask must be {input_ids.shape} like input_ids, got {attention_mask.shape}"
        )
      memory = self.trunk.encoder(
        self.embed(input_ids), attention_mask, deterministic=deterministic
      )
    elif cache_length is None:
      raise ValueError("input_ids=None goes on from a cache: cache_length is needed")
    x = self.trunk.decoder(
      self.embed(decoder_input_ids),
      decoder_attention_mask,
      memory,
      self._source_mask(input_ids, attention_mask, cache_length),
      cache_length,
      deterministic=deterministic,
    )
    if labels is not None:
      return chunked_losses(self, type(self).head, x, labels, self.loss_chunk)
    return self.head(x[:, -1:] if last_only else x)

  @property
  def trunk(self) -> Any:
    """The module that owns the embedding and the stacks."""
    return self

  def embed(self, ids: Array) -> Array:
    """Token ids to what the stacks take."""
    return self.shared(ids)

  def head(self, x: Array) -> Array:
    """Hidden states to logits."""
    raise NotImplementedError

  def _source_mask(
    self, input_ids: Array | None, attention_mask: Array | None, cache_length: int | None
  ) -> Array | None:
    """Which source tokens the decoder may look at, bool (B, 1, 1, S); None for all."""
    mask = None
    if input_ids is not None:
      if attention_mask is not None:
        mask = attention_mask.astype(bool)
      elif cache_length is not None:  # later calls must find one in either case
        mask = jnp.ones(input_ids.shape, bool)
    if cache_length is not None:
      mask = keep(self, "source_mask", mask, cache_length)
    return None if mask is None else mask[:, None, None, :]
