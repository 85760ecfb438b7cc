import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax.training import _generate
from pelt_jax.training._beam import beam_search
from pelt_jax.training._generate import generate, restrict
from tests.test_models.helpers import CONFIGS, PAD, VOCAB, built, padded, tokens
from tests.test_training import tiny


@pytest.fixture(scope="module")
def model():
  return built("mistral", "lm")


def slowly(model, params, prompt, steps):
  """Greedy decoding by full forwards."""
  apply = jax.jit(model.apply)
  ids = np.zeros((len(prompt), prompt.shape[1] + steps), np.int32)
  ids[:, : prompt.shape[1]] = prompt
  for t in range(prompt.shape[1], ids.shape[1]):
    ids[:, t] = np.asarray(apply({"params": params}, ids))[:, t - 1].argmax(-1)
  return ids[:, prompt.shape[1] :]


def test_greedy_equals_full_forwards(model):
  prompt = tokens(2, 5)
  out = generate(model[0].apply, model[1], prompt, max_new_tokens=8)
  np.testing.assert_array_equal(out.tokens, slowly(*model, prompt, 8))
  np.testing.assert_array_equal(out.lengths, [8, 8])
  assert len(np.unique(out.tokens)) > 3  # no constant that anything would match


def test_a_padded_batch_equals_single_rows_on_either_side(model):
  ids, lengths = tokens(3, 6), [6, 4, 1]
  want = [slowly(*model, ids[i : i + 1, :n], 5)[0] for i, n in enumerate(lengths)]
  for side in ("left", "right"):
    out = generate(model[0].apply, model[1], *padded(ids, lengths, side), max_new_tokens=5)
    np.testing.assert_array_equal(out.tokens, want)


def test_rows_stop_at_their_stopping_token(model):
  prompt = tokens(2, 5)
  free = np.asarray(generate(model[0].apply, model[1], prompt, max_new_tokens=8).tokens)
  stops = (int(free[0, 2]), VOCAB + 5)
  out = generate(
    model[0].apply, model[1], prompt, max_new_tokens=8, eos_token_id=stops, pad_token_id=42
  )
  for row in range(2):
    hits = np.flatnonzero(free[row] == stops[0])
    n = hits[0] + 1 if len(hits) else 8
    assert out.lengths[row] == n
    np.testing.assert_array_equal(out.tokens[row, :n], free[row, :n])
    assert (out.tokens[row, n:] == 42).all()
  assert out.lengths[0] <= 3


def test_the_loop_ends_when_all_rows_have_stopped(model):
  apply, params, prompt = model[0].apply, model[1], tokens(1, 5)
  steps = []

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return apply(*args, **kwargs)

  first = int(generate(apply, params, prompt, max_new_tokens=1).tokens[0, 0])
  generate(
    counted, params, prompt, max_new_tokens=50, eos_token_id=first
  ).tokens.block_until_ready()
  jax.effects_barrier()
  assert len(steps) == 1


def test_equal_shapes_compile_once(model):
  prompt, before = tokens(2, 7), _generate._run._cache_size()
  for seed in range(3):
    sampling = dict(key=jax.random.key(seed), temperature=0.5 + seed, top_p=0.5 + seed / 10)
    generate(model[0].apply, model[1], prompt + seed, max_new_tokens=4, **sampling)
  assert _generate._run._cache_size() == before + 1


