"""GPT-2: a pre-norm decoder with learned positions.

Modules carry the names of the Hugging Face checkpoints, `/` for `.`; see `_load` for the mapping.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax._site import Role
from pelt_jax.models._attention import Array, AttentionCore, Positions, causal_mask
from pelt_jax.models._bert import LayerNorm
from pelt_jax.models._cache import last_token, place, position, remember
from pelt_jax.models._config_gpt2 import GPT2Config
from pelt_jax.models._layers import Remat, constrain, run_layers
from pelt_jax.models._llama import activation
from pelt_jax.models._loss import chunked_losses


def _dense(
  config: GPT2Config, dtype: Any, features: int, name: str | None, bias: bool = True
) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=bias,
    dtype=dtype,
    param_dtype=dtype,
    kernel_init=nn.initializers.normal(config.initializer_range),
    name=name,
  )


def _embed(config: GPT2Config, dtype: Any, rows: int) -> nn.Embed:
  return nn.Embed(
    rows,
    config.hidden_size,
    dtype=dtype,
    param_dtype=dtype,
    embedding_init=nn.initializers.normal(config.initializer_range),
  )


def _norm(config: GPT2Config, dtype: Any, name: str) -> LayerNorm:
  # E[x²] - E[x]² loses half the digits where the mean is large.
  return LayerNorm(
    config.layer_norm_eps, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name
  )


class GPT2Attention(nn.Module):
  """Attention whose queries, keys and values come from one product, with a cache."""

  config: GPT2Config
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array,
    index: Array | None,
    cache_length: int | None,
    deterministic: bool,
  ) -> Array:
    c = self.config
    y = _dense(c, self.dtype, 3 * c.hidden_size, "c_attn")(x)
    heads = (*y.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    q, k, v = (part.reshape(heads) for part in jnp.split(y, 3, axis=-1))
    if cache_length is not None:
      k = remember(self, "key", k, index, cache_length)
      v = remember(self, "value", v, index, cache_length)
    core = AttentionCore(c.attn_pdrop, None if c.scale_attn_weights else 1.0, name="core")
    out = core(q, k, v, mask, deterministic=deterministic).reshape(x.shape)
    out = _dense(c, self.dtype, c.hidden_size, "c_proj")(out)
    return nn.Dropout(c.resid_pdrop, name="resid_dropout")(out, deterministic=deterministic)


class GPT2MLP(nn.Module):
  """c_proj(act(c_fc(x)))."""

  config: GPT2Config
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    c = self.config
    h = _dense(c, self.dtype, c.intermediate_size, "c_fc")(x)
    # The backward pass computes the activation again: of the two wide arrays one is kept.
    h = jax.checkpoint(activation(c.hidden_act))(h)
    h = _dense(c, self.dtype, c.hidden_size, "c_proj")(h)
    return nn.Dropout(c.resid_pdrop, name="dropout")(h, deterministic=deterministic)


class GPT2Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  config: GPT2Config
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array,
    index: Array | None,
    cache_length: int | None,
    deterministic: bool = True,
  ) -> Array:
    c, dtype = self.config, self.dtype
    h = _norm(c, dtype, "ln_1")(x)
    h = GPT2Attention(c, dtype, name="attn")(h, mask, index, cache_length, deterministic)
    x = constrain(x + h)
    h = GPT2MLP(c, dtype, name="mlp")(_norm(c, dtype, "ln_2")(x), deterministic)
    return constrain(x + h)


class _GPT2(nn.Module):
  """What all GPT-2 models share: fields, roles, names."""

  config: GPT2Config
  dtype: Any = jnp.float32
  scan: bool = False
  remat: Remat = False

  prefix = "transformer"  # of the trunk's modules
  conv1d = ("c_attn", "c_proj", "c_fc")  # torch's Conv1D keeps (in, out)
  architecture = "GPT2Model"  # the Hugging Face class that loads this model's checkpoints

  @property
  def stack(self) -> tuple[str, int]:
    """Path of the layers and how many there are."""
    return "/".join(filter(None, (self.prefix, "h"))), self.config.num_hidden_layers

  @property
  def learned_positions(self) -> int:
    """How many positions the table has; text cannot be longer."""
    return self.config.max_position_embeddings

  @property
  def roles(self) -> dict[str, tuple[Role, ...]]:
    """Where the roles live: `query`, `key` and `value` are one module here."""
    joint = (Role("attn/c_attn"),)
    return {
      "query": joint,
      "key": joint,
      "value": joint,
      "attention_out": (Role("attn/c_proj"),),
      "ffn_in": (Role("mlp/c_fc"),),
      "ffn_out": (Role("mlp/c_proj"),),
      "attention_heads": (Role("attn/c_proj", "before", "../in"),),
      "attention_block": (Role("attn", "after", "in", "../ln_1:in"),),
      "ffn": (Role("mlp", "after", "in", "../ln_2:in"),),
      "attention": (Role("attn/core", "prefix"),),
      "positions": (Role("positions", "before"),),
      "layer": (Role("h" if self.scan else "h/*"),),
      "embedding": (Role("wte"),),
      "norm": (Role("ln_1"), Role("ln_2"), Role("ln_f")),
      "head": self._head_roles(),
    }

  def _head_roles(self) -> tuple[Role, ...]:
    return ()

  def _trunk(self, name: str | None) -> GPT2Model:
    return GPT2Model(self.config, self.dtype, self.scan, self.remat, name=name)


class GPT2Model(_GPT2):
  """The bare decoder (task "encoder"): token ids to hidden states (B, T, hidden_size)."""

  causal = True

  prefix = ""

  def setup(self) -> None:
    self.wte = _embed(self.config, self.dtype, self.config.vocab_size)
    self.wpe = _embed(self.config, self.dtype, self.config.max_position_embeddings)

  @nn.compact
  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    *,
    segment_ids: Array | None = None,
    cache_length: int | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Runs the decoder.

    Args:
      input_ids: (B, T) int. Ids past the vocabulary reach `wte` as they are.
      attention_mask: (B, T), 1 for real tokens, padding on either side; or (B, T, S), which is
        intersected with the causal mask. With a cache, (B, T) of the tokens given now.
      position_ids: (B, T); by default counts the real tokens from 0. Positions past the table give
        NaN.
      segment_ids: (B, T) for packed rows: tokens see their own segment only, positions restart,
        0 is padding.
      cache_length: N keeps keys and values of N slots in the collection "cache", which must be
        mutable. The caller sees to it that no more than N tokens come.
      deterministic: False applies dropout.

    Returns:
      Hidden states after the last norm, (B, T, hidden_size).
    """
    c = self.config
    batch, length = input_ids.shape
    slots = place(self, attention_mask, position_ids, segment_ids, batch, length, cache_length)
    mask = causal_mask(slots.queries, slots.keys, None, (slots.mask,))
    x = self.wte(input_ids) + self.wpe(Positions(name="positions")(slots.positions))
    x = nn.Dropout(c.embd_pdrop, name="drop")(x, deterministic=deterministic)
    x = run_layers(
      lambda name: GPT2Block(c, self.dtype, name=name),
      lambda layer, x, _: layer(x, mask, slots.index, cache_length, deterministic),
      constrain(x),
      name="h",
      flags=[0] * c.num_hidden_layers,
      scan=self.scan,
      remat=self.remat,
    )
    return _norm(c, self.dtype, "ln_f")(x)


