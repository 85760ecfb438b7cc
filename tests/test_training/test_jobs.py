"""Many adapters in one program: the numbers of separate runs, and nobody touches another's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax.nodes._bank import member_axes
from tests.test_training import tiny

RATES, CLIP, STEPS = (1e-2, 3e-3, 2e-2), 0.3, 3
HEAD = pelt.train("head")
LORAS = [pelt.chain(pelt.lora(r, a, targets="up"), HEAD) for r, a in ((2, 4), (3, 3), (1, 5))]
IN_BERT = {
  "lora": [pelt.chain(pelt.lora(r, a), HEAD) for r, a in ((2, 4), (3, 3), (1, 5))],
  "adapter": [pelt.chain(pelt.adapter("pfeiffer", bottleneck=m), HEAD) for m in (3, 2, 4)],
  "prefix": [pelt.chain(pelt.prefix_tuning(m, reparametrize=False), HEAD) for m in (2, 3, 1)],
  "prompt": [pelt.chain(pelt.prompt_tuning(m, init="normal"), HEAD) for m in (2, 3, 1)],
}


class Layer(nn.Module):
  """x + tanh(x up)."""

  @nn.compact
  def __call__(self, x, _=None):
    return x + jnp.tanh(nn.Dense(6, param_dtype=x.dtype, name="up")(x)), None


class Toy(nn.Module):
  """A mean of embeddings, two layers, a head."""

  scan: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids, attention_mask=None, deterministic=True):
    x = nn.Embed(30, 6, param_dtype=self.dtype)(input_ids).mean(1)
    if self.scan:
      split = {"params": True}
      layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs=split, length=2)
      x, _ = layers(name="layers")(x, None)
    else:
      for i in range(2):
        x, _ = Layer(name=f"layer_{i}")(x)
    return nn.Dense(3, param_dtype=self.dtype, name="head")(x)


def adamw(learning_rate):
  """Adam with weight decay under a schedule of the job's own."""
  return optax.adamw(optax.linear_schedule(learning_rate, 0.0, 7), weight_decay=0.1)


INJECTED = optax.inject_hyperparams(adamw)


def bert(scan=False, dtype=jnp.float32):
  config = tiny.BERT | {"initializer_range": 0.3, "num_hidden_layers": 2}
  return models.from_config(config, task="classification", num_labels=3, dtype=dtype, scan=scan)


def case(model, methods=LORAS):
  """One member per method, all of whose arrays are moved, and 8 rows of the jobs 0, 1, 0, ..."""
  ids = np.random.default_rng(5).integers(5, 24, (8, 6), np.int32)
  base = model.init(jax.random.key(0), ids)["params"]
  base = jax.tree.map(lambda x: x.astype(model.dtype), base)
  sites = pelt.sites(model, ids)
  members, rng = [], np.random.default_rng(0)
  noise = lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(x.dtype)
  rows = np.array([0, 1, 0, 2, 1, 1, 0, 2])
  for i, method in enumerate(methods):
    own, rest = pelt.partition(method.init(jax.random.key(i), base, sites))
    members.append(pelt.combine(jax.tree.map(noise, own), rest))
    virtual = pelt.virtual_tokens(members[-1])
    ids[rows == i, : len(virtual)] = virtual
  batch = {"input_ids": ids, "labels": np.array([0, 2, 1, 1, 0, 2, 2, 1]), "rows": rows}
  return pelt.bypass(model.apply), members, batch


def quiet(apply, params, batch, key):
  return training.cross_entropy(apply, params, batch)


def separate(apply, member, batch, job, rate, steps=STEPS):
  """What a run of the job's rows alone gives: losses, and the params of its last step."""
  mine = np.flatnonzero(np.asarray(batch["rows"]) == job)
  alone = {k: v[mine] for k, v in batch.items() if k != "rows"}
  train = training.train_step(apply, quiet, INJECTED(learning_rate=rate), clip=CLIP)
  trainable, frozen, state = train.init(member)
  step, losses, norms = jax.jit(train.step), [], []
  for i in range(steps):
    trainable, state, metrics = step(trainable, frozen, state, alone, jax.random.key(i))
    losses.append(float(metrics["loss"]))
    norms.append(float(metrics["grad_norm"]))
  return losses, norms, pelt.combine(trainable, frozen)


