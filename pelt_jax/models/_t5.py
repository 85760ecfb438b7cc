"""T5 and T5 1.1 (Flan-T5): pre-norm encoder-decoders whose attention is biased by distance.

Modules carry the names of the Hugging Face checkpoints, `/` for `.`; see `_load` for the mapping.
One differs: the table of biases, which the checkpoint keeps in a stack's first layer, belongs to
the stack, so that all layers are alike and can be scanned.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pelt_jax._site import Role
from pelt_jax.models._attention import Array, AttentionCore, causal_mask, padding_mask
from pelt_jax.models._cache import place, remember
from pelt_jax.models._config_seq2seq import T5Config
from pelt_jax.models._layers import Remat, constrain, run_layers
from pelt_jax.models._llama import RMSNorm, activation
from pelt_jax.models._seq2seq import Seq2Seq, keep


def _dense(config: T5Config, dtype: Any, features: int, fan: int, name: str | None) -> nn.Dense:
  """A product whose initial entries have the variance 1 / fan: the model divides nowhere else."""
  return nn.Dense(
    features,
    use_bias=False,
    dtype=dtype,
    param_dtype=dtype,
    kernel_init=nn.initializers.normal(config.initializer_range * fan**-0.5),
    name=name,
  )


def _table(dtype: Any, rows: int, width: int, scale: float, name: str | None) -> nn.Embed:
  init = nn.initializers.normal(scale)
  return nn.Embed(rows, width, dtype=dtype, param_dtype=dtype, embedding_init=init, name=name)


@functools.cache
def bucket_table(span: int, bidirectional: bool, buckets: int, distance: int) -> np.ndarray:
  """The bucket of every distance key - query from 1 - span to span - 1, int32 (2 span - 1,).

  Near distances have a bucket each; farther ones share buckets that widen by the logarithm, up to
  `distance`. Causal tables put the future into bucket 0; bidirectional ones give it half of all.

  >>> bucket_table(130, True, 32, 128)[[129 - 91, 129 - 90, 129, 130, 129 + 128]].tolist()
  [15, 14, 0, 17, 31]
  """
  relative = np.arange(1 - span, span)
  offset = np.zeros_like(relative)
  if bidirectional:
    buckets //= 2
    offset = np.where(relative > 0, buckets, 0)
  far = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
  exact = buckets // 2
  # In float32, as the reference: where the logarithm is whole, other digits choose other buckets.
  log = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
  log = log / np.float32(math.log(distance / exact)) * np.float32(buckets - exact)
  large = np.minimum(exact + log.astype(np.int64), buckets - 1)
  return (offset + np.where(far < exact, far, large)).astype(np.int32)


class T5Attention(nn.Module):
  """Attention without 1/√D; the decoder's has a cache, cross attention one of its own.

  Attributes:
    config: the model's.
    dtype: of parameters and computation.
    cross: keys and values come from the encoder.
  """

  config: T5Config
  dtype: Any
  cross: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    source: Array | None,
    mask: Array | None,
    bias: Array | None,
    index: Array | None,
    cache_length: int | None,
    deterministic: bool,
  ) -> Array:
    c = self.config
    inner = c.num_attention_heads * c.head_dim

    def project(name: str, x: Array | None, fan: int) -> Any:
      if x is None:
        return None
      y = _dense(c, self.dtype, inner, fan, name)(x)
      return y.reshape(*y.shape[:-1], c.num_attention_heads, c.head_dim)

    q = project("q", x, c.hidden_size * c.head_dim)
    k, v = project("k", source, c.hidden_size), project("v", source, c.hidden_size)
    if self.cross:
      k = keep(self, "source_key", k, cache_length)
      v = keep(self, "source_value", v, cache_length)
    elif cache_length is not None:
      k = remember(self, "key", k, index, cache_length)
      v = remember(self, "value", v, index, cache_length)
    core = AttentionCore(c.dropout_rate, 1.0, name="core")
    out = core(q, k, v, mask, bias, deterministic=deterministic)
    out = out.reshape(*out.shape[:2], inner)
    return _dense(c, self.dtype, c.hidden_size, inner, "o")(out)


class T5LayerAttention(nn.Module):
  """x + dropout(attention(norm(x))): self attention, or cross attention to `memory`."""

  config: T5Config
  dtype: Any
  cross: bool = False

  @nn.compact
  def __call__(self, x: Array, memory: Array | None, *args: Any, deterministic: bool) -> Array:
    c = self.config
    h = RMSNorm(c.layer_norm_eps, self.dtype, name="layer_norm")(x)
    name = "EncDecAttention" if self.cross else "SelfAttention"
    attention = T5Attention(c, self.dtype, self.cross, name=name)
    h = attention(h, memory if self.cross else h, *args, deterministic=deterministic)
    return constrain(x + nn.Dropout(c.dropout_rate, name="dropout")(h, deterministic=deterministic))


class T5FeedForward(nn.Module):
  """wo(act(wi(x))), or gated: wo(act(wi_0(x)) · wi_1(x))."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    c, act = self.config, activation(self.config.hidden_act)
    names = ("wi_0", "wi_1") if c.gated else ("wi",)
    wide = [_dense(c, self.dtype, c.intermediate_size, c.hidden_size, n)(x) for n in names]
    # The backward pass computes the activation again: of three wide arrays two are kept.
    h = jax.checkpoint(lambda gate, *up: act(gate) * up[0] if up else act(gate))(*wide)
    h = nn.Dropout(c.dropout_rate, name="dropout")(h, deterministic=deterministic)
    return _dense(c, self.dtype, c.hidden_size, c.intermediate_size, "wo")(h)


