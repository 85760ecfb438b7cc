"""BERT and RoBERTa: post-norm encoders with learned positions.

Modules carry the names of the Hugging Face checkpoints, `/` for `.`; see `_load` for the mapping.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax._site import Role
from pelt_jax.models._attention import Array, AttentionCore, Positions, padding_mask
from pelt_jax.models._config import EncoderConfig
from pelt_jax.models._layers import Remat, constrain, run_layers
from pelt_jax.models._llama import activation

_FAMILIES = {"bert": "Bert", "roberta": "Roberta"}


def _dense(config: EncoderConfig, dtype: Any, features: int, name: str | None) -> nn.Dense:
  return nn.Dense(
    features,
    dtype=dtype,
    param_dtype=dtype,
    kernel_init=nn.initializers.normal(config.initializer_range),
    name=name,
  )


class LayerNorm(nn.LayerNorm):
  """Flax's, which promotes dtypes on purpose and so needs that to be allowed."""

  def __call__(self, x: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):
      return super().__call__(x)


def _pooled(x: Array) -> Array:
  """The token that stands for a row, (B, 1, d)."""
  return x[:, :1]


def _norm(config: EncoderConfig, dtype: Any, name: str | None = "LayerNorm") -> LayerNorm:
  # E[x²] - E[x]² loses half the digits where the mean is large.
  return LayerNorm(
    config.layer_norm_eps, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name
  )


class BertEmbeddings(nn.Module):
  """LayerNorm(word + position + token type)."""

  config: EncoderConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config

    def table(rows: int) -> nn.Embed:
      init = nn.initializers.normal(c.initializer_range)
      return nn.Embed(
        rows, c.hidden_size, dtype=self.dtype, param_dtype=self.dtype, embedding_init=init
      )

    self.word_embeddings = table(c.vocab_size)
    self.token_type_embeddings = table(c.type_vocab_size)
    self.position_embeddings = table(c.max_position_embeddings)
    self.LayerNorm = _norm(c, self.dtype, None)
    self.dropout = nn.Dropout(c.hidden_dropout_prob)

  def __call__(
    self, input_ids: Array, position_ids: Array, token_type_ids: Array, deterministic: bool
  ) -> Array:
    x = self.word_embeddings(input_ids)
    x = x + self.token_type_embeddings(token_type_ids)
    x = x + self.position_embeddings(position_ids)
    return self.dropout(self.LayerNorm(x), deterministic=deterministic)


class BertSelfAttention(nn.Module):
  """Query, key and value projections around the core."""

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Array, mask: Array | None, deterministic: bool, pooled_only: bool = False
  ) -> Array:
    c = self.config
    heads = c.num_attention_heads

    def project(name: str, x: Array) -> Array:
      y = _dense(c, self.dtype, c.hidden_size, name)(x)
      return y.reshape(*y.shape[:-1], heads, c.hidden_size // heads)

    asking = _pooled(x) if pooled_only else x
    if pooled_only and mask is not None:
      mask = mask[:, :, :1]
    core = AttentionCore(c.attention_probs_dropout_prob, name="core")
    out = core(
      project("query", asking),
      project("key", x),
      project("value", x),
      mask,
      deterministic=deterministic,
    )
    return out.reshape(asking.shape)


class BertOutput(nn.Module):
  """LayerNorm(residual + dropout(dense(x))): the end of both sublayers."""

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, residual: Array, deterministic: bool) -> Array:
    c = self.config
    x = _dense(c, self.dtype, c.hidden_size, "dense")(x)
    x = nn.Dropout(c.hidden_dropout_prob, name="dropout")(x, deterministic=deterministic)
    return constrain(_norm(c, self.dtype)(x + residual))


