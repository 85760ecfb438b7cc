import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax.training._beam import beam_search
from pelt_jax.training._generate import generate
from tests.test_models.helpers import PAD, built, padded, tokens

# log p(next | last) of a chain of 4 tokens in which the likeliest first step is a mistake.
CHAIN = np.log(
  np.array(
    [[0.1, 0.5, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25], [0.02, 0.03, 0.05, 0.9], [0.1, 0.1, 0.7, 0.1]]
  )
).astype(np.float32)


def chain(variables, ids, mask=None, *, cache_length, last_only, mutable):
  index = variables.get("cache", {"index": jnp.int32(0)})["index"]
  return jnp.asarray(CHAIN)[ids[:, -1:]], {"cache": {"index": index + ids.shape[1]}}


def test_the_best_of_all_sequences_is_found():
  every = list(itertools.product(range(4), repeat=3))
  score = lambda s: CHAIN[0, s[0]] + CHAIN[s[0], s[1]] + CHAIN[s[1], s[2]]
  order = sorted(every, key=score, reverse=True)
  out = beam_search(chain, {}, np.array([[0]]), beams=16, max_new_tokens=3, length_penalty=0.0)
  np.testing.assert_allclose(out.scores[0], [score(s) for s in order[:16]], rtol=1e-5)
  assert tuple(out.tokens[0, 0].tolist()) == order[0] == (2, 3, 2)
  greedy = generate(chain, {}, np.array([[0]]), max_new_tokens=3)
  assert greedy.tokens[0, 0] == 1  # which beam search avoids
  np.testing.assert_array_equal(out.lengths, 3)


def test_stopping_and_the_length_penalty_in_closed_form():
  # From 0 with token 3 as the end: [3], [2, 3], [1, 3], [2, 2, 3] … and their log probabilities.
  find = lambda penalty: beam_search(
    chain, {}, np.array([[0]]), beams=4, max_new_tokens=5, length_penalty=penalty, eos_token_id=3,
    pad_token_id=9,
  )  # fmt: skip
  out = find(0.0)
  assert out.tokens[0, 0].tolist() == [2, 3, 9, 9, 9] and out.lengths[0, 0] == 2
  np.testing.assert_allclose(out.scores[0, 0], np.log(0.3 * 0.9), rtol=1e-5)
  out = find(1.0)
  np.testing.assert_allclose(out.scores[0, 0], np.log(0.3 * 0.9) / 2, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "task", "scan"),
  [
    ("gpt2", "lm", False),
    pytest.param("mistral", "lm", True, marks=pytest.mark.parity),
    pytest.param("t5", "seq2seq", False, marks=pytest.mark.parity),
    ("t5", "seq2seq", True),
  ],
)
def test_one_beam_is_greedy(name, task, scan):
  model, params = built(name, task, scan)
  batch = padded(tokens(3, 6), [6, 4, 1], "right")
  want = generate(model.apply, params, *batch, max_new_tokens=6)
  out = beam_search(model.apply, params, *batch, beams=1, max_new_tokens=6)
  np.testing.assert_array_equal(out.tokens[:, 0], want.tokens)


@pytest.mark.parametrize(
  ("name", "task"),
  [("gpt2", "lm"), pytest.param("bart-scaled", "seq2seq", marks=pytest.mark.parity)],
)
def test_scores_are_those_of_a_full_forward(name, task):
  model, params = built(name, task)
  apply, prompt = jax.jit(model.apply), tokens(2, 5)
  out = beam_search(
    model.apply, params, prompt, beams=3, max_new_tokens=4, length_penalty=0.0, pad_token_id=PAD
  )
  assert (np.diff(np.asarray(out.scores), axis=1) < 0).all()  # best first
  for row, beam in itertools.product(range(2), range(3)):
    answer = np.asarray(out.tokens)[row, beam][None]
    if task == "lm":
      ids = np.concatenate([prompt[row : row + 1], answer], axis=1)
      logits = apply({"params": params}, ids)[:, 4:-1]
    else:
      logits = apply(
        {"params": params},
        prompt[row : row + 1],
        decoder_input_ids=np.concatenate([[[5]], answer[:, :-1]], axis=1),
      )
    logp = jax.nn.log_softmax(logits, axis=-1)
    total = np.take_along_axis(np.asarray(logp), answer[..., None], axis=-1).sum()
    np.testing.assert_allclose(out.scores[row, beam], total, rtol=1e-4)


def test_nodes_run_in_every_step():
  model, params = built("gpt2", "lm")
  prompt = tokens(2, 5)
  method = pelt.lora(rank=2, targets="query")
  nodes = method.init(jax.random.key(0), params, pelt.sites(model, prompt))
  nodes = jax.tree.map(lambda x: x + 0.1 if x.shape[-2:-1] == (2,) else x, nodes)
  got = beam_search(pelt.bypass(model.apply), nodes, prompt, beams=3, max_new_tokens=5)
  want = beam_search(model.apply, pelt.merge(nodes), prompt, beams=3, max_new_tokens=5)
  np.testing.assert_array_equal(got.tokens[:, 0], want.tokens[:, 0])
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4)


def test_a_cache_of_unknown_leaves_is_refused():
  def other(*args, **kwargs):
    logits, _ = chain(*args, **kwargs)
    return logits, {"cache": {"state": jnp.zeros((1, 2))}}

  with pytest.raises(ValueError, match=r"which axis of the cache's \['cache'\]\['state'\]"):
    beam_search(other, {}, np.array([[0]]), beams=2, max_new_tokens=3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(input_ids=np.zeros(3, int)), r"input_ids must be \(B, T\) integers"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    (dict(beams=0), "beams must be at least 1, got 0"),
    (dict(attention_mask=np.zeros((1, 1))), r"all zero in rows \[0\]"),
  ],
)
def test_bad_arguments_are_named(options, message):
  given = dict(input_ids=np.zeros((1, 1), int), beams=2, max_new_tokens=2) | options
  with pytest.raises(ValueError, match=message):
    beam_search(chain, {}, given.pop("input_ids"), **given)