class T5LayerFF(nn.Module):
  """x + dropout(feed-forward(norm(x)))."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    c = self.config
    h = RMSNorm(c.layer_norm_eps, self.dtype, name="layer_norm")(x)
    h = T5FeedForward(c, self.dtype, name="DenseReluDense")(h, deterministic)
    return constrain(x + nn.Dropout(c.dropout_rate, name="dropout")(h, deterministic=deterministic))


class T5Sublayers(nn.Module):
  """Holds the sublayers "0", "1" and "2": Hugging Face's ModuleList."""

  config: T5Config
  dtype: Any
  decoder: bool

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None,
    bias: Array,
    memory: Array | None,
    memory_mask: Array | None,
    index: Array | None,
    cache_length: int | None,
    deterministic: bool,
  ) -> Array:
    c, dtype = self.config, self.dtype
    x = T5LayerAttention(c, dtype, name="0")(
      x, None, mask, bias, index, cache_length, deterministic=deterministic
    )
    if self.decoder:
      x = T5LayerAttention(c, dtype, cross=True, name="1")(
        x, memory, memory_mask, None, index, cache_length, deterministic=deterministic
      )
    return T5LayerFF(c, dtype, name="2" if self.decoder else "1")(x, deterministic)


class T5Block(nn.Module):
  """One layer: self attention, in the decoder cross attention, feed-forward network."""

  config: T5Config
  dtype: Any
  decoder: bool

  @nn.compact
  def __call__(self, x: Array, *args: Any) -> Array:
    return T5Sublayers(self.config, self.dtype, self.decoder, name="layer")(x, *args)


