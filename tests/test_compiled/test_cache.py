"""One program per shape: new values, other adapters and other scalings never compile again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, training

SIZES = dict(
  model_type="llama",
  vocab_size=31,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=2,
)


@pytest.fixture(autouse=True)
def promotion():
  """Adam of optax raises a Python float to an integer array, which the strict setting refuses."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(params=[False, True], ids=["looped", "scanned"])
def setup(request):
  model = models.from_config(SIZES, scan=request.param)
  ids = jax.random.randint(jax.random.key(0), (4, 6), 0, 31)
  return model, model.init(jax.random.key(1), ids)["params"], ids


def loss(apply, params, batch, key):
  logits = apply({"params": params}, batch["ids"])
  return models.token_losses(logits, batch["ids"]).mean()


def batch_of(number):
  return {"ids": jax.random.randint(jax.random.key(number), (4, 6), 0, 31)}


def test_a_second_step_runs_the_first_ones_program(setup):
  model, base, ids = setup
  params = pelt.lora(rank=2).init(jax.random.key(2), base, pelt.sites(model, ids))
  init, step = training.train_step(pelt.bypass(model.apply), loss, optax.adamw(1e-2))
  trainable, frozen, state = init(params)
  step = jax.jit(step, donate_argnums=(0, 2))
  losses = []
  for number in range(4):
    trainable, state, metrics = step(
      trainable, frozen, state, batch_of(number % 2), jax.random.key(number)
    )
    losses.append(float(metrics["loss"]))
  assert step._cache_size() == 1
  assert losses[2] < losses[0]  # the same batch again


def test_another_adapter_runs_the_same_program(setup):
  model, base, ids = setup
  sites = pelt.sites(model, ids)
  apply = jax.jit(pelt.bypass(model.apply))
  outs = []
  for seed, alpha in ((2, 2.0), (3, 8.0)):  # the scaling is an array: another value, same program
    params = pelt.lora(rank=2, alpha=alpha).init(jax.random.key(seed), base, sites)
    trainable, frozen = pelt.partition(params)
    moved = pelt.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    outs.append(apply({"params": moved}, ids))
  assert apply._cache_size() == 1
  assert jnp.abs(outs[0] - outs[1]).max() > 1e-3


def test_init_compiles_once_with_sites_static(setup):
  model, base, ids = setup
  sites = pelt.sites(model, ids)
  init = jax.jit(pelt.lora(rank=2).init, static_argnums=2)
  first = init(jax.random.key(2), base, sites)
  init(jax.random.key(3), base, pelt.sites(model, ids))  # equal sites hash alike
  assert init._cache_size() == 1
  eager = pelt.lora(rank=2).init(jax.random.key(2), base, sites)
  jax.tree.map(np.testing.assert_array_equal, first, eager)


def test_a_jitted_bypass_is_right_after_the_plain_model_was_jitted(setup):
  model, base, ids = setup
  plain = jax.jit(model.apply)
  before = plain({"params": base}, ids)
  params = pelt.lora(rank=2).init(jax.random.key(2), base, pelt.sites(model, ids))
  trainable, frozen = pelt.partition(params)
  moved = pelt.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
  after = jax.jit(pelt.bypass(model.apply))({"params": moved}, ids)
  assert jnp.abs(after - before).max() > 1e-3
  np.testing.assert_array_equal(plain({"params": base}, ids), before)