def together(jobs, members, batch, steps=STEPS, **options):
  trainable, frozen, state = jobs.init(members, **options)
  step, found = jax.jit(jobs.step), []
  for i in range(steps):
    trainable, state, metrics = step(trainable, frozen, state, batch, jax.random.key(i))
    found.append(metrics)
  assert step._cache_size() == 1
  return trainable, frozen, state, found


def compare(model, methods):
  apply, members, batch = case(model, methods)
  jobs = training.jobs_step(apply, quiet, INJECTED(learning_rate=1.0), clip=CLIP)
  trainable, frozen, state, found = together(jobs, members, batch, learning_rate=RATES)
  got = jobs.split(trainable, frozen, state)
  padded = pelt.unbank(pelt.combine(trainable, frozen))[1]
  for job, rate in enumerate(RATES):
    losses, norms, params = separate(apply, members[job], batch, job, rate)
    np.testing.assert_allclose([m["loss"][job] for m in found], losses, rtol=0, atol=1e-12)
    np.testing.assert_allclose([m["grad_norm"][job] for m in found], norms, rtol=1e-11)
    assert max(norms) > CLIP
    assert jax.tree.structure(got[job]) == jax.tree.structure(params)
    parts = (jax.tree.leaves(pelt.partition(p)[0]) for p in (got[job], params, padded[job]))
    for new, want, wide in zip(*parts, strict=True):
      np.testing.assert_allclose(new, want, rtol=0, atol=1e-12)
      padding = np.array(wide)
      padding[tuple(map(slice, want.shape))] = 0
      assert not np.nan_to_num(padding).any()  # prompts are padded with NaN


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.parity), True])
def test_jobs_train_as_separate_runs_do(scan):
  """Ranks, alphas, rates and schedules of their own; Adam, decay, clipping by each one's norm."""
  with jax.enable_x64(True):
    compare(Toy(scan, jnp.float64), LORAS)


@pytest.mark.parity
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", IN_BERT)
def test_jobs_of_every_kind_train_as_separate_runs_do(name, scan):
  with jax.enable_x64(True):
    compare(bert(scan, jnp.float64), IN_BERT[name])


def of_job(tree, number):
  """The arrays of one job."""
  pairs = zip(jax.tree.leaves(tree), member_axes(tree), strict=True)
  return [np.take(np.asarray(x), number, axis) for x, axis in pairs if axis is not None]


def states_of_job(state, number):
  return [np.asarray(x)[number] for x in jax.tree.leaves(state.optimizer)]


