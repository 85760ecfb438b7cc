"""BART: a post-norm encoder-decoder with learned positions.

Modules carry the names of the Hugging Face checkpoints, `/` for `.`; see `_load` for the mapping.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax._site import Role
from pelt_jax.models._attention import Array, AttentionCore, Positions, causal_mask, padding_mask
from pelt_jax.models._bert import LayerNorm
from pelt_jax.models._cache import place, remember
from pelt_jax.models._config_seq2seq import BartConfig
from pelt_jax.models._layers import Remat, constrain, run_layers
from pelt_jax.models._llama import activation
from pelt_jax.models._seq2seq import Seq2Seq, keep

_OFFSET = 2  # the first rows of a position table stand for nothing


def _dense(config: BartConfig, dtype: Any, features: int, name: str) -> nn.Dense:
  return nn.Dense(
    features,
    dtype=dtype,
    param_dtype=dtype,
    kernel_init=nn.initializers.normal(config.initializer_range),
    name=name,
  )


def _table(config: BartConfig, dtype: Any, rows: int, name: str | None) -> nn.Embed:
  return nn.Embed(
    rows,
    config.hidden_size,
    dtype=dtype,
    param_dtype=dtype,
    embedding_init=nn.initializers.normal(config.initializer_range),
    name=name,
  )


def _norm(dtype: Any, name: str) -> LayerNorm:
  # E[x²] - E[x]² loses half the digits where the mean is large.
  return LayerNorm(1e-5, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name)


class BartAttention(nn.Module):
  """Attention; the decoder's has a cache, cross attention one of its own.

  Attributes:
    config: the model's.
    dtype: of parameters and computation.
    heads: how many.
    cross: keys and values come from the encoder.
  """

  config: BartConfig
  dtype: Any
  heads: int
  cross: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    source: Array | None,
    mask: Array | None,
    index: Array | None,
    cache_length: int | None,
    deterministic: bool,
  ) -> Array:
    c = self.config

    def project(name: str, x: Array | None) -> Any:
      if x is None:
        return None
      y = _dense(c, self.dtype, c.hidden_size, name)(x)
      return y.reshape(*y.shape[:-1], self.heads, c.hidden_size // self.heads)

    q, k, v = project("q_proj", x), project("k_proj", source), project("v_proj", source)
    if self.cross:
      k = keep(self, "source_key", k, cache_length)
      v = keep(self, "source_value", v, cache_length)
    elif cache_length is not None:
      k = remember(self, "key", k, index, cache_length)
      v = remember(self, "value", v, index, cache_length)
    core = AttentionCore(c.attention_dropout, name="core")
    out = core(q, k, v, mask, deterministic=deterministic).reshape(x.shape)
    return _dense(c, self.dtype, c.hidden_size, "out_proj")(out)


class BartLayer(nn.Module):
  """Self attention, in the decoder cross attention, feed-forward; each normalised at its end."""

  config: BartConfig
  dtype: Any
  decoder: bool

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None,
    memory: Array | None,
    memory_mask: Array | None,
    index: Array | None,
    cache_length: int | None,
    deterministic: bool,
  ) -> Array:
    c, dtype = self.config, self.dtype
    heads = c.decoder_heads if self.decoder else c.num_attention_heads
    wide = c.decoder_intermediate_size if self.decoder else c.intermediate_size

    def dropped(h: Array, name: str, rate: float = c.dropout_rate) -> Array:
      return nn.Dropout(rate, name=name)(h, deterministic=deterministic)

    attention = BartAttention(c, dtype, heads, name="self_attn")
    h = attention(x, x, mask, index, cache_length, deterministic)
    x = constrain(_norm(dtype, "self_attn_layer_norm")(x + dropped(h, "self_attn_dropout")))
    if self.decoder:
      attention = BartAttention(c, dtype, heads, cross=True, name="encoder_attn")
      h = attention(x, memory, memory_mask, index, cache_length, deterministic)
      x = constrain(_norm(dtype, "encoder_attn_layer_norm")(x + dropped(h, "encoder_attn_dropout")))
    h = jax.checkpoint(activation(c.hidden_act))(_dense(c, dtype, wide, "fc1")(x))
    h = dropped(h, "activation_dropout", c.activation_dropout)
    h = _dense(c, dtype, c.hidden_size, "fc2")(h)
    return constrain(_norm(dtype, "final_layer_norm")(x + dropped(h, "ffn_dropout")))


class BartStack(nn.Module):
  """The encoder or the decoder: embeddings (B, T, hidden_size) to hidden states."""

  config: BartConfig
  dtype: Any
  scan: bool
  remat: Remat
  decoder: bool

  @property
  def causal(self) -> bool:
    """Whether positions see no later ones."""
    return self.decoder

  @nn.compact
  def __call__(
    self,
    x: Array,
    attention_mask: Array | None,
    memory: Array | None = None,
    memory_mask: Array | None = None,
    cache_length: int | None = None,
    deterministic: bool = True,
  ) -> Array:
    c = self.config
    batch, length, _ = x.shape
    slots = place(self, attention_mask, None, None, batch, length, cache_length)
    if self.decoder:
      mask = causal_mask(slots.queries, slots.keys, None, (slots.mask,))
    else:
      mask = padding_mask(attention_mask, None)
    table = _table(c, self.dtype, c.max_position_embeddings + _OFFSET, "embed_positions")
    positions = Positions(name="positions")(slots.queries[None])  # padding has them too
    x = x + table(positions + _OFFSET)
    x = _norm(self.dtype, "layernorm_embedding")(x)
    x = nn.Dropout(c.dropout_rate, name="dropout")(x, deterministic=deterministic)
    shared = (mask, memory, memory_mask, slots.index, cache_length, deterministic)
    return run_layers(
      lambda name: BartLayer(c, self.dtype, self.decoder, name=name),
      lambda layer, x, _: layer(x, *shared),
      constrain(x),
      name="layers",
      flags=[0] * (c.num_decoder_layers if self.decoder else c.num_hidden_layers),
      scan=self.scan,
      remat=self.remat,
    )


class BartModel(nn.Module):
  """Holds the shared embedding and both stacks."""

  config: BartConfig
  dtype: Any
  scan: bool
  remat: Remat

  def setup(self) -> None:
    c = self.config
    self.shared = _table(c, self.dtype, c.vocab_size, None)
    self.encoder = BartStack(c, self.dtype, self.scan, self.remat, decoder=False)
    self.decoder = BartStack(c, self.dtype, self.scan, self.remat, decoder=True)


class BartForConditionalGeneration(Seq2Seq):
  """BART with its tied language model's head (task "seq2seq")."""

  prefix = "model"
  architecture = "BartForConditionalGeneration"

  def setup(self) -> None:
    c = self.config
    self.model = BartModel(c, self.dtype, self.scan, self.remat)
    self.final_logits_bias = self.param(
      "final_logits_bias", nn.initializers.zeros, (1, c.vocab_size), self.dtype
    )

  @property
  def stacks(self) -> tuple[tuple[str, int], ...]:
    """Paths of the stacks of layers and how many there are."""
    c = self.config
    encoder, decoder = c.num_hidden_layers, c.num_decoder_layers
    return ("model/encoder/layers", encoder), ("model/decoder/layers", decoder)

  @property
  def learned_positions(self) -> int:
    """How many positions each stack's table has; text cannot be longer."""
    return self.config.max_position_embeddings

  @property
  def trunk(self) -> BartModel:
    """The module that owns the embedding and the stacks."""
    return self.model

  @property
  def embedding_scale(self) -> float:
    """What rows of the table are multiplied with on their way into the stacks."""
    return self.config.hidden_size**0.5 if self.config.scale_embedding else 1.0

  def embed(self, ids: Array) -> Array:
    """Token ids to what the stacks take."""
    x = self.model.shared(ids)
    return x * jnp.asarray(self.embedding_scale, x.dtype)

  def head(self, x: Array) -> Array:
    """Hidden states to logits."""
    # The reference keeps this bias in the file but never trains it.
    bias = jax.lax.stop_gradient(self.final_logits_bias)
    return self.model.shared.attend(x) + jnp.asarray(bias, x.dtype)[None]

  @property
  def roles(self) -> dict[str, tuple[Role, ...]]:
    """Where the roles live: encoder, decoder and cross attention alike."""

    def attention(name: str, *more: Any) -> tuple[Role, ...]:
      return tuple(Role(f"{a}/{name}", *more) for a in ("self_attn", "encoder_attn"))

    return {
      "query": attention("q_proj"),
      "key": attention("k_proj"),
      "value": attention("v_proj"),
      "attention_out": attention("out_proj"),
      "ffn_in": (Role("fc1"),),
      "ffn_out": (Role("fc2"),),
      "attention_heads": attention("out_proj", "before", "../in"),
      "attention_block": (Role("self_attn_dropout", "after", "../self_attn:in"),),
      "attention_sum": (Role("self_attn_layer_norm", "around_norm"),),
      "cross_attention_block": (Role("encoder_attn_dropout", "after", "../encoder_attn:in"),),
      "cross_attention_sum": (Role("encoder_attn_layer_norm", "around_norm"),),
      "ffn": (Role("ffn_dropout", "after", "../fc1:in"),),
      "ffn_sum": (Role("final_layer_norm", "around_norm"),),
      "attention": attention("core", "prefix"),
      "positions": (Role("positions", "before"),),
      "layer": (Role("layers" if self.scan else "layers/*"),),
      "embedding": (Role("shared"),),
      "norm": (
        Role("self_attn_layer_norm"),
        Role("encoder_attn_layer_norm"),
        Role("final_layer_norm"),
        Role("layernorm_embedding"),
      ),
      "head": (),
    }
