"""The loop: history, the best params, and going on after a stop."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import training
from tests.test_training import tiny


def setup(rate=1e-2, method=None, dropout=0.0, seed=0):
  model, params = tiny.llama()
  sites = pelt.sites(model, jnp.zeros((1, 4), jnp.int32))
  method = method or pelt.lora(rank=2, targets="query", dropout=dropout)
  params = method.init(jax.random.key(1), params, sites)
  apply = pelt.bypass(model.apply)
  train = training.train_step(apply, training.next_token, optax.adam(rate), method, clip=1.0)
  data = tiny.text_rows()
  return {
    "train": train,
    "params": params,
    "loader": training.Loader(data, 8, seed),
    "key": jax.random.key(2),
    "progress": False,
    "evaluate": training.Evaluator(apply, data, 8),
  }


def test_it_learns_and_leaves_the_callers_params_alone():
  run = setup()
  before = tiny.leaves(run["params"])
  done = training.fit(**run, steps=20, every=10)
  assert tiny.equal(before, run["params"])
  assert [step for step, _ in done.history.loss] == list(range(1, 21))
  assert [step for step, _ in done.history.evaluations] == [10, 20]
  first, last = (scores["loss"] for _, scores in done.history.evaluations)
  assert last < first < run["evaluate"](run["params"])["loss"]
  assert done.cost["flops"] > 0 and done.compile_s > 0
  assert tiny.equal(pelt.partition(run["params"])[1], pelt.partition(done.params)[1])


class Stop(Exception):
  pass


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
  """Stopped after a checkpoint, and after steps beyond it that are lost."""
  options = {"metric": "loss", "higher_is_better": False, "steps": 11, "every": 4}
  whole = training.fit(**setup(dropout=0.3), **options)
  stopped = setup(dropout=0.3)
  evaluate, calls = stopped["evaluate"], []

  def interrupted(params):
    calls.append(1)
    if len(calls) == 3:
      raise Stop
    return evaluate(params)

  stopped["evaluate"] = interrupted
  with pytest.raises(Stop):
    training.fit(**stopped, **options, checkpoints=training.Checkpoints(tmp_path), save_every=3)
  checkpoints = training.Checkpoints(tmp_path)
  assert checkpoints.latest() == 9
  resumed = training.fit(
    **setup(dropout=0.3), **options, checkpoints=checkpoints, save_every=3, resume=True
  )
  assert resumed.history == whole.history
  assert tiny.equal(resumed.trainable, whole.trainable)
  assert tiny.equal(resumed.state, whole.state)


def test_the_best_params_are_returned():
  run = setup()
  scores = iter([0.1, 0.5, 0.3, 0.2])
  seen = []

  def evaluate(params):
    seen.append(tiny.leaves(params))
    return {"score": next(scores)}

  run["evaluate"] = evaluate
  done = training.fit(**run, steps=8, every=2, metric="score")
  assert done.history.best == [4, 0.5]
  assert tiny.equal(done.params, seen[1]) and not tiny.equal(done.params, seen[3])


def test_sigterm_saves_and_stops_and_the_rest_has_the_same_bits(tmp_path):
  options = {"steps": 7, "every": 4}
  whole = training.fit(**setup(dropout=0.3), **options)
  run, before = setup(dropout=0.3), signal.getsignal(signal.SIGTERM)
  evaluate = run["evaluate"]

  def evaluate_and_signal(params):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(params)

  run["evaluate"] = evaluate_and_signal
  kept = {"checkpoints": training.Checkpoints(tmp_path), "save_every": 100}
  with pytest.raises(training.Interrupted, match="after step 4, which is saved") as stop:
    training.fit(**run, **options, **kept)
  assert stop.value.step == 4
  assert signal.getsignal(signal.SIGTERM) is before
  again = training.Checkpoints(tmp_path)
  assert again.latest() == 4
  done = training.fit(**setup(dropout=0.3), **options, checkpoints=again, resume=True)
  assert tiny.equal(whole.params, done.params) and whole.history == done.history


def test_patience():
  run = setup()
  scores = iter([3.0, 2.0, 2.0, 2.5, 1.0])
  run["evaluate"] = lambda params: {"loss": next(scores)}
  done = training.fit(**run, steps=10, every=1, metric="loss", higher_is_better=False, patience=2)
  assert done.steps == 4 and done.history.best == [2, 2.0]


def test_the_best_and_patience_are_carried_over_a_stop(tmp_path):
  """The best came before the stop, and so did the first evaluation without improvement."""
  scores, seen = iter([0.1, 0.5, 0.3, 0.2, 0.4, 0.9]), []

  def evaluate(params):
    seen.append(tiny.leaves(params))
    return {"score": next(scores)}

  def run(steps, **more):
    kept = {"checkpoints": training.Checkpoints(tmp_path), "save_every": 3}
    options = {"steps": steps, "every": 1, "metric": "score", "patience": 3}
    return training.fit(**setup() | {"evaluate": evaluate}, **options, **kept, **more)

  run(3)
  done = run(9, resume=True)
  assert done.steps == 5 and done.history.best == [2, 0.5]
  assert tiny.equal(done.params, seen[1]) and not tiny.equal(done.params, seen[2])


def test_divergence_is_named():
  with pytest.raises(
    training.Diverged, match="loss of step [0-9]+ is nan: lower the learning rate"
  ):
    training.fit(**setup(rate=jnp.inf), steps=5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"steps": 0}, "steps=0"),
    ({"steps": 1, "metric": "loss", "evaluate": None}, "metric='loss' needs evaluate"),
    ({"steps": 1, "patience": 1}, "patience=1 needs metric"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    training.fit(**(setup() | options))


def test_tagging_scores_count_words_that_have_no_piece():
  """Two sentences; the second entity's word was cut off, so it counts as missed."""
  labels = ("B-x", "O")
  rows = tuple(
    {"input_ids": np.array([5, 6], np.int32), "labels": np.array([0, 1], np.int32)}
    for _ in range(2)
  )
  tags = (
    (("B-x", "O"), np.array([0, 1])),
    (("B-x", "O", "B-x"), np.array([0, 1, -1])),
  )
  data = training.Encoded("tagging", rows, labels, tags=tags)

  def apply(variables, ids, attention_mask, deterministic):
    return jax.nn.one_hot(ids - 5, 2)  # the right answer everywhere

  scores = training.evaluate(apply, {}, data, 4)
  assert (scores["precision"], scores["recall"], scores["entity_f1"]) == (1.0, 2 / 3, 0.8)


def test_classification_scores_follow_the_rows_not_the_batches():
  lengths = [3, 1, 2, 5, 4]
  rows = tuple(
    {"input_ids": np.full(n, 1, np.int32), "labels": np.array(n % 2, np.int32)} for n in lengths
  )
  data = training.Encoded("classification", rows, ("even", "odd"))

  def apply(variables, ids, attention_mask, deterministic):
    n = attention_mask.sum(axis=1)
    guess = jnp.where(n == 5, 0, n % 2)  # wrong on the longest
    return jax.nn.one_hot(guess, 2)

  scores = training.evaluate(apply, {}, data, 2)
  assert scores["accuracy"] == 0.8
