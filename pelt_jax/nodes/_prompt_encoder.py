"""The generator of P-Tuning: an LSTM and an MLP make the rows of a prompt (arXiv:2103.10385)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import Generator, Node, Weight, own, static
from pelt_jax._walk import get_at, update_at
from pelt_jax.nodes._prompt import ExtendedEmbedding


class LstmCell(Node):
  """One direction of one LSTM layer; the gates lie side by side: input, forget, cell, output.

  Two biases that only ever act as a sum: both train, as in torch, so that an optimizer moves the
  sum twice as far as it would move one.

  Attributes:
    w_ih: (in, 4 H).
    w_hh: (H, 4 H).
    b_ih: (4 H,).
    b_hh: (4 H,).
  """

  w_ih: Any = own()
  w_hh: Any = own()
  b_ih: Any = own()
  b_hh: Any = own()

  def run(self, x: jax.Array, reverse: bool = False) -> jax.Array:
    """Hidden states (n, H) of x (n, in), read from its end if `reverse`."""
    w_ih, w_hh, b_ih, b_hh = (self.array(n) for n in ("w_ih", "w_hh", "b_ih", "b_hh"))

    def step(state: tuple, inputs: jax.Array) -> tuple:
      hidden, cell = state
      i, f, g, o = jnp.split(inputs + (hidden @ w_hh + b_hh), 4)
      cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
      hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
      return (hidden, cell), hidden

    start = jnp.zeros(w_hh.shape[:1], x.dtype)
    _, states = jax.lax.scan(step, (start, start), x @ w_ih + b_ih[None], reverse=reverse)
    return states


class Affine(Node):
  """`x @ kernel + bias`.

  Attributes:
    kernel: (in, out).
    bias: (out,).
  """

  kernel: Any = own()
  bias: Any = own()

  def run(self, x: jax.Array) -> jax.Array:
    """(n, out) of x (n, in)."""
    return x @ self.array("kernel") + self.array("bias")[None]


class PromptEncoder(Generator):
  """The prompt `MLP(LSTM(embedding))`, (n, d), put where a table's prompt waits.

  Attributes:
    embedding: (n, d).
    forward: the LSTM's layers that read from the first row on; none: no LSTM.
    backward: those that read from the last; a layer reads both outputs of the one below, [forward;
      backward], (n, 2 H).
    mlp: affine maps with a ReLU between.
    site: path of the table.
  """

  embedding: Any = own()
  forward: Any = own(())
  backward: Any = own(())
  mlp: Any = own(())
  site: str = static("")

  def prompt(self) -> jax.Array:
    """The rows (n, d)."""
    x = self.array("embedding")
    for ahead, back in zip(self.forward, self.backward, strict=True):
      x = jnp.concatenate([ahead.run(x), back.run(x, reverse=True)], axis=-1)
    for i, affine in enumerate(self.mlp):
      x = affine.run(jax.nn.relu(x) if i else x)
    return x

  def expand(self, params: dict) -> dict:
    return update_at(params, {self.site: self._filled(get_at(params, self.site))})

  def _filled(self, leaf: Any) -> Any:
    if isinstance(leaf, ExtendedEmbedding) and leaf.prompt is None:
      return leaf.replace(prompt=self.prompt())
    if not isinstance(leaf, Weight) or "base" not in leaf.kinds:
      raise ValueError(f"no prompt waits for its generator at {self.site!r}")
    return leaf.based(self._filled(leaf.inner))


def lstm_cell(
  key: jax.Array, inputs: int, hidden: int, dtype: Any, group: str | None = "trainable"
) -> LstmCell:
  """A cell as torch starts it: U(-1/sqrt(H), 1/sqrt(H)) throughout."""
  shapes = ((inputs, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,), (4 * hidden,))
  return LstmCell(*_uniform(key, shapes, hidden, dtype), group=group)


def affine(
  key: jax.Array, inputs: int, outputs: int, dtype: Any, group: str | None = "trainable"
) -> Affine:
  """An affine map as torch starts it: U(-1/sqrt(in), 1/sqrt(in)), the bias too."""
  return Affine(*_uniform(key, ((inputs, outputs), (outputs,)), inputs, dtype), group=group)


def _uniform(key: jax.Array, shapes: Sequence[tuple], size: int, dtype: Any) -> list[jax.Array]:
  keys = jax.random.split(key, len(shapes))
  bound = size**-0.5
  return [jax.random.uniform(k, s, dtype, -bound, bound) for k, s in zip(keys, shapes, strict=True)]
