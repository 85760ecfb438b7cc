"""Branches: functions `x -> delta` that a placement puts somewhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import materialize, product
from pelt_jax._node import Branch, extra, own, static

ACTIVATIONS = {
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,
  "tanh": jnp.tanh,
  "identity": lambda x: x,
}


class Bottleneck(Branch):
  """`scaling * (dropout(activation(x @ down + down_bias)) @ up + up_bias)`.

  Attributes:
    down: (d, m).
    down_bias: (m,) or None.
    up: (m, d).
    up_bias: (d,) or None.
    scaling: None, () or (d,); as a `Tuned` it trains.
    dropout: None or a `Dropout`.
    activation: a key of `ACTIVATIONS`.
  """

  down: Any = own()
  down_bias: Any = own()
  up: Any = own()
  up_bias: Any = own()
  scaling: Any = extra()
  dropout: Any = extra()
  activation: str = static("relu")

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    h = affine(x, self.array("down"), self.array("down_bias"))
    h = ACTIVATIONS[self.activation](h)
    if self.dropout is not None:
      h = self.dropout(call, h)
    h = affine(h, self.array("up"), self.array("up_bias"))
    if self.scaling is None:
      return h
    scaling = jnp.asarray(materialize(self.scaling), x.dtype)
    return h * scaling.reshape((1,) * (h.ndim - scaling.ndim) + scaling.shape)

  def unmergeable(self) -> str | None:
    if self.activation == "identity":
      return None
    return f"the activation {self.activation!r} stands between its two matrices"


class Normalized(Branch):
  """`branch(scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias)`: a norm that trains.

  Attributes:
    scale: (d,).
    bias: (d,).
    branch: what reads the normalized input.
    epsilon: added to the variance.
  """

  scale: Any = own()
  bias: Any = own()
  branch: Any = own()
  epsilon: float = static(1e-5)

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    wide = jnp.asarray(x, np.promote_types(x.dtype, jnp.float32))
    apart = wide - jnp.mean(wide, axis=-1, keepdims=True)
    root = jax.lax.rsqrt(jnp.mean(apart**2, axis=-1, keepdims=True) + self.epsilon)
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale, bias = (jnp.asarray(self.array(n), wide.dtype).reshape(shape) for n in ("scale", "bias"))
    return self.branch(call, jnp.asarray(apart * root * scale + bias, x.dtype))


class Gated(Branch):
  """`gate(x) * branch(x)`.

  Attributes:
    gate: a branch whose output broadcasts against the other's.
    branch: the branch scaled.
  """

  gate: Any = own()
  branch: Any = own()

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    return self.gate(call.salt(0), x) * self.branch(call.salt(1), x)

  def unmergeable(self) -> str:
    return "its gate depends on the input"


class MeanGate(Branch):
  """`sigmoid(x @ kernel + bias)`, as a rule the mean over a row's real tokens: (B, 1, g).

  The mean looks at the whole row, so a causal model refuses it, and packed rows do; over all
  tokens, padding included, it is refused in generation alone, for parity with code that does so.

  Attributes:
    kernel: (d, g), one column per gate.
    bias: (g,).
    mask: name of the enclosing argument that marks real tokens, (B, T); None for all tokens.
    pool: `"mean"`, or `"token"`: every token has its own gate, (B, T, g).
  """

  kernel: Any = own()
  bias: Any = own()
  mask: str | None = static("attention_mask")
  pool: str = static("mean")

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.sigmoid(affine(x, self.array("kernel"), self.array("bias")))
    if self.pool == "mean":
      gates = self._mean(call, x, gates)
    one = gates.shape[-1] == 1
    call.record(
      "gates", jnp.squeeze(gates, -1 if self.pool == "token" else (-2, -1)) if one else gates
    )
    return gates

  def _mean(self, call: Any, x: jax.Array, gates: jax.Array) -> jax.Array:
    if call.causal and (self.mask or call.arg("cache_length", None) is not None):
      raise ValueError(
        f"the gate at {call.path!r} is a mean over the row, in which a causal model would see what "
        "comes later; use gate_pool='token'"
      )
    if self.mask and call.arg("segment_ids", None) is not None:
      raise ValueError(
        f"the gate at {call.path!r} is a mean over the row, which several texts share in a packed "
        "one; use gate_pool='token', or rows of one text with an attention_mask"
      )
    if call.arg("pooled_only", False):
      raise ValueError(
        f"the gate at {call.path!r} is a mean over the row, of which a model with pooled_only=True "
        "computes one token; use model.clone(pooled_only=False), or gate_pool='token'"
      )
    real = call.arg(self.mask, None) if self.mask else None
    if real is None:
      return jnp.mean(gates, -2, keepdims=True)
    if real.ndim != 2:
      raise ValueError(
        f"the gate at {call.path!r} needs {self.mask} (B, T), which marks real tokens; it has "
        f"shape {real.shape}"
      )
    return _masked_mean(gates, call.mine(real))

  def unmergeable(self) -> str:
    return "its gate depends on the input"


class Closable(Branch):
  """`open * gate(x)`: a gate that can be closed for good.

  What a closed gate scales is exactly absent; a prefix it closes is hidden from the softmax, where
  keys of zero would keep their share. `record="mean_gate"` gives the gate's mean over real tokens,
  (B, g), closed or not.

  Attributes:
    gate: a branch, or () a number.
    open: (), 1.0 or 0.0; no gradient reaches it.
  """

  gate: Any = own()
  open: Any = own()

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    if isinstance(self.gate, Branch):
      gate: Any = self.gate(call, x)
    else:
      gate = jnp.asarray(self.array("gate"), x.dtype).reshape((1,) * x.ndim)
    if "mean_gate" in call.context.record:
      call.record("mean_gate", self._told(call, gate))
    return gate * jnp.asarray(jax.lax.stop_gradient(self.array("open")), gate.dtype)

  def _told(self, call: Any, gate: jax.Array) -> jax.Array:
    real = call.arg("attention_mask", None)
    if real is not None and real.shape == gate.shape[:-1]:
      gate = _masked_mean(gate, real)
    return jnp.mean(gate, -2)

  def unmergeable(self) -> str:
    return "its gate depends on the input"


def _masked_mean(gates: jax.Array, real: Any) -> jax.Array:
  """The mean over a row's real tokens, (..., T, g) -> (..., 1, g)."""
  weights = jnp.asarray(real, gates.dtype)[..., None]
  weights = weights.reshape(weights.shape[weights.ndim - gates.ndim :])  # a bank's row alone
  return jnp.sum(gates * weights, -2, keepdims=True) / jnp.sum(weights, -2, keepdims=True)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
  y = product("...i,io->...o", x, kernel)
  return y if bias is None else y + jnp.asarray(bias, x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
