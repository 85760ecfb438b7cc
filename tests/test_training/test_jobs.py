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
  ids = jax.random.randint(jax.random.key(5), (8, 6), 5, 24, jnp.int32)
  base = model.init(jax.random.key(0), ids)["params"]
  base = jax.tree.map(lambda x: x.astype(model.dtype), base)
  sites = pelt.sites(model, ids)
  members, rng = [], np.random.default_rng(0)
  noise = lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype)
  for i, method in enumerate(methods):
    own, rest = pelt.partition(method.init(jax.random.key(i), base, sites))
    members.append(pelt.combine(jax.tree.map(noise, own), rest))
  batch = {"input_ids": ids, "labels": jnp.array([0, 2, 1, 1, 0, 2, 2, 1])}
  return pelt.bypass(model.apply), members, batch | {"rows": jnp.array([0, 1, 0, 2, 1, 1, 0, 2])}


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
  started = jobs.init(members, **options)
  trainable, frozen, state = started
  step, found = jax.jit(jobs.step), []
  for i in range(steps):
    trainable, state, metrics = step(trainable, frozen, state, batch, jax.random.key(i))
    found.append(metrics)
  assert step._cache_size() == 1
  return trainable, frozen, state, found


def member_of(tree, number):
  return [
    np.take(x, number, axis)
    for x, axis in zip(jax.tree.leaves(tree), member_axes(tree), strict=True)
  ]


def compare(model, methods):
  apply, members, batch = case(model, methods)
  jobs = training.jobs_step(apply, quiet, INJECTED(learning_rate=1.0), clip=CLIP)
  trainable, frozen, _, found = together(jobs, members, batch, learning_rate=RATES)
  got = pelt.unbank(pelt.combine(trainable, frozen))[1]
  for job, rate in enumerate(RATES):
    losses, norms, params = separate(apply, members[job], batch, job, rate)
    np.testing.assert_allclose([m["loss"][job] for m in found], losses, rtol=0, atol=1e-12)
    np.testing.assert_allclose([m["grad_norm"][job] for m in found], norms, rtol=1e-11)
    assert max(norms) > CLIP
    after = (jax.tree.leaves(pelt.partition(p)[0]) for p in (got[job], params))
    for new, want in zip(*after, strict=True):
      inside = tuple(slice(0, n) for n in want.shape)
      np.testing.assert_allclose(new[inside], want, rtol=0, atol=1e-12)
      padding = np.array(new)
      padding[inside] = 0
      assert not padding.any()


@pytest.mark.parametrize("scan", [False, True])
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
