"""Generation with a key/value cache: one prefill, then one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax.training._ids import check_ids, learned_positions, models_of, positions_taken

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
  decoder_start_token_id: int | Sequence[int] | None = None,
) -> Generated:
  """Continues prompts, greedily or by sampling; of an encoder-decoder, answers sources.

  An encoder-decoder encodes its source once, and computes cross attention's keys and values once.

  The program is compiled once per shape of the prompts, `max_new_tokens`, `top_k` and stopping
  tokens; other weights, prompts, keys, temperatures and `top_p` reuse it.

  Args:
    apply: `model.apply` of a language model, or `pelt.bypass(model.apply)`. Keep the object: a new
      one is a new program.
    params: the model's parameters, with or without nodes.
    input_ids: (B, T) int, the prompts, or an encoder-decoder's sources.
    attention_mask: (B, T) of 0/1, at least one real token per row. Prompts padded on the right are
      moved to the right edge, where generation continues; sources stay where they are.
    max_new_tokens: how many tokens to make at most. The loop ends when all rows have stopped.
    rows: which member of a bank each row uses; needs a bypassed `apply`.
    key: random key; needed when `temperature` > 0.
    temperature: 0 takes the best token; otherwise logits are divided by it before sampling.
    top_k: sample among the k best only.
    top_p: sample among the fewest best tokens whose probabilities sum to at least `top_p`.
    eos_token_id: a row stops after this token (or any of these).
    pad_token_id: fills rows that have stopped.
    decoder_start_token_id: what an encoder-decoder's answer starts behind, one token or several
      (BART's start and a forced first token); by default what the model's configuration says, where
      `apply` is its method or a bypass of that. It is no part of the result.

  Returns:
    `Generated(tokens, lengths)`.

  Raises:
    ValueError: a bad shape, mask or option, or more tokens than the model has learned positions (a
      prefix takes some of them); the argument is named.

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
  start = start_tokens(apply, decoder_start_token_id)
  ids, mask = checked_mask(ids, attention_mask)
  check_ids(apply, params, int(np.where(mask, ids, 0).max()))
  if not start:
    ids, mask = left_padded(ids, mask)
  check_positions(apply, params, mask, max_new_tokens, start, rows)
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
    stops=stopping_tokens(eos_token_id),
    pad=pad_token_id,
    start=start,
  )
  return Generated(tokens, lengths)


def start_tokens(apply: Any, given: int | Sequence[int] | None) -> tuple[int, ...]:
  """What an encoder-decoder's answer starts behind; nothing for a decoder."""
  if given is not None:
    return tuple(int(t) for t in np.atleast_1d(np.asarray(given)))
  for model in models_of(apply):
    token = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if token is not None:
      return (int(token),)
  return ()


def check_positions(
  apply: Any, params: Any, mask: np.ndarray, steps: int, start: tuple[int, ...], rows: Any
) -> None:
  """Raises where a table of learned positions is too short; without one there is no limit.

  The last new token is never read, so it needs no position.
  """
  limit = learned_positions(apply)
  if limit is None:
    return
  shift = positions_taken(params, rows)
  free = limit - shift
  has = f"the model has learned {limit} positions" + (f", a prefix takes {shift}" if shift else "")
  if start and mask.shape[1] > free:
    raise ValueError(f"input_ids: sources of {mask.shape[1]} tokens are too long: {has}")
  given = len(start) if start else int(mask.sum(axis=1).max())
  if given + steps - 1 > free:
    raise ValueError(
      f"max_new_tokens={steps} behind {given} tokens needs {given + steps - 1} positions: {has}; "
      f"at most {max(free - given + 1, 0)} new tokens fit"
    )


def stopping_tokens(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
  """The stopping tokens as a tuple."""
  if eos_token_id is None:
    return ()
  return tuple(int(t) for t in np.atleast_1d(np.asarray(eos_token_id)))


def checked_mask(ids: np.ndarray, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
  """The ids and their mask, ones if there is none; every row has a real token."""
  if attention_mask is None:
    return ids, np.ones(ids.shape, np.int32)
  mask = np.asarray(attention_mask).astype(np.int32)
  if mask.shape != ids.shape:
    raise ValueError(f"attention_mask must be {ids.shape} like input_ids, got {mask.shape}")
  if not mask.any(axis=1).all():
    empty = np.flatnonzero(~mask.any(axis=1)).tolist()
    raise ValueError(f"attention_mask is all zero in rows {empty}: every prompt needs a token")
  return ids, mask


def left_padded(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Shifts every row so that its last real token stands at the right edge."""
  after = mask[:, ::-1].argmax(axis=1)  # how much padding follows the last real token
  source = (np.arange(ids.shape[1])[None] - after[:, None]) % ids.shape[1]
  return np.take_along_axis(ids, source, 1), np.take_along_axis(mask, source, 1)


def decoding(
  apply: Callable[..., Any], params: Any, length: int, steps: int, start: tuple[int, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The two calls of cached decoding.

  Args:
    apply: see `generate`.
    params: see `generate`.
    length: of the prompts or sources.
    steps: how many tokens are to come.
    start: what an encoder-decoder's answer starts behind; empty for a decoder.

  Returns:
    `prefill(ids, mask, rows) -> (logits, cache)` and `step(last, cache, rows) -> (logits, cache)`
    with logits (B, 1, V) and the last tokens (B, 1).
  """
  slots = steps + (len(start) if start else length)
  options: dict[str, Any] = {"cache_length": slots, "last_only": True, "mutable": ["cache"]}

  def call(variables: Any, *args: Any, rows: Array | None, **kwargs: Any) -> Any:
    kwargs |= options if rows is None else options | {"rows": rows}
    return apply(variables, *args, **kwargs)

  def prefill(ids: Array, mask: Array, rows: Array | None) -> Any:
    if not start:
      return call({"params": params}, ids, mask, rows=rows)
    first = jnp.broadcast_to(jnp.array(start, jnp.int32)[None], (ids.shape[0], len(start)))
    return call({"params": params}, ids, mask, decoder_input_ids=first, rows=rows)

  def step(last: Array, cache: Any, rows: Array | None) -> Any:
    variables = {"params": params, **cache}
    if not start:
      return call(variables, last, rows=rows)
    return call(variables, None, decoder_input_ids=last, rows=rows)

  return prefill, step


@functools.partial(jax.jit, static_argnames=("apply", "steps", "top_k", "stops", "pad", "start"))
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
  start: tuple[int, ...],
) -> tuple[Array, Array]:
  batch, length = ids.shape
  prefill, follow = decoding(apply, params, length, steps, start)

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
    logits, cache = follow(last, cache, rows)
    token = jnp.where(done, jnp.int32(pad), choose(logits, step))
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
    return step + 1, tokens, lengths + (~done).astype(jnp.int32), done | stopped(token), cache

  logits, cache = prefill(ids, mask, rows)
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