class BertAttention(nn.Module):
  """Self attention and its output sublayer."""

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Array, mask: Array | None, deterministic: bool, pooled_only: bool = False
  ) -> Array:
    h = BertSelfAttention(self.config, self.dtype, name="self")(x, mask, deterministic, pooled_only)
    x = _pooled(x) if pooled_only else x
    return BertOutput(self.config, self.dtype, name="output")(h, x, deterministic)


class BertIntermediate(nn.Module):
  """act(dense(x)): the wide half of the feed-forward network."""

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    return jax.checkpoint(activation(c.hidden_act))(
      _dense(c, self.dtype, c.intermediate_size, "dense")(x)
    )


class BertLayer(nn.Module):
  """Attention, then the feed-forward network, each normalised after its residual.

  With `pooled_only=True` for the first token alone, (B, 1, hidden_size), which sees all of x.
  """

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None,
    deterministic: bool = True,
    pooled_only: bool = False,  # under this name, nodes that read whole rows find and refuse it
  ) -> Array:
    c, dtype = self.config, self.dtype
    x = BertAttention(c, dtype, name="attention")(x, mask, deterministic, pooled_only)
    h = BertIntermediate(c, dtype, name="intermediate")(x)
    return BertOutput(c, dtype, name="output")(h, x, deterministic)


class BertEncoder(nn.Module):
  """The stack of layers."""

  config: EncoderConfig
  dtype: Any
  scan: bool
  remat: Remat
  pooled_only: bool = False

  @nn.compact
  def __call__(self, x: Array, mask: Array | None, deterministic: bool) -> Array:
    if self.pooled_only and self.scan:
      raise ValueError("pooled_only=True needs scan=False: a scan has one body for all layers")
    return run_layers(
      lambda name: BertLayer(self.config, self.dtype, name=name),
      lambda layer, x, last: layer(x, mask, deterministic, last),
      x,
      name="layer",
      flags=[False] * (self.config.num_hidden_layers - 1) + [self.pooled_only],
      scan=self.scan,
      remat=self.remat,
    )


class BertPooler(nn.Module):
  """tanh(dense(first token))."""

  config: EncoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return jnp.tanh(_dense(self.config, self.dtype, self.config.hidden_size, "dense")(x[:, 0]))


class _Encoder(nn.Module):
  """What all encoders share: fields, roles, names."""

  config: EncoderConfig
  dtype: Any = jnp.float32
  scan: bool = False
  remat: Remat = False

  suffix = "Model"  # of Hugging Face's class name

  @property
  def prefix(self) -> str:
    """Name of the trunk's module: "bert" or "roberta"."""
    return self.config.model_type

  @property
  def architecture(self) -> str:
    """The Hugging Face class that loads this model's checkpoints."""
    return _FAMILIES[self.config.model_type] + self.suffix

  @property
  def stack(self) -> tuple[str, int]:
    """Path of the layers and how many there are."""
    return "/".join(filter(None, (self.prefix, "encoder/layer"))), self.config.num_hidden_layers

  @property
  def learned_positions(self) -> int:
    """How many positions a text can have; RoBERTa's start behind the padding id."""
    c = self.config
    before = (c.pad_token_id or 0) + 1 if c.model_type == "roberta" else 0
    return c.max_position_embeddings - before

  @property
  def roles(self) -> dict[str, tuple[Role, ...]]:
    """Where the roles live in this family."""
    # "output/dense" alone would also match "attention/output/dense".
    layer = "encoder/layer" if self.scan else "encoder/layer/*"
    return {
      "query": (Role("attention/self/query"),),
      "key": (Role("attention/self/key"),),
      "value": (Role("attention/self/value"),),
      "attention_out": (Role("attention/output/dense"),),
      "ffn_in": (Role("intermediate/dense"),),
      "ffn_out": (Role(f"{layer}/output/dense"),),
      "attention_heads": (Role("attention/output/dense", "before", "../../in"),),
      "attention_block": (Role("attention/output/dropout", "after", "../../in"),),
      "attention_sum": (Role("attention/output/LayerNorm", "around_norm"),),
      "ffn": (Role(f"{layer}/output/dropout", "after", "../../intermediate:in"),),
      "ffn_sum": (Role(f"{layer}/output/LayerNorm", "around_norm"),),
      "attention": (Role("attention/self/core", "prefix"),),
      "positions": (Role("positions", "before"),),
      "layer": (Role("encoder/layer" if self.scan else "encoder/layer/*"),),
      "embedding": (Role("embeddings/word_embeddings"),),
      "norm": (
        Role("embeddings/LayerNorm"),
        Role("attention/output/LayerNorm"),
        Role(f"{layer}/output/LayerNorm"),
      ),
      "head": self._head_roles(),
    }

  def _head_roles(self) -> tuple[Role, ...]:
    return (Role("classifier"),)

  def _trunk(self, pooler: bool, name: str | None = "", pooled_only: bool = False) -> BertModel:
    name = self.prefix if name == "" else name
    return BertModel(
      self.config,
      self.dtype,
      self.scan,
      self.remat,
      pooler=pooler,
      pooled_only=pooled_only,
      name=name,
    )

  def _dropout(self, x: Array, deterministic: bool) -> Array:
    rate = self.config.classifier_dropout
    rate = self.config.hidden_dropout_prob if rate is None else rate
    return nn.Dropout(rate, name="dropout")(x, deterministic=deterministic)


