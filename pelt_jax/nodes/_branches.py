"""Branches: functions `x -> delta` that a placement puts somewhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Branch, extra, materialize, own, product, static

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
    h = _affine(x, self.array("down"), self.array("down_bias"))
    h = ACTIVATIONS[self.activation](h)
    if self.dropout is not None:
      h = self.dropout(call, h)
    h = _affine(h, self.array("up"), self.array("up_bias"))
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
  """One number per row: the mean over real tokens of `sigmoid(x @ kernel + bias)`, (B, 1, 1).

  Attributes:
    kernel: (d, 1).
    bias: (1,).
    mask: name of the enclosing argument that marks real tokens, (B, T); None for all tokens.
  """

  kernel: Any = own()
  bias: Any = own()
  mask: str | None = static("attention_mask")

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.sigmoid(_affine(x, self.array("kernel"), self.array("bias")))
    real = call.arg(self.mask, None) if self.mask else None
    weights = jnp.ones_like(gates) if real is None else jnp.asarray(real, x.dtype)[..., None]
    gate = jnp.sum(gates * weights, 1, keepdims=True) / jnp.sum(weights, 1, keepdims=True)
    call.record("gates", gate[:, 0, 0])
    return gate


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
  y = product("...i,io->...o", x, kernel)
  return y if bias is None else y + jnp.asarray(bias, x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
