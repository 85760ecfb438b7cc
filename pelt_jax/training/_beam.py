"""Beam search with a key/value cache: one prefill, then one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax.training._generate import (
  check_positions,
  checked_mask,
  decoding,
  left_padded,
  start_tokens,
)
from pelt_jax.training._generate import stopping_tokens as stopping
from pelt_jax.training._ids import check_ids

Array = jax.Array
# A cache's leaves by name: how many axes from the end the batch is. Layers may lead.
_AXES = {"key": 4, "value": 4, "mask": 2, "source_key": 4, "source_value": 4, "source_mask": 2}
_NEVER = -1e9  # finite, so that sums and quotients of it stay numbers


class Beams(NamedTuple):
  """What `beam_search` returns, a row's best answer first.

  Attributes:
    tokens: (B, beams, max_new_tokens) int32; `pad_token_id` after an answer's end.
    lengths: (B, beams) int32, how many of them count; the stopping token is counted. 0 where fewer
      answers than beams were found.
    scores: (B, beams) float32, the answer's log probability / length ** length_penalty.
  """

  tokens: Array
  lengths: Array
  scores: Array


class _State(NamedTuple):
  step: Array
  tokens: Array  # (B, K, steps) of the beams that go on
  scores: Array  # (B, K), log probabilities
  done_tokens: Array
  done_scores: Array
  done: Array  # (B, K), which of the finished places are taken
  open: Array  # (B,), whether a beam that goes on can still beat the finished ones
  go_on: Array
  cache: Any


def beam_search(
  apply: Callable[..., Any],
  params: Any,
  input_ids: Any,
  attention_mask: Any = None,
  *,
  beams: int,
  max_new_tokens: int,
  rows: Any = None,
  length_penalty: float = 1.0,
  eos_token_id: int | Sequence[int] | None = None,
  pad_token_id: int = 0,
  decoder_start_token_id: int | Sequence[int] | None = None,
) -> Beams:
  """The most probable answers that a beam of several finds, as Hugging Face searches for them.

  At every step each row keeps its `beams` best beginnings. One that stops is set aside; the search
  ends when no beginning's score, at its present length, beats the worst answer set aside.

  Args:
    apply: see `generate`.
    params: see `generate`.
    input_ids: (B, T) int, prompts or sources, see `generate`.
    attention_mask: (B, T) of 0/1, see `generate`.
    beams: how many beginnings a row keeps.
    max_new_tokens: how many tokens to make at most.
    rows: which member of a bank each row uses; needs a bypassed `apply`.
    length_penalty: scores are divided by the length to this power: above 0 favours long answers.
    eos_token_id: an answer ends with this token (or any of these).
    pad_token_id: fills what follows an answer.
    decoder_start_token_id: see `generate`.

  Returns:
    `Beams(tokens, lengths, scores)`.

  Raises:
    ValueError: as `generate`.

      out = beam_search(model.apply, params, ids, mask, beams=4, max_new_tokens=32, eos_token_id=1)
      best = out.tokens[:, 0]
  """
  ids = np.asarray(input_ids)
  if ids.ndim != 2 or ids.shape[1] == 0 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"input_ids must be (B, T) integers, T > 0; got {ids.dtype} {ids.shape}")
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
  if beams < 1:
    raise ValueError(f"beams must be at least 1, got {beams}")
  start = start_tokens(apply, decoder_start_token_id)
  ids, mask = checked_mask(ids, attention_mask)
  check_ids(apply, params, int(np.where(mask, ids, 0).max()))
  if not start:
    ids, mask = left_padded(ids, mask)
  check_positions(apply, params, mask, max_new_tokens, start, rows)
  return _run(
    params,
    jnp.asarray(ids, jnp.int32),
    jnp.asarray(mask),
    None if rows is None else jnp.asarray(rows),
    jnp.float32(length_penalty),
    apply=apply,
    beams=beams,
    steps=max_new_tokens,
    stops=stopping(eos_token_id),
    pad=pad_token_id,
    start=start,
  )


@functools.partial(jax.jit, static_argnames=("apply", "beams", "steps", "stops", "pad", "start"))
def _run(
  params: Any,
  ids: Array,
  mask: Array,
  rows: Array | None,
  penalty: Array,
  *,
  apply: Callable[..., Any],
  beams: int,
  steps: int,
  stops: tuple[int, ...],
  pad: int,
  start: tuple[int, ...],
) -> Beams:
  batch, length = ids.shape
  prefill, follow = decoding(apply, params, length, steps, start)
  # Enough candidates that `beams` of them go on even if all the others stop.
  width = max(2, 1 + len(stops)) * beams

  def advance(state: _State, logits: Array, cache: Any) -> _State:
    """Takes the next token: logits (B * K, V)."""
    vocab = logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(batch, beams, vocab)
    flat = (scores + state.scores[..., None]).reshape(batch, beams * vocab)
    scores, best = jax.lax.top_k(flat, min(width, beams * vocab))
    beam, token = best // vocab, (best % vocab).astype(jnp.int32)
    tokens = _take(state.tokens, beam)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None], state.step, axis=2)
    new = state.step + 1
    last = jnp.full(token.shape, new == steps)
    stop = functools.reduce(jnp.logical_or, [token == s for s in stops], last)
    kept, order = jax.lax.top_k(jnp.where(stop, scores + _NEVER, scores), beams)
    # Only what is among the best `beams` may end; the rest is there to go on.
    ends = stop & (jnp.arange(stop.shape[1]) < beams)[None]
    power = new.astype(jnp.float32) ** penalty
    ended = jnp.where(ends & state.open[:, None], scores / power, _NEVER)
    done_scores, place = jax.lax.top_k(jnp.concatenate([state.done_scores, ended], axis=1), beams)
    done = _take(jnp.concatenate([state.done, ends], axis=1), place)
    done_tokens = _take(jnp.concatenate([state.done_tokens, tokens], axis=1), place)
    worst = jnp.where(done, jnp.min(done_scores, axis=1, keepdims=True), _NEVER)
    can_win = jnp.any(kept[:, :1] / power > worst, axis=1)
    still = state.open & can_win
    return _State(
      step=new,
      tokens=_take(tokens, order),
      scores=kept,
      done_tokens=done_tokens,
      done_scores=done_scores,
      done=done,
      open=still,
      go_on=jnp.any(still) & ~jnp.all(stop),
      cache=_reordered(cache, jnp.take_along_axis(beam, order, axis=1)),
    )

  def body(state: _State) -> _State:
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=2)
    many = None if rows is None else jnp.repeat(rows, beams, axis=0)
    logits, cache = follow(last.reshape(batch * beams, 1), state.cache, many)
    return advance(state, logits[:, -1], cache)

  logits, cache = prefill(ids, mask, rows)  # once per row: its beams begin alike
  blank = jnp.full((batch, beams, steps), pad, jnp.int32)
  never = jnp.full((batch, beams), _NEVER, jnp.float32)
  state = _State(
    step=jnp.int32(0),
    tokens=blank,
    scores=never.at[:, 0].set(0.0),  # the other beams are copies until they differ
    done_tokens=blank,
    done_scores=never,
    done=jnp.zeros((batch, beams), bool),
    open=jnp.ones((batch,), bool),
    go_on=jnp.bool_(True),
    cache=None,
  )
  state = advance(state, jnp.repeat(logits[:, -1], beams, axis=0), _repeated(cache, beams))
  state = jax.lax.while_loop(lambda s: s.go_on, body, state)
  found = state.done_scores > _NEVER / 2
  hit = functools.reduce(jnp.logical_or, [state.done_tokens == s for s in stops], jnp.bool_(False))
  hit = jnp.broadcast_to(hit, state.done_tokens.shape)
  lengths = jnp.where(jnp.any(hit, axis=2), jnp.argmax(hit, axis=2) + 1, steps)
  lengths = jnp.where(found, lengths, 0).astype(jnp.int32)
  real = jnp.arange(steps)[None, None] < lengths[..., None]
  scores = jnp.where(found, state.done_scores, -jnp.inf)
  return Beams(jnp.where(real, state.done_tokens, jnp.int32(pad)), lengths, scores)


def _take(x: Array, beam: Array) -> Array:
  """X (B, K, …) at the beams (B, M)."""
  return jnp.take_along_axis(x, beam.reshape(*beam.shape, *(1,) * (x.ndim - 2)), axis=1)


def _axis(path: Any, x: Array) -> int | None:
  """The batch axis of a cache's leaf; None for the slot counter, which all rows share."""
  name = path[-1].key
  if name == "index":
    return None
  if name not in _AXES:
    raise ValueError(
      f"beam search cannot tell which axis of the cache's {jax.tree_util.keystr(path)} is the "
      f"batch: known names are index, {', '.join(_AXES)}"
    )
  return x.ndim - _AXES[name]


def _repeated(cache: Any, beams: int) -> Any:
  def repeat(path: Any, x: Array) -> Array:
    axis = _axis(path, x)
    return x if axis is None else jnp.repeat(x, beams, axis=axis)

  return jax.tree_util.tree_map_with_path(repeat, cache)


def _reordered(cache: Any, beam: Array) -> Any:
  """The cache whose beams continue the beams chosen, (B, K)."""
  batch, beams = beam.shape
  chosen = (beam + beams * jnp.arange(batch, dtype=beam.dtype)[:, None]).reshape(-1)

  def reorder(path: Any, x: Array) -> Array:
    axis = _axis(path, x)
    if axis is None or path[-1].key.startswith("source_"):  # all beams of a row share their source
      return x
    return jnp.take(x, chosen, axis=axis)

  return jax.tree_util.tree_map_with_path(reorder, cache)