class BertModel(_Encoder):
  """The bare encoder (task "encoder"): token ids to hidden states (B, T, hidden_size).

  With `pooler=True` it returns the hidden states and the pooled first token. `pooled_only=True`
  computes the last layer for the first token alone: hidden states (B, 1, hidden_size).
  """

  pooler: bool = False
  pooled_only: bool = False

  def setup(self) -> None:
    self.embeddings = BertEmbeddings(self.config, self.dtype)

  @property
  def prefix(self) -> str:
    """Empty: the bare model's names have no prefix."""
    return ""

  def attend(self, x: Array) -> Array:
    """Scores of all tokens, x Eᵀ: what a tied head does."""
    return self.embeddings.word_embeddings.attend(x)

  def _positions(self, input_ids: Array) -> Array:
    """Counts slots from 0; RoBERTa counts real tokens from the padding id's successor."""
    if self.config.model_type != "roberta":
      return jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
    pad = jnp.int32(self.config.pad_token_id)
    real = (input_ids != pad).astype(jnp.int32)
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + pad

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
  ) -> Any:
    """Runs the encoder.

    Args:
      input_ids: (B, T) int. Ids past the vocabulary reach `word_embeddings` as they are.
      attention_mask: (B, T) of 0/1, or (B, T, S).
      position_ids: (B, T); by default 0 … T-1 (BERT), or counted from `pad_token_id + 1` over the
        tokens that are not padding (RoBERTa).
      token_type_ids: (B, T); zeros by default.
      segment_ids: (B, T) for packed rows: tokens see their own segment only; 0 is padding. Give
        `position_ids` too where positions should restart.
      deterministic: False applies dropout.

    Returns:
      Hidden states (B, T, hidden_size); with `pooler=True` also the pooled (B, hidden_size).
    """
    c = self.config
    if position_ids is None:
      position_ids = self._positions(input_ids)
    position_ids = Positions(name="positions")(position_ids)
    if token_type_ids is None:
      token_type_ids = jnp.zeros((1, input_ids.shape[1]), jnp.int32)
    x = self.embeddings(input_ids, position_ids, token_type_ids, deterministic)
    mask = padding_mask(attention_mask, segment_ids)
    x = BertEncoder(c, self.dtype, self.scan, self.remat, self.pooled_only, name="encoder")(
      constrain(x), mask, deterministic
    )
    if self.pooler:
      return x, BertPooler(c, self.dtype, name="pooler")(x)
    return x

  def _head_roles(self) -> tuple[Role, ...]:
    return ()