def test_sampling_follows_the_key_and_the_temperature(model):
  prompt = tokens(4, 5)
  draw = lambda **options: np.asarray(
    generate(model[0].apply, model[1], prompt, max_new_tokens=6, **options).tokens
  )
  a, b, c = (draw(key=jax.random.key(s), temperature=2.0) for s in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  greedy = draw()
  np.testing.assert_array_equal(draw(key=jax.random.key(0), temperature=5.0, top_k=1), greedy)
  np.testing.assert_array_equal(draw(key=jax.random.key(0), temperature=1e-4), greedy)


def test_every_token_is_drawn_anew(model):
  """With one key for all steps, equal distributions would give one token for ever."""
  apply = lambda variables, ids, *args, **kwargs: (jnp.zeros((ids.shape[0], 1, 64)), {"cache": {}})
  drawn = generate(
    apply, model[1], tokens(1, 5), max_new_tokens=20, temperature=1.0, key=jax.random.key(0)
  ).tokens
  assert len(set(np.asarray(drawn)[0].tolist())) > 5


def test_restrictions_in_closed_form():
  logits = jnp.log(jnp.array([[0.05, 0.5, 0.15, 0.3], [0.4, 0.3, 0.2, 0.1]]))
  kept = lambda *a: np.isfinite(restrict(logits, *a)).astype(int).tolist()
  assert kept(2, None) == [[0, 1, 0, 1], [1, 1, 0, 0]]
  assert kept(9, None) == [[1] * 4] * 2
  assert kept(None, 0.45) == [[0, 1, 0, 0], [1, 1, 0, 0]]
  assert kept(None, 0.85) == [[0, 1, 1, 1], [1, 1, 1, 0]]
  # Ties: the fewest tokens that reach top_p, and no more because they are equal.
  flat = jnp.zeros((1, 1000))
  assert int(np.isfinite(restrict(flat, None, 0.1)).sum()) == 100
  tied = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
  assert np.isfinite(restrict(tied, None, 0.5)).astype(int).tolist() == [[0, 1, 0]]  # 0.5 is enough
  # After top_k = 2 the first row is renormalised to 5/8, 3/8.
  assert kept(2, 0.6) == [[0, 1, 0, 0], [1, 1, 0, 0]]


def test_nodes_run_in_every_step(model):
  module, params = model
  prompt = tokens(2, 5)
  method = pelt.lora(rank=2, targets=("query", "value"))
  nodes = method.init(jax.random.key(0), params, pelt.sites(module, prompt))
  nodes = jax.tree.map(lambda x: x + 0.2 if x.shape[-2:-1] == (2,) else x, nodes)
  out = generate(pelt.bypass(module.apply), nodes, prompt, max_new_tokens=6)
  np.testing.assert_array_equal(out.tokens, slowly(module, pelt.merge(nodes), prompt, 6))
  assert (out.tokens != slowly(module, params, prompt, 6)).any()


SOURCES = padded(tokens(3, 7), [7, 4, 1], "right")


def answers(model, params, steps, start=(5,)):
  """Greedy answers to `SOURCES` by full forwards."""
  apply = jax.jit(model.apply)
  ids = np.full((3, len(start) + steps), 9, np.int32)
  ids[:, : len(start)] = start
  for t in range(len(start), ids.shape[1]):
    logits = apply({"params": params}, *SOURCES, decoder_input_ids=ids)
    ids[:, t] = np.asarray(logits)[:, t - 1].argmax(-1)
  return ids[:, len(start) :]


@pytest.mark.parametrize("name", ["t5", pytest.param("bart-scaled", marks=pytest.mark.parity)])
def test_an_encoder_decoder_answers_as_full_forwards_do(name):
  module, params = built(name, "seq2seq")
  want = answers(module, params, 8)
  assert len(np.unique(want)) > 3 and (want[0] != want[1]).any()
  out = generate(module.apply, params, *SOURCES, max_new_tokens=8)
  np.testing.assert_array_equal(out.tokens, want)
  stop = int(want[0, 2])
  out = generate(module.apply, params, *SOURCES, max_new_tokens=8, eos_token_id=stop)
  np.testing.assert_array_equal(out.tokens[0, : out.lengths[0]], want[0, : out.lengths[0]])
  assert out.tokens[0, out.lengths[0] - 1] == stop and out.lengths[0] <= 3
  # Another start than the configuration's, of two tokens.
  out = generate(module.apply, params, *SOURCES, max_new_tokens=4, decoder_start_token_id=(8, 20))
  np.testing.assert_array_equal(out.tokens, answers(module, params, 4, (8, 20)))


@pytest.mark.parity
def test_nodes_of_an_encoder_decoder_run_in_every_step():
  module, params = built("t5-gated", "seq2seq")
  method = pelt.lora(rank=2, targets=("query", "value", "ffn_in"))
  nodes = method.init(jax.random.key(0), params, pelt.sites(module, SOURCES[0]))
  nodes = jax.tree.map(lambda x: x + 0.2 if x.shape[-2:-1] == (2,) else x, nodes)
  out = generate(pelt.bypass(module.apply), nodes, *SOURCES, max_new_tokens=6)
  np.testing.assert_array_equal(out.tokens, answers(module, pelt.merge(nodes), 6))
  assert (out.tokens != answers(module, params, 6)).any()


@pytest.mark.parity
def test_an_encoder_decoder_samples_by_the_key():
  module, params = built("bart", "seq2seq")
  draw = lambda seed, **options: np.asarray(
    generate(
      module.apply, params, *SOURCES, max_new_tokens=6, key=jax.random.key(seed), **options
    ).tokens
  )
  a, b, c = (draw(s, temperature=3.0) for s in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  np.testing.assert_array_equal(draw(0, temperature=3.0, top_k=1), answers(module, params, 6))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(input_ids=np.zeros(3, int)), r"input_ids must be \(B, T\) integers"),
    (dict(input_ids=np.zeros((1, 3))), r"input_ids must be .* got float64"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    (dict(attention_mask=np.ones((2, 4))), r"attention_mask must be \(2, 3\)"),
    (dict(attention_mask=np.array([[0, 0, 0], [1, 1, 1]])), r"all zero in rows \[0\]"),
    (dict(temperature=-1.0), "temperature must not be negative"),
    (dict(temperature=1.0), "pass key="),
    (dict(top_k=3), "need temperature > 0"),
    (dict(temperature=1.0, key=jax.random.key, top_k=0), "top_k must be at least 1, got 0"),
    (dict(temperature=1.0, key=jax.random.key, top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
  ],
)
def test_bad_arguments_are_named(model, options, message):
  if "key" in options:
    options = options | {"key": options["key"](0)}
  given = dict(input_ids=np.ones((2, 3), int), max_new_tokens=2) | options
  with pytest.raises(ValueError, match=message):
    generate(model[0].apply, model[1], given.pop("input_ids"), **given)


def fits(name, task, length, steps, params=None, mask=None, **options):
  model, base = built(name, task)
  ids = tokens(2, length)
  mask = np.ones_like(ids) if mask is None else mask
  _generate.check_positions(
    pelt.bypass(model.apply), base if params is None else params, mask, steps, **options
  )


def test_more_tokens_than_learned_positions_are_refused():
  """GPT-2 here has 64 positions, BART 30; the last new token is never read."""
  decoder = dict(start=(), rows=None)
  fits("gpt2", "lm", 5, 60, **decoder)
  with pytest.raises(ValueError, match=r"max_new_tokens=61 behind 5 tokens needs 65 positions"):
    fits("gpt2", "lm", 5, 61, **decoder)
  padding = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])  # takes no position
  fits("gpt2", "lm", 5, 61, mask=padding, **decoder)
  fits("llama", "lm", 5, 1000, **decoder)  # rotary: no table
  answer = dict(start=(5,), rows=None)
  fits("bart", "seq2seq", 30, 30, **answer)
  with pytest.raises(ValueError, match="max_new_tokens=31.*at most 30 new tokens fit"):
    fits("bart", "seq2seq", 30, 31, **answer)
  with pytest.raises(ValueError, match="sources of 31 tokens are too long"):
    fits("bart", "seq2seq", 31, 1, **answer)
  model, base = built("gpt2", "lm")
  for make in (generate, functools.partial(beam_search, beams=2)):
    with pytest.raises(ValueError, match="at most 60 new tokens fit"):
      make(model.apply, base, tokens(1, 5), max_new_tokens=61)