class GPT2LMHeadModel(_GPT2):
  """Language model; the head is the embedding, or its own where the configuration says so.

  `loss_chunk` bounds how many positions' logits exist at a time when `labels` are given.
  """

  loss_chunk: int = 1024
  architecture = "GPT2LMHeadModel"

  def setup(self) -> None:
    self.transformer = self._trunk(None)  # setup names it after the attribute
    if not self.config.tie_word_embeddings:
      self.lm_head = _dense(self.config, self.dtype, self.config.vocab_size, None, bias=False)

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
      attention_mask: see `GPT2Model`.
      position_ids: see `GPT2Model`.
      labels: (B, T) int: `labels[:, t]` is the target of position t (already shifted); -100 is
        left out.
      segment_ids: see `GPT2Model`.
      cache_length: see `GPT2Model`.
      last_only: logits of the last position alone, (B, 1, V): all that generation needs.
      at: (B,) int: logits of one position per row alone, (B, V).
      deterministic: False applies dropout.

    Returns:
      Logits (B, T, V); with `labels`, cross entropies (B, T) in float32 at least, 0 where the
      label is -100. The full logits never exist then.
    """
    x = self.transformer(
      input_ids,
      attention_mask,
      position_ids,
      segment_ids=segment_ids,
      cache_length=cache_length,
      deterministic=deterministic,
    )
    if labels is not None:
      return chunked_losses(self, GPT2LMHeadModel.head, x, labels, self.loss_chunk)
    if at is not None:
      return self.head(position(x, at))
    return self.head(x[:, -1:] if last_only else x)

  def head(self, x: Array) -> Array:
    """Hidden states to logits."""
    if self.config.tie_word_embeddings:
      return self.transformer.wte.attend(x)
    return self.lm_head(x)

  def _head_roles(self) -> tuple[Role, ...]:
    return () if self.config.tie_word_embeddings else (Role("lm_head"),)


class GPT2ForSequenceClassification(_GPT2):
  """One label per row, read off its last real token: logits (B, num_labels)."""

  architecture = "GPT2ForSequenceClassification"

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
    trunk = self._trunk("transformer")
    x = trunk(input_ids, attention_mask, position_ids, deterministic=deterministic)
    x = last_token(x, input_ids, attention_mask, self.config.pad_token_id)
    return _dense(self.config, self.dtype, self.config.num_labels, "score", bias=False)(x)

  def _head_roles(self) -> tuple[Role, ...]:
    return (Role("score"),)


class GPT2ForTokenClassification(_GPT2):
  """One label per token: logits (B, T, num_labels)."""

  architecture = "GPT2ForTokenClassification"

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
    x = self._trunk("transformer")(
      input_ids,
      attention_mask,
      position_ids,
      segment_ids=segment_ids,
      deterministic=deterministic,
    )
    rate = self.config.classifier_dropout
    rate = 0.1 if rate is None else rate  # Hugging Face's default for this head
    x = nn.Dropout(rate, name="dropout")(x, deterministic=deterministic)
    return _dense(self.config, self.dtype, self.config.num_labels, "classifier")(x)

  def _head_roles(self) -> tuple[Role, ...]:
    return (Role("classifier"),)
