"""BERT and RoBERTa with the head they were pretrained with: masked language models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax._site import Role
from pelt_jax.models._attention import Array
from pelt_jax.models._bert import _dense, _Encoder, _norm
from pelt_jax.models._cache import position
from pelt_jax.models._config import EncoderConfig
from pelt_jax.models._llama import activation


class BertPredictionTransform(nn.Module):
  """LayerNorm(act(dense(x)))."""

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    x = activation(c.hidden_act)(_dense(c, self.dtype, c.hidden_size, "dense")(x))
    return _norm(c, self.dtype)(x)


class BertPredictions(nn.Module):
  """The transform, and one bias per token of the vocabulary."""

  config: EncoderConfig
  dtype: Any

  def setup(self) -> None:
    self.transform = BertPredictionTransform(self.config, self.dtype)
    self.bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.dtype)

  def __call__(self, x: Array) -> tuple[Array, Array]:
    return self.transform(x), self.bias


class BertOnlyMLMHead(nn.Module):
  """Holds the predictions, as in the checkpoints."""

  config: EncoderConfig
  dtype: Any

  def setup(self) -> None:
    self.predictions = BertPredictions(self.config, self.dtype)

  def __call__(self, x: Array) -> tuple[Array, Array]:
    return self.predictions(x)


class RobertaLMHead(nn.Module):
  """LayerNorm(gelu(dense(x))), and one bias per token of the vocabulary."""

  config: EncoderConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config
    self.dense = _dense(c, self.dtype, c.hidden_size, None)
    self.layer_norm = _norm(c, self.dtype, None)
    self.bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), self.dtype)

  def __call__(self, x: Array) -> tuple[Array, Array]:
    return self.layer_norm(jax.nn.gelu(self.dense(x), approximate=False)), self.bias


class _MaskedLM(_Encoder):
  suffix = "ForMaskedLM"

  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    token_type_ids: Array | None = None,
    *,
    segment_ids: Array | None = None,
    at: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Logits of what stands at each position: g(x) Eᵀ + b with the embedding E.

    Args:
      input_ids: (B, T) int, the mask's id where a token is asked for.
      attention_mask: see `BertModel`.
      position_ids: see `BertModel`.
      token_type_ids: see `BertModel`.
      segment_ids: see `BertModel`.
      at: (B,) int: one position per row; only its logits are made.
      deterministic: False applies dropout.

    Returns:
      (B, T, V); with `at`, (B, V).
    """
    trunk, head = getattr(self, self.prefix), self.lm_head if self.prefix == "roberta" else self.cls
    x = trunk(
      input_ids,
      attention_mask,
      position_ids,
      token_type_ids,
      segment_ids=segment_ids,
      deterministic=deterministic,
    )
    x, bias = head(x if at is None else position(x, at))
    scores = trunk.attend(x)
    return scores + jnp.expand_dims(jnp.asarray(bias, scores.dtype), range(scores.ndim - 1))


class BertForMaskedLM(_MaskedLM):
  """What stands at each position, by BERT's own head: logits (B, T, V)."""

  def setup(self) -> None:
    self.bert = self._trunk(pooler=False, name=None)
    self.cls = BertOnlyMLMHead(self.config, self.dtype)

  def _head_roles(self) -> tuple[Role, ...]:
    transform = "cls/predictions/transform"
    return (Role(f"{transform}/dense"), Role(f"{transform}/LayerNorm"), Role("cls/predictions"))


class RobertaForMaskedLM(_MaskedLM):
  """What stands at each position, by RoBERTa's own head: logits (B, T, V)."""

  def setup(self) -> None:
    self.roberta = self._trunk(pooler=False, name=None)
    self.lm_head = RobertaLMHead(self.config, self.dtype)

  def _head_roles(self) -> tuple[Role, ...]:
    return (Role("lm_head/dense"), Role("lm_head/layer_norm"), Role("lm_head"))