def test_a_prefix_takes_positions():
  model, base = built("gpt2", "lm")
  sites = pelt.sites(model, tokens(2, 5))
  short, long, twice = (
    method.init(jax.random.key(0), base, sites)
    for method in (
      pelt.prefix_tuning(4, reparametrize=False),
      pelt.prefix_tuning(6, reparametrize=False),
      pelt.chain(*[pelt.prefix_tuning(4, reparametrize=False)] * 2),
    )
  )
  check = lambda params, steps, rows=None: fits("gpt2", "lm", 5, steps, params, start=(), rows=rows)
  for params, free in ((short, 56), (long, 54), (twice, 52)):
    check(params, free)
    with pytest.raises(ValueError, match=f"a prefix takes {60 - free}; at most {free} new"):
      check(params, free + 1)
  both = pelt.bank([short, long])
  check(both, 56, np.array([0, 0]))
  with pytest.raises(ValueError, match="a prefix takes 6"):
    check(both, 56, np.array([0, 1]))


@pytest.mark.parity
def test_all_learned_positions_serve():
  model, base = built("gpt2", "lm")
  prompt = tokens(1, 5)
  made = generate(model.apply, base, prompt, max_new_tokens=60).tokens
  ids = np.concatenate([prompt, made], axis=1)
  logits = model.apply({"params": base}, ids[:, :64])
  assert np.isfinite(np.asarray(logits)).all()
  np.testing.assert_array_equal(made[:, -1], jnp.argmax(logits[:, -1], axis=-1))


