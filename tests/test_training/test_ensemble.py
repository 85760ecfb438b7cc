"""Prompt ensembling: training together equals training apart, and so does asking."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pelt_jax as pelt
from pelt_jax import models, nodes, training
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
ENCODED = pelt.chain(pelt.p_tuning(2, hidden=4), pelt.train("head"))
METHODS = [PROMPT, *(pytest.param(m, marks=pytest.mark.parity) for m in (PREFIX, ENCODED))]


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


@pytest.mark.parity
@pytest.mark.parametrize("method", METHODS)
def test_one_forward_pass_asks_what_a_loop_asks(method):
  apply, members, batch = runs(method)
  inputs = batch["input_ids"], batch["attention_mask"]
  each = jnp.stack([apply({"params": m}, *inputs) for m in members])
  bank = {"params": pelt.bank(members)}
  for by in ("majority", "mean_logit"):
    ask = jax.jit(training.ensemble(apply, N, by))
    np.testing.assert_allclose(ask(bank, *inputs), training.vote(each, by), atol=2e-6)
  assert len({tuple(row) for row in np.round(each[:, 1], 4).tolist()}) == N  # they differ
  with pytest.raises(ValueError, match="members=4, but params hold a bank of 3"):
    training.ensemble(apply, N + 1)(bank, *inputs)
  with pytest.raises(ValueError, match="members=0"):
    training.ensemble(apply, 0)


class Ballots(nn.Module):
  """A row's first token is what a member votes about."""

  @nn.compact
  def __call__(self, ids, attention_mask=None, deterministic=True):
    return nn.Embed(5, 3, name="table")(ids)[:, 0]


@pytest.mark.parity
def test_scores_by_hand():
  best, loud = jnp.eye(3), 9 * jnp.eye(3)  # the loud decide the mean
  ballots = [
    (best[0], best[2], best[0], loud[1]),
    (best[0], best[1], best[1], best[2]),
    (loud[1], best[1], loud[2], best[0]),  # of the third and fourth all say something else
  ]
  tables = [jnp.stack([jnp.zeros(3), *rows]) for rows in ballots]
  members = [{"table": {"embedding": nodes.Tuned(t)}} for t in tables]
  asked = [(1, 0, 5), (2, 1, 4), (3, 0, 3), (4, 1, 2), (2, 1, 1)]  # token, truth, length
  rows = [
    {"input_ids": np.full(length, token, np.int32), "labels": np.array(truth, np.int32)}
    for token, truth, length in asked
  ]
  data = training.Encoded("classification", tuple(rows), ("a", "b", "c"))
  apply = pelt.bypass(Ballots().apply)
  got = training.ensemble_scores(apply, members, data, size=3)
  assert got.metric == "accuracy"
  np.testing.assert_allclose(got.members, (0.6, 0.6, 0.4), atol=1e-12)
  scores = got.average, got.best, got.majority, got.mean_logit
  np.testing.assert_allclose(scores, (1.6 / 3, 0.6, 0.8, 0.6), atol=1e-12)
  with pytest.raises(ValueError, match="'lm': only classes can be voted for"):
    training.ensemble_scores(apply, members, tiny.text_rows())
  with pytest.raises(ValueError, match="at least one member"):
    training.ensemble_scores(apply, [], data)


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


@pytest.mark.parity
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parity
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
  train = training.jointly(training.train_step(print, print, optax.sgd(1.0)))
  member, longer = ({"w": nodes.Tuned(jnp.ones(n))} for n in (2, 3))
  other = {"w": nodes.LoraWeight(*jnp.ones((3, 2, 2)), jnp.ones(()))}
  with pytest.raises(ValueError, match="members 0 and 1 have different nodes"):
    train.init([member, other])
  with pytest.raises(ValueError, match=r"members 0 and 2 have arrays of shapes \(2,\) and \(3,\)"):
    train.init([member, member, longer])
  started = train.init([member, member])
  for keys in (jax.random.key(0), jax.random.split(jax.random.key(0), 3)):
    with pytest.raises(ValueError, match="one key for each of 2 members"):
      train.step(*started, {}, keys)
  with pytest.raises(ValueError, match="members is empty"):
    train.init([])
