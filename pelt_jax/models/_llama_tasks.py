"""Llama and its kin with the heads that tasks ask for."""

from __future__ import annotations

from flax import linen as nn

from pelt_jax._site import Role
from pelt_jax.models._attention import Array
from pelt_jax.models._cache import last_token, position
from pelt_jax.models._llama import _Decoder, _dense
from pelt_jax.models._loss import chunked_losses


class LlamaForCausalLM(_Decoder):
  """Language model; the head may be tied to the embedding.

  `loss_chunk` bounds how many positions' logits exist at a time when `labels` are given.
  """

  loss_chunk: int = 1024
  suffix = "ForCausalLM"

  def setup(self) -> None:
    self.model = self._trunk(None)  # setup names it after the attribute
    if not self.config.tie_word_embeddings:
      self.lm_head = _dense(self.config, self.dtype, self.config.vocab_size, False, None)

  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    *,
    labels: Array | None = None,
    segment_ids: Array | None = None,
    cache_length: int | None = None,
    last_only: bool = False,
    at: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Logits, or with `labels` the loss of every token.

    Args:
      input_ids: (B, T) int.
      attention_mask: see `LlamaModel`.
      position_ids: see `LlamaModel`.
      labels: (B, T) int: `labels[:, t]` is the target of position t (already shifted); -100 is
        left out.
      segment_ids: see `LlamaModel`.
      cache_length: see `LlamaModel`.
      last_only: logits of the last position alone, (B, 1, V): all that generation needs.
      at: (B,) int: logits of one position per row alone, (B, V).
      deterministic: False applies dropout.

    Returns:
      Logits (B, T, V); with `labels`, cross entropies (B, T) in float32 at least, 0 where the
      label is -100. The full logits never exist then.
    """
    x = self.model(
      input_ids,
      attention_mask,
      position_ids,
      segment_ids=segment_ids,
      cache_length=cache_length,
      deterministic=deterministic,
    )
    if labels is not None:
      return chunked_losses(self, LlamaForCausalLM.head, x, labels, self.loss_chunk)
    if at is not None:
      return self.head(position(x, at))
    return self.head(x[:, -1:] if last_only else x)

  def head(self, x: Array) -> Array:
    """Hidden states to logits."""
    if self.config.tie_word_embeddings:
      return self.model.embed_tokens.attend(x)
    return self.lm_head(x)

  def _head_roles(self) -> tuple[Role, ...]:
    return () if self.config.tie_word_embeddings else (Role("lm_head"),)


class LlamaForSequenceClassification(_Decoder):
  """One label per row, read off its last real token: logits (B, num_labels)."""

  suffix = "ForSequenceClassification"

  @nn.compact
  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Logits (B, num_labels). The last real token is found by the mask, else by `pad_token_id`."""
    trunk = self._trunk("model")
    x = trunk(input_ids, attention_mask, position_ids, deterministic=deterministic)
    x = last_token(x, input_ids, attention_mask, self.config.pad_token_id)
    return _dense(self.config, self.dtype, self.config.num_labels, False, "score")(x)

  def _head_roles(self) -> tuple[Role, ...]:
    return (Role("score"),)


class LlamaForTokenClassification(_Decoder):
  """One label per token: logits (B, T, num_labels)."""

  suffix = "ForTokenClassification"

  @nn.compact
  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    *,
    segment_ids: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Logits (B, T, num_labels)."""
    x = self._trunk("model")(
      input_ids,
      attention_mask,
      position_ids,
      segment_ids=segment_ids,
      deterministic=deterministic,
    )
    rate = self.config.classifier_dropout
    rate = 0.1 if rate is None else rate  # Hugging Face's default for this head
    x = nn.Dropout(rate, name="dropout")(x, deterministic=deterministic)
    return _dense(self.config, self.dtype, self.config.num_labels, True, "score")(x)

  def _head_roles(self) -> tuple[Role, ...]:
    return (Role("score"),)