class T5Stack(nn.Module):
  """The encoder or the decoder: embeddings (B, T, hidden_size) to hidden states."""

  config: T5Config
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
    bias = self._bias(slots.queries, slots.keys)
    x = nn.Dropout(c.dropout_rate, name="dropout_in")(x, deterministic=deterministic)
    shared = (mask, bias, memory, memory_mask, slots.index, cache_length, deterministic)
    x = run_layers(
      lambda name: T5Block(c, self.dtype, self.decoder, name=name),
      lambda layer, x, _: layer(x, *shared),
      constrain(x),
      name="block",
      flags=[0] * (c.num_decoder_layers if self.decoder else c.num_hidden_layers),
      scan=self.scan,
      remat=self.remat,
    )
    x = RMSNorm(c.layer_norm_eps, self.dtype, name="final_layer_norm")(x)
    return nn.Dropout(c.dropout_rate, name="dropout")(x, deterministic=deterministic)

  def _bias(self, queries: Array, keys: Array) -> Array:
    """What every layer adds to its scores, (1, H, T, S)."""
    c = self.config
    span = keys.shape[0]
    buckets = bucket_table(span, not self.decoder, c.relative_buckets, c.relative_distance)
    apart = keys[None, :] - queries[:, None] + (span - 1)
    heads, name = c.num_attention_heads, "relative_attention_bias"
    scale = c.initializer_range * c.hidden_size**-0.5
    table = _table(self.dtype, c.relative_buckets, heads, scale, name)
    return jnp.moveaxis(table(jnp.asarray(buckets)[apart]), -1, 0)[None]


class T5ForConditionalGeneration(Seq2Seq):
  """T5 with a language model's head, tied to the embedding or its own (task "seq2seq")."""

  prefix = ""
  architecture = "T5ForConditionalGeneration"

  def setup(self) -> None:
    c = self.config
    self.shared = _table(self.dtype, c.vocab_size, c.hidden_size, c.initializer_range, None)
    self.encoder = T5Stack(c, self.dtype, self.scan, self.remat, decoder=False)
    self.decoder = T5Stack(c, self.dtype, self.scan, self.remat, decoder=True)
    if not c.tie_word_embeddings:
      self.lm_head = _dense(c, self.dtype, c.vocab_size, 1, None)

  @property
  def stacks(self) -> tuple[tuple[str, int], ...]:
    """Paths of the stacks of layers and how many there are."""
    c = self.config
    return ("encoder/block", c.num_hidden_layers), ("decoder/block", c.num_decoder_layers)

  def head(self, x: Array) -> Array:
    """Hidden states to logits."""
    c = self.config
    if c.scale_decoder_outputs:
      x = x * jnp.asarray(c.hidden_size**-0.5, x.dtype)
    return self.shared.attend(x) if c.tie_word_embeddings else self.lm_head(x)

  @property
  def roles(self) -> dict[str, tuple[Role, ...]]:
    """Where the roles live: encoder, decoder and cross attention alike."""

    def attention(name: str, *more: Any) -> tuple[Role, ...]:
      return tuple(Role(f"{a}/{name}", *more) for a in ("SelfAttention", "EncDecAttention"))

    wide = ("wi_0", "wi_1") if self.config.gated else ("wi",)
    layer, stream = "block/layer" if self.scan else "block/*/layer", "../layer_norm:in"
    return {
      "query": attention("q"),
      "key": attention("k"),
      "value": attention("v"),
      "attention_out": attention("o"),
      "ffn_in": tuple(Role(f"DenseReluDense/{name}") for name in wide),
      "ffn_out": (Role("DenseReluDense/wo"),),
      "attention_heads": attention("o", "before", "../in"),
      "attention_block": (Role(f"{layer}/0/dropout", "after", "../SelfAttention:in", stream),),
      "cross_attention_block": (
        Role(f"decoder/{layer}/1/dropout", "after", "../EncDecAttention:in", stream),
      ),
      "ffn": tuple(
        Role(f"{part}/{layer}/{i}/dropout", "after", "../DenseReluDense:in", stream)
        for part, i in (("encoder", 1), ("decoder", 2))
      ),
      "attention": attention("core", "prefix"),
      "layer": (Role("block" if self.scan else "block/*"),),
      "embedding": (Role("shared"),),
      "norm": (Role("layer_norm"), Role("final_layer_norm")),
      "head": () if self.config.tie_word_embeddings else (Role("lm_head"),),
    }