def test_ids_past_the_vocabulary_need_their_prompt():
  model, base = tiny.llama()
  apply, ids = pelt.bypass(model.apply), np.array([[259, 260, 5, 6]])
  sites = pelt.sites(model, ids)
  two = pelt.prompt_tuning(2).init(jax.random.key(0), base, sites)
  one = pelt.prompt_tuning(1).init(jax.random.key(0), base, sites)
  rows = training.encode(
    training.Examples("file", (training.Example(1, text="hello"),)),
    training.ByteTokenizer(),
    "lm",
    virtual=(259, 260),
  )
  runs = (
    lambda params: training.generate(apply, params, ids, max_new_tokens=2),
    lambda params: training.beam_search(apply, params, ids, max_new_tokens=2, beams=2),
    lambda params: training.evaluate(apply, params, rows, 1),
  )
  for run in runs:
    run(two)
    with pytest.raises(ValueError, match="hold 260, but the vocabulary ends at 258 .* no prompt"):
      run(base)
    with pytest.raises(ValueError, match="params hold a prompt of 1 virtual tokens"):
      run(one)
  bank = pelt.bank([two, two])
  training.generate(apply, bank, ids, max_new_tokens=2, rows=np.array([1]))
  masked = np.array([[999, 5, 6, 7]]), np.array([[0, 1, 1, 1]])
  training.generate(apply, base, *masked, max_new_tokens=2)


def test_rows_past_the_learned_positions_are_refused_before_they_are_nan():
  config = tiny.BERT | {"max_position_embeddings": 9}
  model = models.from_config(config, task="classification", num_labels=2)
  ids = np.array([[5, 6, 7, 8]])
  base = model.init(jax.random.key(0), ids)["params"]
  prefix = pelt.prefix_tuning(3, reparametrize=False).init(
    jax.random.key(1), base, pelt.sites(model, ids)
  )
  assert training.positions_taken(prefix) == 3 and training.positions_taken(base) == 0
  rows = lambda n: training.Encoded(
    "classification", ({"input_ids": np.full(n, 5), "labels": np.array(1)},), ("a", "b")
  )
  apply = pelt.bypass(model.apply)
  for params, most in ((base, 9), (prefix, 6)):
    run = lambda n, p=params: training.Evaluator(apply, rows(n), 1, (n,))(p)
    assert np.isfinite(run(most)["loss"])
    with pytest.raises(ValueError, match=f"learned 9 positions.* encode with length={most}"):
      run(most + 1)
  roberta = models.from_config(CONFIGS["roberta"], task="encoder")
  assert roberta.learned_positions == 64 - (PAD + 1)
