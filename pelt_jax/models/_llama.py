"""Llama and its kin (Mistral, Qwen2, Qwen3): pre-norm decoders with rotary positions.

Modules carry the names of the Hugging Face checkpoints, `/` for `.`; see `_load` for the mapping.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax._rules import rule
from pelt_jax._site import Role
from pelt_jax.models._attention import (
  Array,
  AttentionCore,
  Positions,
  at_least_float32,
  causal_mask,
  rope_tables,
  rotate,
)
from pelt_jax.models._cache import place, remember
from pelt_jax.models._config import DecoderConfig
from pelt_jax.models._layers import Remat, constrain, run_layers

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "gelu": lambda x: _gelu(x.astype(at_least_float32(x.dtype))).astype(x.dtype),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _gelu(x: Array) -> Array:
  """Through erf, as torch; `jax.nn.gelu` goes through erfc, which costs XLA:CPU five times more."""
  return x * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5)))


def activation(name: str) -> Any:
  """The activation called `name` in config.json."""
  if name not in ACTIVATIONS:
    raise ValueError(f"hidden_act {name!r} is not implemented; known: {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


class RMSNorm(nn.Module):
  """scale · x / √(mean(x²) + eps), the mean in float32 at least."""

  eps: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
    # `scale` may be a node's value in another dtype; the caller's x decides.
    return _unit(self, x) * scale.astype(self.dtype)[(None,) * (x.ndim - 1)]


def _unit(norm: RMSNorm, x: Array) -> Array:
  """`x / √(mean(x²) + eps)`."""
  wide = x.astype(at_least_float32(x.dtype))
  wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
  return wide.astype(norm.dtype)


@rule(RMSNorm.__call__)  # in a bank every row has a scale of its own
def _rms_norm(module: RMSNorm, leaves: dict, x: Array) -> Array:
  y = _unit(module, x)
  return y * leaves["scale"].spread(y)


def _dense(
  config: DecoderConfig, dtype: Any, features: int, bias: bool, name: str | None
) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=bias,
    dtype=dtype,
    param_dtype=dtype,
    kernel_init=nn.initializers.normal(config.initializer_range),
    name=name,
  )


class LlamaAttention(nn.Module):
  """Grouped-query attention with rotary positions, optional query/key norms and a cache."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array,
    cos: Array,
    sin: Array,
    cache_index: Array | None = None,
    cache_length: int | None = None,
    deterministic: bool = True,
  ) -> Array:
    c = self.config

    def project(name: str, heads: int) -> Array:
      y = _dense(c, self.dtype, heads * c.head_dim, c.qkv_bias, name)(x)
      return y.reshape(*y.shape[:-1], heads, c.head_dim)

    q = project("q_proj", c.num_attention_heads)
    k = project("k_proj", c.num_key_value_heads)
    v = project("v_proj", c.num_key_value_heads)
    if c.qk_norm:
      q = RMSNorm(c.rms_norm_eps, self.dtype, name="q_norm")(q)
      k = RMSNorm(c.rms_norm_eps, self.dtype, name="k_norm")(k)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache_length is not None:
      k = remember(self, "key", k, cache_index, cache_length)
      v = remember(self, "value", v, cache_index, cache_length)
    out = AttentionCore(c.attention_dropout, name="core")(
      q, k, v, mask, deterministic=deterministic
    )
    out = out.reshape(*out.shape[:2], c.num_attention_heads * c.head_dim)
    return _dense(c, self.dtype, c.hidden_size, c.out_bias, "o_proj")(out)


