"""Optimizer state in the host's memory: the same bits, the promised placement."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import training
from tests.support import on_devices
from tests.test_training import tiny

SIZE = 1000  # arrays of so many elements go to the host here


@pytest.fixture(autouse=True)
def promotion():
  """Optax mixes dtypes in its own arithmetic."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def params():
  key = jax.random.key(0)
  normal = lambda i: jax.random.normal(jax.random.fold_in(key, i), (64, 20 + i))
  return {f"w{i}": normal(i) for i in range(3)} | {"b": jnp.ones(7)}


def but_w1(tree):
  return {name: "frozen" if name == "w1" else "trainable" for name in tree}


def steps_of(optimizer, every):
  made = optax.MultiSteps(optimizer, every)
  return optax.GradientTransformation(made.init, made.update)


OPTIMIZERS = {
  "adamw": optax.adamw(1e-2),
  "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
  "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
  "lion": optax.lion(1e-3),
  "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
  "lamb": optax.lamb(1e-2),
  "groups": optax.multi_transform(
    {"trainable": optax.adamw(1e-2), "frozen": optax.set_to_zero()}, but_w1
  ),
  "rate in the state": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
  "average of updates": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
  "every second": steps_of(optax.adam(1e-2), 2),
}


def train(tx, jit):
  start = params()
  state = tx.init(start)

  def step(current, state, grads):
    updates, state = tx.update(grads, state, current)
    return optax.apply_updates(current, updates), state

  run = jax.jit(step) if jit else step
  for i in range(3):
    start, state = run(start, state, jax.tree.map(lambda x, i=i: x * jnp.sin(i + x), start))
  return start, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_updates_are_the_same_bits(name):
  tx = OPTIMIZERS[name]
  expected, found = train(tx, True), train(pelt.paged(tx, SIZE), True)
  assert jax.tree.structure(expected) == jax.tree.structure(found)
  assert tiny.equal(expected, found)
  away = [x.size for x in jax.tree.leaves(found[1]) if x.sharding.memory_kind == "pinned_host"]
  assert away == [x.size for x in jax.tree.leaves(expected[1]) if x.size >= SIZE]
  assert all(x.sharding.memory_kind == "device" for x in jax.tree.leaves(found[0]))
  assert away or name == "adafactor"  # whose factors are small


def test_eagerly_too():
  """Up to what eager and jitted arithmetic differ in by themselves."""
  tx = optax.adamw(1e-2)
  found = train(pelt.paged(tx, SIZE), False)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5), train(tx, False), found)


def test_the_default_is_a_hundred_thousand_elements():
  tree = {"a": jnp.ones(100_000), "b": jnp.ones(99_999)}
  state = pelt.paged(optax.adam(0.1)).init(tree)[0]
  kinds = {name: x.sharding.memory_kind for name, x in state.mu.items()}
  assert kinds == {"a": "pinned_host", "b": "device"}


def test_state_goes_over_from_one_to_the_other():
  """Checkpoints of runs without it serve runs with it, and back."""
  tx, start = optax.adam(0.1), params()
  state = pelt.paged(tx, SIZE).init(start)
  there = jax.jit(pelt.paged(tx, SIZE).update)(start, tx.init(start))[1]
  assert jax.tree.structure(there) == jax.tree.structure(state)
  assert there[0].mu["w0"].sharding.memory_kind == "pinned_host"


def test_one_array_waits_for_the_one_before():
  """In the program each array of one parameter comes after the last one's went back."""
  tx, start = pelt.paged(optax.adam(0.1), SIZE), params()
  shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
  jaxpr = jax.make_jaxpr(tx.update)(shapes(start), shapes(tx.init(start)))
  names = [eqn.primitive.name for eqn in jaxpr.eqns]
  moves = [n for n in names if n in ("device_put", "optimization_barrier")]
  moved = [n for n in moves if n == "device_put"]
  # Three parameters, two moments, both ways; all but the first parameter's two wait.
  assert len(moved) == 3 * 2 * 2 and moves.count("optimization_barrier") == 2 * 2
  first = moves.index("optimization_barrier")
  assert moves[:first].count("device_put") == 4  # the first parameter's, in and out


