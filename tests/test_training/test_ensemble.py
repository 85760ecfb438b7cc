"""Prompt ensembling: training together equals training apart, and so does asking."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from tests.test_training import tiny

N, V = 3, tiny.BERT["vocab_size"]


def runs(method, dtype=jnp.float32):
  """A model, N members of other seeds, a batch whose rows have their virtual tokens in front."""
  config = tiny.BERT | {"initializer_range": 0.3}
  model = models.from_config(config, task="classification", num_labels=3, dtype=dtype)
  ids = jax.random.randint(jax.random.key(5), (4, 6), 5, 24, jnp.int32)
  base = model.init(jax.random.key(0), ids)["params"]
  sites = pelt.sites(model, ids)
  members = [method.init(jax.random.key(7 + i), base, sites) for i in range(N)]
  virtual = pelt.virtual_tokens(members[0])
  front = jnp.tile(jnp.array([*virtual], jnp.int32)[None], (4, 1))
  batch = {"input_ids": jnp.concatenate([front, ids], 1), "labels": jnp.array([0, 2, 1, 1])}
  mask = jnp.ones_like(batch["input_ids"]).at[0, -2:].set(0)
  return pelt.bypass(model.apply), members, batch | {"attention_mask": mask}


PROMPT = pelt.chain(pelt.prompt_tuning(2, init="normal"), pelt.train("head"))
PREFIX = pelt.chain(pelt.prefix_tuning(2, hidden=4), pelt.train("head"))


def test_votes():
  scores = np.random.default_rng(0).normal(size=(5, 7, 4)).astype(np.float32)
  counts = np.stack([(scores.argmax(-1) == c).sum(0) for c in range(4)], -1)
  np.testing.assert_array_equal(training.vote(scores), counts)
  np.testing.assert_allclose(training.vote(scores, "mean_logit"), scores.mean(0), atol=1e-6)
  # Two against two, one for a third: the lower of the two.
  ballots = jax.nn.one_hot(jnp.array([3, 1, 0, 1, 3]), 4)[:, None]
  assert training.vote(ballots).argmax(-1).tolist() == [1]
  with pytest.raises(ValueError, match="'majority' or 'mean_logit', got 'plurality'"):
    training.vote(scores, "plurality")
  with pytest.raises(ValueError, match=r"\(4,\), expected \(N, ..., C\)"):
    training.vote(scores[0, 0])


@pytest.mark.parametrize("method", [PROMPT, pytest.param(PREFIX, marks=pytest.mark.parity)])
def test_one_forward_pass_asks_what_a_loop_asks(method):
  apply, members, batch = runs(method)
  inputs = batch["input_ids"], batch["attention_mask"]
  each = jnp.stack([apply({"params": m}, *inputs) for m in members])
  bank = {"params": pelt.bank(members)}
  for by in ("majority", "mean_logit"):
    ask = jax.jit(training.ensemble(apply, N, by))
    np.testing.assert_allclose(ask(bank, *inputs), training.vote(each, by), atol=2e-6)
  assert len({tuple(row) for row in np.round(each[:, 1], 4).tolist()}) == N  # they differ
  with pytest.raises(ValueError, match=r"holds 0\.\.3, but the bank at .* has 3 members"):
    training.ensemble(apply, N + 1)(bank, *inputs)
  with pytest.raises(ValueError, match="members=0"):
    training.ensemble(apply, 0)


STEPS, CLIP = 3, 0.5


def apart(apply, members, batch, tx, clip):
  train = training.train_step(apply, training.cross_entropy, tx, clip=clip)
  step, done = jax.jit(train.step), []
  for n, member in enumerate(members):
    trainable, frozen, state = train.init(member)
    for i in range(STEPS):
      trainable, state, _ = step(trainable, frozen, state, batch, key_of(n, i))
    done.append(trainable)
  return done


def key_of(member, step):
  return jax.random.fold_in(jax.random.key(member), step)


def close(got, want, tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, want)


@pytest.mark.parametrize("method", [PROMPT, pytest.param(PREFIX, marks=pytest.mark.parity)])
def test_one_vmapped_program_trains_as_separate_runs_do(method):
  """Dropout, clipping by each member's own norm, Adam: the same numbers."""
  with jax.enable_x64(True):
    apply, members, batch = runs(method, jnp.float64)
    tx = optax.adamw(1e-2)
    want = apart(apply, members, batch, tx, CLIP)
    train = training.jointly(training.train_step(apply, training.cross_entropy, tx, clip=CLIP))
    trainable, frozen, state = train.init(members)
    step = jax.jit(train.step)
    for i in range(STEPS):
      keys = jnp.stack([key_of(n, i) for n in range(N)])
      trainable, state, metrics = step(trainable, frozen, state, batch, keys)
    assert metrics["loss"].shape == (N,) and (metrics["grad_norm"] > CLIP).any()
    for got, before, one in zip(train.split(trainable, frozen), members, want, strict=True):
      close(pelt.partition(got)[0], one, 1e-11)
      moved = jax.tree.map(lambda a, b: abs(a - b).max(), one, pelt.partition(before)[0])
      assert min(jax.tree.leaves(moved)) > 1e-3


def test_one_batch_of_all_members_trains_as_separate_runs_do():
  """The sum of N losses through a bank, with an optimizer that works leaf by leaf."""
  with jax.enable_x64(True):
    apply, members, batch = runs(PROMPT, jnp.float64)
    tx = optax.adam(1e-2)
    evaluated = lambda apply, params, batch, key: training.cross_entropy(apply, params, batch)
    train = training.train_step(apply, evaluated, tx)
    separate = []
    for member in members:
      trainable, frozen, state = train.init(member)
      for i in range(STEPS):
        trainable, state, _ = jax.jit(train.step)(trainable, frozen, state, batch, key_of(0, i))
      separate.append(pelt.combine(trainable, frozen))
    rows = jnp.repeat(jnp.arange(N), 4)
    everyone = {k: jnp.concatenate([v] * N) for k, v in batch.items()}

    def total(apply, params, batch, key):
      loss, _ = training.cross_entropy(lambda *a, **k: apply(*a, rows=rows, **k), params, batch)
      return N * loss  # the sum of the members' means

    train = training.train_step(apply, total, tx)
    trainable, frozen, state = train.init(pelt.bank(members))
    step = jax.jit(train.step)
    for i in range(STEPS):
      trainable, state, _ = step(trainable, frozen, state, everyone, key_of(0, i))
    close(trainable, pelt.partition(pelt.bank(separate))[0], 1e-11)


def test_members_of_other_methods_do_not_train_together():
  _, members, _ = runs(PROMPT)
  other = runs(pelt.lora(1, targets="query"))[1][0]
  train = training.jointly(training.train_step(print, print, optax.sgd(1.0)))
  with pytest.raises(ValueError, match="members 0 and 1 have different nodes"):
    train.init([members[0], other])
  with pytest.raises(ValueError, match="members is empty"):
    train.init([])