def same(a, b):
  return all(x.tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def toy():
  """Jobs over a scanned toy, their step compiled once for all tests."""
  apply, members, batch = case(Toy(scan=True))
  jobs = training.jobs_step(apply, quiet, INJECTED(learning_rate=1e-2), clip=CLIP)
  return jobs, jax.jit(jobs.step), members, batch


KEY = jax.random.key(0)


def test_nobody_touches_what_is_anothers(toy):
  """Without rows, or stopped: parameters and optimizer state stay to the bit, decay or not."""
  jobs, step, members, batch = toy
  trainable, frozen, state = jobs.init(members)
  trainable, state, metrics = step(trainable, frozen, state, batch, KEY)
  assert metrics["trained"].tolist() == [True] * 3
  only = dict(batch, rows=np.full(8, 1))
  stopped = state._replace(active=state.active.at[0].set(False))
  for before, given, movers in ((state, only, {1}), (stopped, batch, {1, 2})):
    new, after, metrics = step(trainable, frozen, before, given, KEY)
    for job in range(3):
      stays = same(of_job(trainable, job), of_job(new, job))
      assert stays == (job not in movers) == (not metrics["trained"][job])
      assert same(states_of_job(before, job), states_of_job(after, job)) == stays
  assert metrics["loss"][0] > 0  # of the stopped one it is known all the same
  assert step._cache_size() == 1


def test_a_slot_takes_another_job_without_compiling(toy):
  """A narrower one too; it starts afresh, and the others do not notice."""
  jobs, step, members, batch = toy
  trainable, frozen, state = jobs.init(members, learning_rate=RATES)
  trainable, state, _ = step(trainable, frozen, state, batch, KEY)
  compiled = step._cache_size()
  put = jax.jit(jobs.put)
  new, rest, fresh = put(trainable, frozen, state, 1, members[2], learning_rate=RATES[2])
  begun, others, first = jobs.init([members[0], members[2], members[1]], learning_rate=RATES[2])
  for tree, want in ((new, begun), (rest, others)):
    assert same(of_job(tree, 1), of_job(want, 1))
  assert same(states_of_job(fresh, 1), states_of_job(first, 1))
  assert [s[1].tolist() for s in fresh.sizes] == [s[1].tolist() for s in first.sizes]
  for job in (0, 2):
    assert same(of_job(trainable, job), of_job(new, job))
    assert same(states_of_job(state, job), states_of_job(fresh, job))
  after, _, _ = step(new, rest, fresh, batch, KEY)
  want, _, _ = step(begun, others, first, batch, KEY)
  assert same(of_job(after, 1), of_job(want, 1))
  assert not same(of_job(after, 1), of_job(new, 1))
  assert step._cache_size() == compiled == 1
  restarted = state._replace(active=jnp.zeros(3, bool))
  _, _, restarted = put(trainable, frozen, restarted, 2, members[2], learning_rate=RATES[2])
  assert restarted.active.tolist() == [False, False, True]
  assert put._cache_size() == 1
  with pytest.raises(ValueError, match=r"params need .* wider than a slot's"):
    jobs.put(*jobs.init(members[2:]), 0, members[0])
  with pytest.raises(ValueError, match="slot=3: expected the number of one of 3 jobs"):
    jobs.put(trainable, frozen, state, 3, members[0])


def test_optimizer_memory_grows_with_the_jobs(toy):
  jobs, _, members, _ = toy

  def size(n):
    state = jax.eval_shape(lambda: jobs.init(members[:1] * n)[2])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.optimizer))

  assert size(7) == 7 * size(1) > 0


def test_padding_never_moves(toy):
  """Whatever the optimizer does: this one moves what has no gradient."""
  _, _, members, batch = toy
  pushed = optax.stateless(lambda grads, params: jax.tree.map(lambda g: 1.0 - g, grads))
  jobs = training.jobs_step(pelt.bypass(Toy(scan=True).apply), quiet, pushed)
  begun = jobs.init(members)
  trainable, frozen, state = begun
  trainable, state, _ = jax.jit(jobs.step)(trainable, frozen, state, batch, KEY)
  rest = jax.tree.leaves(trainable)
  cut = [0, 0]
  for new, old, axis, size in zip(
    rest, jax.tree.leaves(begun[0]), member_axes(trainable), state.sizes, strict=True
  ):
    for job in range(3):
      one, before = (np.take(np.asarray(x), job, axis) for x in (new, old))
      inside = tuple(map(slice, np.asarray(size)[job]))
      assert (one[inside] != before[inside]).all()
      one = one.copy()
      one[inside] = 0
      assert not one.any()
      cut[one.size > one[inside].size] += 1
  assert min(cut) > 0


