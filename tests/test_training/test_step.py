"""Losses and the optimizer step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import training
from tests.test_training import tiny


def one_weight(value, base, dtype=jnp.float32):
  """Params of y = x (w + b): b is frozen, w trains."""
  return {"w": pelt.nodes.Tuned(jnp.asarray(value, dtype)), "b": jnp.asarray(base, dtype)}


def product(variables, x):
  params = variables["params"]
  return x * (params["w"].value + params["b"])


def squares(apply, params, batch, key):
  """mean (x (w + b) - y)^2 over the valid entries."""
  error = apply({"params": params}, batch["x"]) - batch["y"]
  weight = jnp.sum(batch["valid"])
  total = jnp.sum(jnp.where(batch["valid"] > 0, error * error, 0.0))
  return total / weight, {"weight": weight}


BATCH = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([0.0, 0.0]), "valid": jnp.array([1.0, 1.0])}


def run(train, params, batch=BATCH, steps=1):
  trainable, frozen, state = train.init(params)
  metrics = {}
  for i in range(steps):
    trainable, state, metrics = train.step(trainable, frozen, state, batch, jax.random.key(i))
  return trainable, frozen, state, metrics


def test_a_step_by_hand():
  # (w + b) = 2: loss (1 + 4) 4 / 2 = 10, gradient 2 (1 + 4) 2 / 2 = 10.
  train = training.train_step(product, squares, optax.sgd(0.125))
  trainable, frozen, _, metrics = run(train, one_weight(1.0, 1.0))
  assert float(metrics["loss"]) == 10.0
  assert float(metrics["grad_norm"]) == 10.0
  assert float(trainable["w"].value) == 1.0 - 1.25
  assert float(frozen["b"]) == 1.0


def test_a_loss_may_return_a_scalar_alone():
  scalar = lambda *args: squares(*args)[0]
  train = training.train_step(product, scalar, optax.sgd(0.125))
  assert float(run(train, one_weight(1.0, 1.0))[3]["loss"]) == 10.0


def test_clipping_sees_only_what_trains():
  # The frozen leaf's gradient would be as large, and the norm 10 sqrt(2).
  train = training.train_step(product, squares, optax.sgd(1.0), clip=5.0)
  trainable, _, _, metrics = run(train, one_weight(1.0, 1.0))
  assert float(metrics["grad_norm"]) == 10.0
  assert float(trainable["w"].value) == 1.0 - 5.0
  loose = training.train_step(product, squares, optax.sgd(1.0), clip=16.0)
  assert float(run(loose, one_weight(1.0, 1.0))[0]["w"].value) == 1.0 - 10.0


def test_the_method_acts_after_clipping_once_per_step():
  seen = []

  def update(state, old, new, grads, record=None):
    seen.append([float(t["w"].value) for t in (old, new, grads)])
    return jax.tree.map(lambda x: x + 100.0, new), state + 1

  method = pelt.Transform(
    lambda key, params, sites: params, pelt.PostStep(lambda params: jnp.int32(0), update)
  )
  train = training.train_step(product, squares, optax.sgd(1.0), method, clip=5.0, accumulate=2)
  trainable, _, state, _ = run(train, one_weight(1.0, 1.0))
  assert seen == [[1.0, -4.0, 5.0]]
  assert float(trainable["w"].value) == 96.0
  assert int(state.post) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_nodes_tell_reaches_the_method(accumulate):
  """Of parts their mean; the loss runs as before."""
  seen = []

  def telling(variables, x, record=()):
    out = product(variables, x)
    return (out, {"place": {n: jnp.mean(x) for n in record}}) if record else out

  def update(state, old, new, grads, record=None):
    seen.append(record)
    return new, state

  method = pelt.Transform(
    lambda key, params, sites: params, pelt.PostStep(lambda params: 0, update)
  )
  loss = training.recorded(squares, "told")
  train = training.train_step(telling, loss, optax.sgd(1.0), method, accumulate=accumulate)
  assert float(run(train, one_weight(1.0, 1.0))[3]["loss"]) == 10.0
  assert [float(r["place"]["told"]) for r in seen] == [1.5]
  plain = training.train_step(telling, squares, optax.sgd(1.0), method, accumulate=accumulate)
  run(plain, one_weight(1.0, 1.0))
  assert seen[1:] == [None]


def test_penalties_join_the_loss():
  class Pulled(pelt.nodes.Tuned):
    def penalty(self):
      return jnp.float32(0.5) * jnp.sum(self.value**2)

  params = {"w": Pulled(jnp.float32(2.0)), "b": jnp.float32(-1.0)}
  train = training.train_step(product, squares, optax.sgd(1.0), accumulate=2)
  trainable, _, _, metrics = run(train, params)
  # loss 5/2 + 4/2, gradient 5 + 2
  assert float(metrics["loss"]) == 4.5
  assert float(trainable["w"].value) == 2.0 - 7.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_trained_halves_become_float32(dtype):
  train = training.train_step(product, squares, optax.sgd(1.0))
  params = one_weight(1.0, 1.0, dtype)
  params["n"] = pelt.nodes.Tuned(jnp.zeros(2, jnp.float32))
  trainable, frozen, _ = train.init(params)
  assert trainable["w"].value.dtype == trainable["n"].value.dtype == jnp.float32
  assert frozen["b"].dtype == dtype


def lora_params(model, params, key=3):
  sites = pelt.sites(model, jnp.zeros((1, 4), jnp.int32))
  method = pelt.lora(rank=2, targets=("query", "ffn_out"))
  params = method.init(jax.random.key(key), params, sites)
  # b = 0 would leave a without a gradient.
  return jax.tree.map(lambda x: x + jnp.asarray(0.01, x.dtype), params)


@pytest.mark.parity
def test_parts_of_a_batch_add_up_to_the_batch():
  """Sums over sums of counts: rows differ in their targets, so means of means differ."""
  with jax.enable_x64(True):
    model, params = tiny.llama(jnp.float64)
    with jax.numpy_dtype_promotion("standard"):
      params = lora_params(model, params)
    _, batch = next(training.batches(tiny.text_rows(8, 8), 8))
    key = jax.random.key(0)
    results = []
    for parts in (1, 2, 8):
      train = training.train_step(
        pelt.bypass(model.apply), training.next_token, optax.sgd(1.0), accumulate=parts
      )
      trainable, frozen, state = train.init(params)
      new, _, metrics = jax.jit(train.step)(trainable, frozen, state, batch, key)
      assert metrics["loss"].dtype == jnp.float64
      results.append((metrics["loss"], new))
    weights = [(row != -100).sum() for row in batch["labels"]]
    assert max(weights) > min(weights)
    for loss, new in results[1:]:
      np.testing.assert_allclose(loss, results[0][0], rtol=1e-13)
      # About 1e4 float64 additions in another order.
      for a, b in zip(tiny.leaves(new), tiny.leaves(results[0][1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)


def test_parts_of_a_batch_draw_apart():
  """Equal rows in one batch of two parts: with one mask for both, the parts would be equal."""
  seen = []

  def loss(apply, params, batch, key):
    noise = jax.random.normal(key, (2,)).sum()
    jax.debug.callback(lambda n: seen.append(float(n)), noise)
    return params["w"].value.sum() * batch["x"].sum(), {"weight": jnp.asarray(1.0)}

  train = training.train_step(product, loss, optax.sgd(1.0), accumulate=4)
  trainable, frozen, state = train.init(one_weight(1.0, 1.0))
  jax.block_until_ready(
    train.step(trainable, frozen, state, {"x": jnp.ones((4, 1))}, jax.random.key(0))
  )
  jax.effects_barrier()
  assert len(seen) == 4 == len(set(seen))


def test_adam_keeps_moments_of_what_trains_alone():
  model, params = tiny.llama()
  params = lora_params(model, params)
  train = training.train_step(
    pelt.bypass(model.apply), training.next_token, optax.inject_hyperparams(optax.adam)(1e-3)
  )
  trainable, frozen, state = train.init(params)
  sizes = [x.size for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert sum(sizes) == 2 * pelt.count(params).trainable > 0
  _, batch = next(training.batches(tiny.text_rows(), 8))
  before = tiny.leaves(frozen)
  step = jax.jit(train.step, donate_argnums=(0, 2))
  for i in range(3):
    trainable, state, metrics = step(trainable, frozen, state, batch, jax.random.key(i))
  assert step._cache_size() == 1
  assert tiny.equal(before, frozen)
  np.testing.assert_allclose(metrics["learning_rate"], 1e-3, rtol=1e-6)


def test_weights_below_one_are_weights_too():
  def light(*args):
    loss, aux = squares(*args)
    return loss, {"weight": aux["weight"] / 8}

  train = training.train_step(product, light, optax.sgd(0.125), accumulate=2)
  trainable, _, _, metrics = run(train, one_weight(1.0, 1.0))
  assert float(metrics["loss"]) == 10.0
  assert float(trainable["w"].value) == 1.0 - 1.25


def test_a_batch_without_targets_changes_nothing():
  model, params = tiny.llama()
  params = lora_params(model, params)
  train = training.train_step(pelt.bypass(model.apply), training.next_token, optax.sgd(1.0))
  trainable, frozen, state = train.init(params)
  _, batch = next(training.batches(tiny.text_rows(), 4))
  batch["labels"] = np.full_like(batch["labels"], -100)
  new, _, metrics = jax.jit(train.step)(trainable, frozen, state, batch, jax.random.key(0))
  assert float(metrics["loss"]) == 0.0
  assert tiny.equal(new, trainable)


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0], [7.0, 1.0]]))
  model = lambda variables, ids, deterministic: logits
  batch = {"input_ids": jnp.zeros((3, 1), jnp.int32), "labels": jnp.array([1, 0, -100])}
  loss, aux = training.cross_entropy(model, {}, batch)
  np.testing.assert_allclose(loss, (np.log(4 / 3) + np.log(2)) / 2, rtol=1e-6)
  assert float(aux["weight"]) == 2.0 and float(aux["correct"]) == 2.0
  assert aux["predictions"].tolist() == [1, 0, 0]


def test_packed_texts_have_the_losses_they_have_alone():
  model, params = tiny.llama()
  packed = tiny.text_rows(12, 60)
  assert all(row["segment_ids"].max() > 1 for row in packed.rows)
  rows = [
    {name: row[name][row["segment_ids"] == i] for name in ("input_ids", "labels")}
    for row in packed.rows
    for i in range(1, row["segment_ids"].max() + 1)
  ]
  alone = dataclasses.replace(packed, rows=tuple(rows))
  a, b = (training.evaluate(model.apply, params, data, 4) for data in (packed, alone))
  # float32, about 1e2 tokens, attention over up to 60 positions
  np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-6)
  np.testing.assert_allclose(a["bits_per_byte"], b["bits_per_byte"], rtol=2e-6)


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"clip": -1.0}, {"accumulate": 0}])
def test_bad_options(options):
  name = next(iter(options))
  with pytest.raises(ValueError, match=f"{name}="):
    training.train_step(product, squares, optax.sgd(1.0), **options)


def test_parts_must_divide_the_batch():
  train = training.train_step(product, squares, optax.sgd(1.0), accumulate=3)
  with pytest.raises(ValueError, match="accumulate=3 does not divide the batch of 2"):
    run(train, one_weight(1.0, 1.0))


@pytest.mark.parametrize(("mesh", "parts"), [((4, 1, 1), 4), ((2, 2, 1), 4), ((2, 1, 4), 8)])
def test_parts_must_divide_over_the_devices_that_share_a_batch(mesh, parts):
  """Otherwise each device would compute all rows of a part, and nobody would know."""
  axes = jax.sharding.AbstractMesh(mesh, ("data", "fsdp", "model"))
  batch = {name: jnp.ones(8) for name in BATCH}
  for accumulate in (parts, parts // 2):
    train = training.train_step(product, squares, optax.sgd(1.0), accumulate=accumulate)
    state = train.init(one_weight(1.0, 1.0))
    trace = lambda: jax.eval_shape(train.step, *state, batch, jax.random.key(0))  # noqa: B023
    with jax.sharding.use_abstract_mesh(axes):
      if accumulate < parts:
        assert trace()[2]["loss"].shape == ()
      else:
        message = f"accumulate={parts} leaves {8 // parts} rows to a part, which .* cannot share"
        with pytest.raises(ValueError, match=message):
          trace()
