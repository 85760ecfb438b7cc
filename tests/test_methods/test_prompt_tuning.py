"""Prompt tuning: identities on real architectures, initialisation, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax._walk import get_at
from tests.test_models.helpers import CONFIGS, VOCAB, built, close, tokens

LONG = pytest.mark.parity
TABLES = {
  "llama": "model/embed_tokens/embedding",
  "qwen2": "model/embed_tokens/embedding",  # tied to the head
  "bert": "bert/embeddings/word_embeddings/embedding",
}


def prompted(name, length=4, task="lm", **options):
  model, base = built(name, task)
  sites = pelt.sites(model, tokens(2, 6))
  params = pelt.prompt_tuning(length, **options).init(jax.random.key(1), base, sites)
  return model, base, params


def in_front(ids, length=4):
  virtual = np.broadcast_to(np.arange(VOCAB, VOCAB + length, dtype=np.int32), (len(ids), length))
  return np.concatenate([virtual, ids], axis=1)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=LONG), "qwen2"])
def test_a_prompt_of_token_rows_is_the_hard_prompt_bit_for_bit(name):
  words = [5, 9, 2, 5]
  model, base, params = prompted(name, init="text", tokens=words)
  ids = tokens(2, 6)
  hard = np.concatenate([np.tile(np.array(words, np.int32), (2, 1)), ids], axis=1)
  got = pelt.bypass(model.apply)({"params": params}, in_front(ids))
  np.testing.assert_array_equal(got, model.apply({"params": base}, hard))
  assert got.shape[-1] == VOCAB  # a tied head scores real tokens only


@LONG
def test_encoders_too():
  words = [5, 9, 2, 5]
  model, base, params = prompted("bert", task="classification", init="text", tokens=words)
  ids = tokens(2, 6)
  hard = np.concatenate([np.tile(np.array(words, np.int32), (2, 1)), ids], axis=1)
  got = pelt.bypass(model.apply)({"params": params}, in_front(ids))
  np.testing.assert_array_equal(got, model.apply({"params": base}, hard))


def test_without_virtual_ids_it_is_the_base_bit_for_bit():
  model, base, params = prompted("llama")
  ids = tokens(2, 6)
  np.testing.assert_array_equal(
    pelt.bypass(model.apply)({"params": params}, ids), model.apply({"params": base}, ids)
  )


@LONG
def test_cached_generation_is_the_hard_prompts():
  words = [5, 9, 2, 5]
  model, base, params = prompted("llama", init="text", tokens=words)
  ids = tokens(2, 6)
  hard = np.concatenate([np.tile(np.array(words, np.int32), (2, 1)), ids], axis=1)

  def run(apply, params, ids):
    ids = jnp.asarray(ids)
    return training.generate(apply, params, ids, jnp.ones_like(ids), max_new_tokens=5).tokens

  got = run(pelt.bypass(model.apply), params, in_front(ids))
  np.testing.assert_array_equal(got, run(model.apply, base, hard))


@LONG
def test_looped_layers():
  model, base = built("llama", "lm", scan=False)
  sites = pelt.sites(model, tokens(2, 6))
  method = pelt.prompt_tuning(4, init="text", tokens=[5, 9, 2, 5])
  params = method.init(jax.random.key(1), base, sites)
  ids = tokens(2, 6)
  hard = np.concatenate([np.tile(np.array([5, 9, 2, 5], np.int32), (2, 1)), ids], axis=1)
  got = pelt.bypass(model.apply)({"params": params}, in_front(ids))
  np.testing.assert_array_equal(got, model.apply({"params": base}, hard))


def test_ids_without_a_prompt_or_past_it_are_loud():
  model, base, params = prompted("llama")
  ids = in_front(tokens(2, 6))
  assert jnp.isnan(model.apply({"params": base}, ids)).any(axis=-1).all(axis=0)[0]
  ids[0, 0] = VOCAB + 4  # past the prompt
  out = pelt.bypass(model.apply)({"params": params}, ids)
  assert jnp.isnan(out[0]).all() and not jnp.isnan(out[1]).any()


def test_only_the_prompt_trains_and_counts():
  model, _, params = prompted("llama")
  width = model.config.hidden_size
  counted = pelt.count(params)
  assert (counted.trainable, counted.stored, counted.changed) == (4 * width, 4 * width, 0)
  trainable, frozen = pelt.partition(params)
  ids = in_front(tokens(2, 6))
  loss = lambda p: (pelt.bypass(model.apply)({"params": p}, ids) ** 2).mean()
  _, grads = pelt.value_and_grad(loss)(trainable, frozen)
  (gradient,) = jax.tree.leaves(grads)
  assert gradient.shape == (4, width) and (jnp.abs(gradient).sum(axis=1) > 0).all()


@LONG
def test_the_gradient_of_a_row_is_the_sum_over_its_uses():
  """That of rows behind the table in a model with a longer one, its head as it was."""
  model, base, params = prompted("llama", length=2)
  ids = np.array([[VOCAB, 3, VOCAB + 1], [VOCAB, VOCAB, 4]], np.int32)
  trainable, frozen = pelt.partition(params)
  apply = pelt.bypass(model.apply)
  run = jax.jit(pelt.value_and_grad(lambda p: apply({"params": p}, ids).sum()))
  (got,) = jax.tree.leaves(run(trainable, frozen)[1])
  raw = CONFIGS["llama"] | {"vocab_size": VOCAB + 2}
  trunk = models.from_config(raw, task="encoder", scan=True)

  def loss(table):
    tree = {**base["model"], "embed_tokens": {"embedding": table}}
    return (trunk.apply({"params": tree}, ids) @ base["lm_head"]["kernel"]).sum()

  prompt = get_at(params, TABLES["llama"]).prompt
  table = jnp.concatenate([get_at(base, TABLES["llama"]), prompt])
  close(got, jax.jit(jax.grad(loss))(table)[VOCAB:], 1e-5)


@pytest.mark.parametrize(
  ("init", "low", "high"), [("uniform", -0.5, 0.5), ("uniform_positive", 0.0, 0.5)]
)
def test_uniform_bounds(init, low, high):
  _, _, params = prompted("llama", 50, init=init)
  prompt = get_at(params, TABLES["llama"]).prompt
  assert low <= prompt.min() < low + 0.01 and high - 0.01 < prompt.max() <= high


def test_normal_is_of_unit_variance():
  _, _, params = prompted("llama", 200, init="normal")
  prompt = get_at(params, TABLES["llama"]).prompt
  assert abs(float(prompt.std()) - 1) < 0.05 and abs(float(prompt.mean())) < 0.05


def test_vocabulary_rows_are_distinct_and_from_the_pool():
  _, base, params = prompted("llama", 10, vocabulary=12)
  table, prompt = np.asarray(get_at(base, TABLES["llama"])), get_at(params, TABLES["llama"]).prompt
  found = [int(np.flatnonzero((table == row).all(axis=1))[0]) for row in np.asarray(prompt)]
  assert len(set(found)) == 10 and max(found) < 12


def test_label_rows_are_means_and_the_rest_is_sampled():
  _, base, params = prompted("llama", 4, init="labels", tokens=[[3, 5], [7]])
  table, prompt = get_at(base, TABLES["llama"]), get_at(params, TABLES["llama"]).prompt
  close(prompt[0], (table[3] + table[5]) / 2, 1e-6)
  np.testing.assert_array_equal(prompt[1], table[7])
  assert (np.asarray(table)[:, None] == np.asarray(prompt)[None, 2:]).all(-1).any(0).all()


@LONG
def test_mixed_batch_equals_single_runs():
  model, base, first = prompted("llama")
  method = pelt.prompt_tuning(4)
  second = method.init(jax.random.key(7), base, pelt.sites(model, tokens(2, 6)))
  ids, apply = in_front(tokens(2, 6)), pelt.bypass(model.apply)
  both = apply({"params": pelt.bank([first, second])}, ids, rows=jnp.array([1, 0]))
  close(both[0], apply({"params": second}, ids)[0], 1e-6)
  close(both[1], apply({"params": first}, ids)[1], 1e-6)


def test_saved_loaded_and_trained_further(tmp_path):
  _, base, params = prompted("llama")
  pelt.save(tmp_path / "adapter", params)
  again = pelt.load(tmp_path / "adapter", base)
  assert pelt.virtual_tokens(again) == range(VOCAB, VOCAB + 4)
  np.testing.assert_array_equal(*(get_at(p, TABLES["llama"]).prompt for p in (params, again)))
  assert len(jax.tree.leaves(pelt.partition(again)[0])) == 1


@pytest.mark.parametrize("first", ["prompt", "train"])
def test_the_table_may_train_beside_the_prompt_in_either_order(first):
  model, base = built("llama", "lm")
  methods = [pelt.prompt_tuning(4), pelt.train("embed_tokens")]
  method = pelt.chain(*methods if first == "prompt" else methods[::-1])
  params = method.init(jax.random.key(0), base, pelt.sites(model, tokens(2, 6)))
  table = get_at(base, TABLES["llama"])
  assert pelt.count(params).trainable == (4 + VOCAB) * table.shape[1]
  assert pelt.virtual_tokens(params) == range(VOCAB, VOCAB + 4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"length": 0}, "length must be a whole number of at least 1, got 0"),
    ({"init": "xavier"}, "init must be one of"),
    ({"init": "text"}, "tokens go with init='text'"),
    ({"tokens": [1]}, "tokens go with init='text'"),
    (
      {"length": 2, "init": "text", "tokens": [1, 2, 3]},
      "3 tokens do not fit a prompt of length=2",
    ),
    ({"length": 1, "init": "labels", "tokens": [[1], [2]]}, "2 classes do not fit"),
    ({"init": "text", "tokens": [[1]]}, "must be a list of ids for init='text'"),
    ({"init": "labels", "tokens": [1, 2]}, "must be a list of ids per class"),
    ({"vocabulary": 0}, "vocabulary must be at least 1"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    pelt.prompt_tuning(**options)


def test_bad_targets():
  model, base = built("llama", "lm")
  sites = pelt.sites(model, tokens(2, 6))
  with pytest.raises(ValueError, match=r"\[97\] are no ids of a table with 97 rows"):
    pelt.prompt_tuning(4, init="text", tokens=[97]).init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="needs the one table that looks up tokens"):
    pelt.prompt_tuning(4, targets="query").init(jax.random.key(0), base, sites)
  params = pelt.prompt_tuning(4).init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="holds a prompt already"):
    pelt.prompt_tuning(4).init(jax.random.key(0), params, sites)
  with pytest.raises(ValueError, match="virtual tokens are no rows"):
    pelt.merge(params)


def test_a_bank_has_one_base_and_short_prompts_end_in_nan():
  model, base, first = prompted("llama", 2)
  sites, ids = pelt.sites(model, tokens(2, 6)), in_front(tokens(2, 6))
  second = pelt.prompt_tuning(4).init(jax.random.key(7), base, sites)
  bank = pelt.bank([first, second])
  assert pelt.virtual_tokens(bank) == range(VOCAB, VOCAB + 4)
  out = pelt.bypass(model.apply)({"params": bank}, ids, rows=np.array([0, 1]))
  assert jnp.isnan(out[0]).all() and not jnp.isnan(out[1]).any()
  other = jax.tree.map(lambda x: x + 1, base)
  with pytest.raises(ValueError, match="members 0 and 1 of the bank have other values at "):
    pelt.bank([second, pelt.prompt_tuning(4).init(jax.random.key(7), other, sites)])
