"""Generation with a key/value cache: one prefill, then one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Generated(NamedTuple):
  """What `generate` returns.

  Attributes:
    tokens: (B, max_new_tokens) int32, the new tokens; `pad_token_id` after a row has stopped.
    lengths: (B,) int32, how many of them count; the stopping token is counted.
  """

  tokens: Array
  lengths: Array


def generate(
  apply: Callable[..., Any],
  params: Any,
  input_ids: Any,
  attention_mask: Any = None,
  *,
  max_new_tokens: int,
  rows: Any = None,
  key: Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  eos_token_id: int | Sequence[int] | None = None,
  pad_token_id: int = 0,
) -> Generated:
  """Continues prompts, greedily or by sampling.

  The program is compiled once per shape of the prompts, `max_new_tokens`, `top_k` and stopping
  tokens; other weights, prompts, keys, temperatures and `top_p` reuse it.

  Args:
    apply: `model.apply` of a language model, or `pelt.bypass(model.apply)`. Keep the object: a new
      one is a new program.
    params: the model's parameters, with or without nodes.
    input_ids: (B, T) int, the prompts.
    attention_mask: (B, T) of 0/1, at least one real token per row. Prompts padded on the right are
      moved to the right edge, where generation continues.
    max_new_tokens: how many tokens to make at most. The loop ends when all rows have stopped.
    rows: which member of a bank each row uses; needs a bypassed `apply`.
    key: random key; needed when `temperature` > 0.
    temperature: 0 takes the best token; otherwise logits are divided by it before sampling.
    top_k: sample among the k best only.
    top_p: sample among the fewest best tokens whose probabilities sum to at least `top_p`.
    eos_token_id: a row stops after this token (or any of these).
    pad_token_id: fills rows that have stopped.

  Returns:
    `Generated(tokens, lengths)`.

  Raises:
    ValueError: a bad shape, mask or option; the argument is named.

      out = generate(model.apply, params, ids, mask, max_new_tokens=32, eos_token_id=2)
      text = tokenizer.decode(out.tokens[0, : out.lengths[0]])
  """
  ids = np.asarray(input_ids)
  if ids.ndim != 2 or ids.shape[1] == 0 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"input_ids must be (B, T) integers, T > 0; got {ids.dtype} {ids.shape}")
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
  if temperature < 0:
    raise ValueError(f"temperature must not be negative, got {temperature}")
  if temperature == 0 and (top_k is not None or top_p is not None):
    raise ValueError("top_k and top_p need temperature > 0; at 0 the best token is taken")
  if temperature > 0 and key is None:
    raise ValueError("temperature > 0 samples: pass key=jax.random.key(seed)")
  if top_k is not None and top_k < 1:
    raise ValueError(f"top_k must be at least 1, got {top_k}")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p must be in (0, 1], got {top_p}")
  ids, mask = _left_padded(ids, attention_mask)
  if eos_token_id is None:
    stops: tuple[int, ...] = ()
  else:
    stops = tuple(int(t) for t in np.atleast_1d(np.asarray(eos_token_id)))
  tokens, lengths = _run(
    params,
    jnp.asarray(ids, jnp.int32),
    jnp.asarray(mask),
    None if rows is None else jnp.asarray(rows),
    key if temperature > 0 else None,
    jnp.float32(temperature),
    None if top_p is None else jnp.float32(top_p),
    apply=apply,
    steps=max_new_tokens,
    top_k=top_k,
    stops=stops,
    pad=pad_token_id,
  )
  return Generated(tokens, lengths)


def _left_padded(ids: np.ndarray, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
  """Shifts every row so that its last real token stands at the right edge."""
  if attention_mask is None:
    return ids, np.ones(ids.shape, np.int32)
  mask = np.asarray(attention_mask).astype(np.int32)
  if mask.shape != ids.shape:
    raise ValueError(f"attention_mask must be {ids.shape} like input_ids, got {mask.shape}")
  if not mask.any(axis=1).all():
    empty = np.flatnonzero(~mask.any(axis=1)).tolist()
    raise ValueError(f"attention_mask is all zero in rows {empty}: every prompt needs a token")
  after = mask[:, ::-1].argmax(axis=1)  # how much padding follows the last real token
  source = (np.arange(ids.shape[1])[None] - after[:, None]) % ids.shape[1]
  return np.take_along_axis(ids, source, 1), np.take_along_axis(mask, source, 1)


@functools.partial(jax.jit, static_argnames=("apply", "steps", "top_k", "stops", "pad"))
def _run(
  params: Any,
  ids: Array,
  mask: Array,
  rows: Array | None,
  key: Array | None,
  temperature: Array,
  top_p: Array | None,
  *,
  apply: Callable[..., Any],
  steps: int,
  top_k: int | None,
  stops: tuple[int, ...],
  pad: int,
) -> tuple[Array, Array]:
  batch, length = ids.shape
  options = {"cache_length": length + steps, "last_only": True, "mutable": ["cache"]}
  if rows is not None:
    options["rows"] = rows

  def choose(logits: Array, step: Array) -> Array:
    logits = logits[:, -1]
    if key is None:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits.astype(jnp.float32) / temperature, top_k, top_p)
    token = jax.random.categorical(jax.random.fold_in(key, step), logits, axis=-1)
    return token.astype(jnp.int32)

  def stopped(token: Array) -> Array:
    return functools.reduce(jnp.logical_or, [token == s for s in stops], jnp.zeros(batch, bool))

  def go_on(state: tuple[Any, ...]) -> Array:
    step, _, _, done, _ = state
    return (step < steps) & ~jnp.all(done)

  def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
    step, tokens, lengths, done, cache = state
    last = jax.lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
    logits, cache = apply({"params": params, **cache}, last, **options)
    token = jnp.where(done, jnp.int32(pad), choose(logits, step))
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
    return step + 1, tokens, lengths + (~done).astype(jnp.int32), done | stopped(token), cache

  logits, cache = apply({"params": params}, ids, mask, **options)
  token = choose(logits, jnp.int32(0))
  tokens = jnp.full((batch, steps), pad, jnp.int32).at[:, 0].set(token)
  state = (jnp.int32(1), tokens, jnp.ones(batch, jnp.int32), stopped(token), cache)
  _, tokens, lengths, _, _ = jax.lax.while_loop(go_on, body, state)
  return tokens, lengths


def restrict(logits: Array, top_k: int | None, top_p: Array | float | None) -> Array:
  """Sets the logits of tokens that must not be drawn to -inf; (B, V) to (B, V).

  >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  >>> (
  ...   jnp.isfinite(restrict(logits, 3, None)).tolist(),
  ...   jnp.isfinite(restrict(logits, None, 0.6)).tolist(),
  ... )
  ([[True, True, True, False]], [[True, True, False, False]])
  """
  if top_k is not None:
    least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None:
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # A token stays if those before it do not yet make up top_p; the best one always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(kept, logits, -jnp.inf)
  return logits
