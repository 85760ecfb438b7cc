"""Cross entropy over a large vocabulary without the full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from flax import linen as nn
from flax.core import lift
from jax.custom_derivatives import SymbolicZero

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

  At most about `chunk` rows of logits exist at a time. Chunks cut the sequence and not the batch,
  which may be split over devices. A frozen head costs nothing more than its two products: a chunk's
  gradient in x is made while its logits are there. Where the head trains, or its adapter does, the
  backward pass computes the logits again. Derivatives in forward mode (`jax.jvp`) are not defined
  for several chunks.

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
    return None, one_chunk(module, *xs)

  def losses(module: nn.Module, x: Array, labels: Array) -> Array:
    return token_losses(head(module, x), labels)

  one_chunk = nn.transforms.lift_transform(_gradient_with_loss, losses)
  scan = nn.scan(
    body,
    variable_broadcast="params",
    variable_axes={"intermediates": 0},
    split_rngs={"params": False, "dropout": True},
    in_axes=1,
    out_axes=1,
  )
  _, out = scan(module, None, (x, labels))
  return out.reshape(batch, steps * size)[:, :length]


def _gradient_with_loss(losses: Callable) -> Callable:
  """A lifted `losses(scope, x, labels)`: with frozen variables, x's gradient is made forwards.

  Position t's loss reads x[:, t] alone, so its gradient is the cotangent's entry times what a
  cotangent of ones gives.
  """

  def inner(scope_fn, repack_fn, variables, rngs, x, labels):
    def run(variables, rngs, x, labels):
      scope = scope_fn(variables, rngs)
      return losses(scope, x, labels), repack_fn(scope)

    # Traced once: a module that counts its calls, as dropout does, would differ the second time.
    program, shapes = jax.make_jaxpr(run, return_shape=True)(variables, rngs, x, labels)
    # Variables are all of the module's, and the head reads few; the others, which may train, stay
    # outside.
    read = {v for eqn in program.eqns for v in eqn.invars if not hasattr(v, "val")}
    leaves, keys = jax.tree.leaves(variables), jax.tree.leaves(rngs)
    picked = [slot in read for slot in program.jaxpr.invars[: len(leaves)]]
    weights = [w for w, mine in zip(leaves, picked, strict=True) if mine] + keys + program.consts
    shape_of = lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype)
    blanks = [None if mine else shape_of(w) for w, mine in zip(leaves, picked, strict=True)]

    def evaluate(weights, x, labels):
      left = iter(weights)
      values = [next(left) if blank is None else jnp.zeros_like(blank) for blank in blanks]
      values += [next(left) for _ in keys]
      closed = jax.extend.core.ClosedJaxpr(program.jaxpr, list(left))
      out = jax.extend.core.jaxpr_as_fun(closed)(*values, x, labels)
      return jax.tree.unflatten(jax.tree.structure(shapes), out)

    def forward(weights, x, labels):
      trains = any(w.perturbed for w in weights)
      weights, x, labels = [w.value for w in weights], x.value, labels.value
      if trains:
        return evaluate(weights, x, labels), (None, (weights, x, labels))
      out, pull, rest = jax.vjp(lambda x: evaluate(weights, x, labels), x, has_aux=True)
      return (out, rest), (pull(jnp.ones_like(out))[0], None)

    def backward(kept, cotangents):
      gradient, inputs = kept
      ct: Any = cotangents[0]  # what a chunk records has no gradient
      if isinstance(ct, SymbolicZero):
        aval: Any = ct.aval
        ct = jnp.zeros(aval.shape, aval.dtype)
      if inputs is None:
        return None, jnp.asarray(gradient * ct[..., None], gradient.dtype), None
      weights, x, labels = inputs
      _, pull, _ = jax.vjp(lambda w, x: evaluate(w, x, labels), weights, x, has_aux=True)
      return *pull(ct), None

    chunk = jax.custom_vjp(evaluate)
    chunk.defvjp(forward, backward, symbolic_zeros=True)
    return chunk(weights, x, labels)

  return lift.pack(inner, (True,), (True,), (True,), name="gradient_with_loss")