class LlamaMLP(nn.Module):
  """down(act(gate(x)) · up(x))."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    gate = _dense(c, self.dtype, c.intermediate_size, c.mlp_bias, "gate_proj")(x)
    up = _dense(c, self.dtype, c.intermediate_size, c.mlp_bias, "up_proj")(x)
    # The backward pass computes the activation again: of the three wide arrays two are kept.
    h = jax.checkpoint(lambda gate, up: activation(c.hidden_act)(gate) * up)(gate, up)
    return _dense(c, self.dtype, c.hidden_size, c.mlp_bias, "down_proj")(h)


class LlamaLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, *args: Any, deterministic: bool = True) -> Array:
    eps = self.config.rms_norm_eps
    h = RMSNorm(eps, self.dtype, name="input_layernorm")(x)
    h = LlamaAttention(self.config, self.dtype, name="self_attn")(
      h, *args, deterministic=deterministic
    )
    x = constrain(x + h)
    h = RMSNorm(eps, self.dtype, name="post_attention_layernorm")(x)
    return constrain(x + LlamaMLP(self.config, self.dtype, name="mlp")(h))


class _Decoder(nn.Module):
  """What all decoders share: fields, roles, names."""

  config: DecoderConfig
  dtype: Any = jnp.float32
  scan: bool = False
  remat: Remat = False

  prefix = "model"  # of the trunk's modules
  suffix = "Model"  # of Hugging Face's class name

  @property
  def architecture(self) -> str:
    """The Hugging Face class that loads this model's checkpoints."""
    return _FAMILIES[self.config.model_type] + self.suffix

  @property
  def stack(self) -> tuple[str, int]:
    """Path of the layers and how many there are."""
    return "/".join(filter(None, (self.prefix, "layers"))), self.config.num_hidden_layers

  @property
  def roles(self) -> dict[str, tuple[Role, ...]]:
    """Where the roles live in this family."""
    return {
      "query": (Role("self_attn/q_proj"),),
      "key": (Role("self_attn/k_proj"),),
      "value": (Role("self_attn/v_proj"),),
      "attention_out": (Role("self_attn/o_proj"),),
      "ffn_in": (Role("mlp/gate_proj"), Role("mlp/up_proj")),
      "ffn_out": (Role("mlp/down_proj"),),
      "attention_heads": (Role("self_attn/o_proj", "before", "../in"),),
      "attention_block": (Role("self_attn", "after", "in", "../input_layernorm:in"),),
      "ffn": (Role("mlp", "after", "in", "../post_attention_layernorm:in"),),
      "attention": (Role("self_attn/core", "prefix"),),
      "positions": (Role("positions", "before"),),
      "layer": (Role("layers" if self.scan else "layers/*"),),
      "embedding": (Role("embed_tokens"),),
      "norm": (
        Role("input_layernorm"),
        Role("post_attention_layernorm"),
        Role(self.stack[0].replace("layers", "norm")),
      )
      + ((Role("self_attn/q_norm"), Role("self_attn/k_norm")) if self.config.qk_norm else ()),
      "head": self._head_roles(),
    }

  def _head_roles(self) -> tuple[Role, ...]:
    return ()

  def _trunk(self, name: str | None) -> LlamaModel:
    return LlamaModel(self.config, self.dtype, self.scan, self.remat, name=name)


class LlamaModel(_Decoder):
  """The bare decoder (task "encoder"): token ids to hidden states (B, T, hidden_size)."""

  causal = True

  prefix = ""

  def setup(self) -> None:
    c = self.config
    self.embed_tokens = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      dtype=self.dtype,
      param_dtype=self.dtype,
      embedding_init=nn.initializers.normal(c.initializer_range),
    )

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
      input_ids: (B, T) int. Ids past the vocabulary reach `embed_tokens` as they are.
      attention_mask: (B, T), 1 for real tokens, padding on either side; or (B, T, S), which is
        intersected with the causal mask. With a cache, (B, T) of the tokens given now.
      position_ids: (B, T); by default counts the real tokens from 0.
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
    queries, keys, extra, position_ids, index = slots
    position_ids = Positions(name="positions")(position_ids)
    cos, sin = rope_tables(c.rope, c.head_dim, position_ids, self.dtype)
    masks = {w: causal_mask(queries, keys, w, (extra,)) for w in dict.fromkeys(c.windows)}

    def step(layer: LlamaLayer, x: Array, flag: Any) -> Array:
      # Layers that alternate between windows are one body under scan: there the flag is traced.
      if isinstance(flag, bool):
        mask = masks[c.windows[0]] if flag else masks[_other(c.windows)]
      else:
        mask = jnp.where(flag, masks[c.windows[0]], masks[_other(c.windows)])
      return layer(x, mask, cos, sin, index, cache_length, deterministic=deterministic)

    x = run_layers(
      lambda name: LlamaLayer(c, self.dtype, name=name),
      step,
      constrain(self.embed_tokens(input_ids)),
      name="layers",
      flags=[w == c.windows[0] for w in c.windows],
      scan=self.scan,
      remat=self.remat,
    )
    return RMSNorm(c.rms_norm_eps, self.dtype, name="norm")(x)


def _other(windows: tuple[int | None, ...]) -> int | None:
  """The second kind of window, if there is one."""
  return next((w for w in windows if w != windows[0]), windows[0])