def test_parts_of_a_batch_add_up(toy):
  jobs, step, members, batch = toy
  tx = INJECTED(learning_rate=1e-2)
  apply = pelt.bypass(Toy(scan=True).apply)
  parts = training.jobs_step(apply, quiet, tx, clip=CLIP, accumulate=4)
  trainable, frozen, state = jobs.init(members)
  new, _, metrics = step(trainable, frozen, state, batch, KEY)
  got, _, told = jax.jit(parts.step)(trainable, frozen, state, batch, KEY)
  np.testing.assert_allclose(told["loss"], metrics["loss"], rtol=1e-6)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(new), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_wrong_jobs_are_named(toy):
  jobs, step, members, batch = toy
  started = jobs.init(members)
  for rows in (np.array([0, 1, 2, 3, 0, 0, 0, 0]), np.full(8, -1)):
    with pytest.raises(ValueError, match=r"rows name the jobs \[(3|-1)\], but there are 3"):
      jobs.step(*started, dict(batch, rows=rows), KEY)
    trainable, _, metrics = step(*started, dict(batch, rows=rows), KEY)
    assert np.isnan(metrics["loss"]).all()
    assert np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(trainable)])).all()
  with pytest.raises(ValueError, match='no "rows"'):
    jobs.step(*started, {k: v for k, v in batch.items() if k != "rows"}, KEY)
  with pytest.raises(ValueError, match=r"rate: tx injects \['learning_rate'\]"):
    jobs.init(members, rate=1.0)
  with pytest.raises(ValueError, match=r"learning_rate has shape \(2,\)"):
    jobs.init(members, learning_rate=[1.0, 2.0])
  with pytest.raises(ValueError, match=r"active has shape \(2,\)"):
    jobs.init(members, active=[True, False])
  with pytest.raises(ValueError, match="give jobs the members"):
    jobs.init([pelt.bank(members)])
  scheduled = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1))
  with pytest.raises(ValueError, match="learning_rate is a schedule in tx"):
    training.jobs_step(print, quiet, scheduled).init(members, learning_rate=0.1)
  scalar = lambda apply, params, batch, key: quiet(apply, params, batch, key)[0]
  told = training.jobs_step(pelt.bypass(Toy(scan=True).apply), scalar, optax.sgd(1.0))
  with pytest.raises(ValueError, match='the loss tells no aux\\["by_row"\\]'):
    told.step(*told.init(members), batch, KEY)
  both = pelt.partition(pelt.combine(*started[:2]) | {"more": pelt.nodes.Tuned(jnp.ones(2))})
  with pytest.raises(ValueError, match=r"\['more'\].* train outside the bank"):
    jobs.step(*both, started[2], batch, KEY)
  generated = members[0] | {"generators": {"0": members[0]["head"]["kernel"]}}
  with pytest.raises(ValueError, match=r"generators \['0'\]"):
    jobs.init([generated])
  acting = pelt.Transform(lambda *a: {}, pelt.PostStep(lambda p: 0, lambda *a: a))
  with pytest.raises(ValueError, match="post-step"):
    training.jobs_step(print, quiet, optax.sgd(1.0), acting)


def test_a_mixed_batch_of_eight_equals_each_adapter_alone():
  """One executable for any rows; 64 members cost what 8 do."""
  with jax.enable_x64(True):
    methods = [pelt.chain(pelt.lora(1 + i % 3, 2 + i, targets="up"), HEAD) for i in range(8)]
    apply, members, batch = case(Toy(scan=True, dtype=jnp.float64), methods)
    ids, run = batch["input_ids"], jax.jit(lambda params, ids: apply(params, ids))
    own = np.stack([run({"params": m}, ids) for m in pelt.unbank(pelt.bank(members))[1]])
    banked = {"params": pelt.bank(members)}
    mixed = jax.jit(lambda params, ids, rows: apply(params, ids, rows=rows))
    for rows in (np.arange(8), np.array([3, 3, 0, 7, 6, 1, 3, 2])):
      got = mixed(banked, ids, rows)
      np.testing.assert_allclose(got, own[rows, np.arange(8)], rtol=0, atol=1e-12)
    assert mixed._cache_size() == 1
    flops = lambda bank: mixed.lower(bank, ids, np.arange(8)).compile().cost_analysis()["flops"]
    many = flops({"params": pelt.bank(members * 8)})
    assert many == pytest.approx(flops(banked), rel=0.02)
