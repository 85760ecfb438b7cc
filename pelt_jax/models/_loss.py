"""Cross entropy over a large vocabulary without the full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax.models._attention import Array, at_least_float32

IGNORED = -100


def token_losses(logits: Array, labels: Array) -> Array:
  """-log softmax(logits)[label], in float32 at least; 0 where the label is -100.

  A label outside the vocabulary gives NaN rather than a neighbour's loss.

  >>> losses = token_losses(jnp.zeros((1, 2, 4)), jnp.array([[3, -100]]))
  >>> [round(loss, 4) for loss in losses[0].tolist()]
  [1.3863, 0.0]
  """
  logits = logits.astype(at_least_float32(logits.dtype))
  vocab = logits.shape[-1]
  # A comparison, not a gather: its gradient is then elementwise and fuses with the softmax's.
  hit = labels[..., None] == jnp.arange(vocab, dtype=labels.dtype)[(None,) * labels.ndim]
  picked = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
  losses = jax.nn.logsumexp(logits, axis=-1) - picked
  losses = jnp.where((labels >= 0) & (labels < vocab), losses, jnp.nan)
  return jnp.where(labels == IGNORED, jnp.zeros_like(losses), losses)


def chunked_losses(
  module: nn.Module, head: Callable[[Any, Array], Array], x: Array, labels: Array, chunk: int
) -> Array:
  """`token_losses(head(module, x), labels)`, computed over chunks of positions.

  The backward pass computes each chunk's logits again, so at most about `chunk` rows of logits
  exist at a time. Chunks cut the sequence and not the batch, which may be split over devices.

  Args:
    module: the bound module that owns the head's parameters.
    head: `head(module, x) -> logits`.
    x: hidden states (B, T, D).
    labels: (B, T).
    chunk: how many positions (of all rows together) to do at a time.

  Returns:
    (B, T).
  """
  batch, length, width = x.shape
  if labels.shape != (batch, length):
    raise ValueError(f"labels must have the shape of input_ids, {(batch, length)}: {labels.shape}")
  steps = -(-length // max(1, chunk // batch))
  size = -(-length // steps)
  if steps == 1:
    return token_losses(head(module, x), labels)
  padding = ((0, 0), (0, steps * size - length))
  x = jnp.pad(x, (*padding, (0, 0))).reshape(batch, steps, size, width)
  labels = jnp.pad(labels, padding, constant_values=IGNORED).reshape(batch, steps, size)

  def body(module: nn.Module, _: None, xs: tuple[Array, Array]) -> tuple[None, Array]:
    return None, token_losses(head(module, xs[0]), xs[1])

  scan = nn.scan(
    nn.remat(body, prevent_cse=False),
    variable_broadcast="params",
    variable_axes={"intermediates": 0},
    split_rngs={"params": False, "dropout": True},
    in_axes=1,
    out_axes=1,
  )
  _, losses = scan(module, None, (x, labels))
  return losses.reshape(batch, steps * size)[:, :length]