def fitted(tx, steps, **options):
  model, base = tiny.llama()
  method = pelt.lora(rank=4, targets="all-linear")
  with_nodes = method.init(jax.random.key(1), base, pelt.sites(model, jnp.zeros((1, 4), jnp.int32)))
  train = training.train_step(pelt.bypass(model.apply), training.next_token, tx, clip=1.0)
  loader = training.Loader(tiny.text_rows(), 8, 0)
  key = jax.random.key(2)
  return training.fit(train, with_nodes, loader, steps=steps, key=key, progress=False, **options)


def test_training_and_resuming(tmp_path):
  """A run ends with the bits of one without it; stopped, saved and resumed, still."""
  tx = optax.adamw(1e-2)
  paged = pelt.paged(tx, 64)
  plain, whole = fitted(tx, 6), fitted(paged, 6)
  assert tiny.equal(plain.trainable, whole.trainable) and tiny.equal(plain.state, whole.state)
  folder = tmp_path / "checkpoints"
  fitted(paged, 3, checkpoints=training.Checkpoints(folder))
  resumed = fitted(paged, 6, checkpoints=training.Checkpoints(folder), resume=True)
  assert tiny.equal(whole.trainable, resumed.trainable)
  assert tiny.equal(whole.state, resumed.state)
  large = [x for x in jax.tree.leaves(resumed.state.optimizer) if x.size >= 64]
  assert large and all(x.sharding.memory_kind == "pinned_host" for x in large)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax, pelt_jax as pelt
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")
mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
on = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
start = {"a": jnp.sin(jnp.arange(4096.0)).reshape(64, 64), "b": jnp.ones((64, 32))}
placed = jax.device_put(start, {"a": on("fsdp", "model"), "b": on(None, "model")})

def run(params, tx):
  state = tx.init(params)
  state = (state[0]._replace(count=jax.device_put(state[0].count, on())), *state[1:])
  kept = jax.tree.map(lambda x: x.sharding, (params, state))
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
  step = jax.jit(step, out_shardings=kept, donate_argnums=(0, 1))
  for _ in range(3):
    params, state = step(params, state, jax.tree.map(jnp.sin, params))
  assert step._cache_size() == 1
  assert jax.tree.map(lambda x: x.sharding, (params, state)) == kept
  return params, state

expected = run(jax.tree.map(jnp.copy, placed), optax.adamw(1e-2))
params, state = run(placed, pelt.paged(optax.adamw(1e-2), 1000))
for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves((params, state)), strict=True):
  np.testing.assert_array_equal(x, y)
assert state[0].mu["a"].sharding == on("fsdp", "model").with_memory_kind("pinned_host")
"""


def test_shards_stay_where_they_are():
  on_devices(SHARDED)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda: inspect.unwrap(pelt.paged)(1e-3),
      TypeError,
      "tx must be an optax transformation, got float",
    ),
    (lambda: pelt.paged(optax.sgd(1.0), -1), ValueError, "min_size=-1: expected a number of"),
  ],
)
def test_bad_arguments(call, error, message):
  with pytest.raises(error, match=message):
    call()


def test_program_gives_constants_and_inputs_as_they_are():
  tx = optax.GradientTransformation(
    lambda params: {"same": params["w0"], "step": jnp.zeros([])},
    lambda g, state, params=None: (g, {"same": state["same"], "step": 2.0}),
  )
  start = params()
  updates, state = pelt.paged(tx, SIZE).update(start, pelt.paged(tx, SIZE).init(start))
  assert tiny.equal(updates, start) and float(state["step"]) == 2.0
  assert np.array_equal(state["same"], start["w0"])
  assert state["same"].sharding.memory_kind == "pinned_host"
