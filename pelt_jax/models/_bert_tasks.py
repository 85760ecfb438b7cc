"""BERT and RoBERTa with heads that a task trains: sequence and token classification."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pelt_jax._site import Role
from pelt_jax.models._attention import Array
from pelt_jax.models._bert import _dense, _Encoder
from pelt_jax.models._config import EncoderConfig


class _SequenceClassification(_Encoder):
  """What reads one token of each row.

  Attributes:
    pooled_only: compute the last layer for that token alone. The logits are the same, for less
      (with dropout, of that layer's masks of another shape): `model.clone(pooled_only=True)`. Needs
      `scan=False`; gates that are means over a row's tokens refuse it.
  """

  pooled_only: bool = False


class BertForSequenceClassification(_SequenceClassification):
  """One label per row, from BERT's pooled first token: logits (B, num_labels)."""

  suffix = "ForSequenceClassification"

  @nn.compact
  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    token_type_ids: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Logits (B, num_labels)."""
    _, x = self._trunk(pooler=True, pooled_only=self.pooled_only)(
      input_ids, attention_mask, position_ids, token_type_ids, deterministic=deterministic
    )
    x = self._dropout(x, deterministic)
    return _dense(self.config, self.dtype, self.config.num_labels, "classifier")(x)


class RobertaHead(nn.Module):
  """out_proj(dropout(tanh(dense(dropout(first token)))))."""

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    c = self.config
    rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
    drop = nn.Dropout(rate, deterministic=deterministic, name="dropout")
    x = jnp.tanh(_dense(c, self.dtype, c.hidden_size, "dense")(drop(x[:, 0])))
    return _dense(c, self.dtype, c.num_labels, "out_proj")(drop(x))


class RobertaForSequenceClassification(_SequenceClassification):
  """One label per row, from RoBERTa's two-layer head: logits (B, num_labels)."""

  suffix = "ForSequenceClassification"

  @nn.compact
  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    token_type_ids: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Logits (B, num_labels)."""
    x = self._trunk(pooler=False, pooled_only=self.pooled_only)(
      input_ids, attention_mask, position_ids, token_type_ids, deterministic=deterministic
    )
    return RobertaHead(self.config, self.dtype, name="classifier")(x, deterministic)

  def _head_roles(self) -> tuple[Role, ...]:
    return (Role("classifier/dense"), Role("classifier/out_proj"))


class BertForTokenClassification(_Encoder):
  """One label per token: logits (B, T, num_labels)."""

  suffix = "ForTokenClassification"

  @nn.compact
  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    token_type_ids: Array | None = None,
    *,
    segment_ids: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Logits (B, T, num_labels)."""
    x = self._trunk(pooler=False)(
      input_ids,
      attention_mask,
      position_ids,
      token_type_ids,
      segment_ids=segment_ids,
      deterministic=deterministic,
    )
    x = self._dropout(x, deterministic)
    return _dense(self.config, self.dtype, self.config.num_labels, "classifier")(x)
