"""What a compiled step costs: frozen kernels get no gradient and no optimizer state."""

import jax
import jax.numpy as jnp
import optax
import pytest

import pelt_jax as pelt
from experiments import flops
from pelt_jax import training

QUERY_VALUE = pelt.lora(rank=8, targets=("query", "value"))


@pytest.fixture(scope="module", autouse=True)
def promotion():
  """Adam of optax raises a Python float to an integer array, which the strict setting refuses."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def lora(promotion):
  return flops.measure(QUERY_VALUE)


def kernels(params):
  """Shapes of a Llama's matrices, either way round."""
  shapes = {x.shape for x in jax.tree.leaves(params) if x.ndim == 2}
  return shapes | {s[::-1] for s in shapes}


def products(function, *args):
  """Shapes of the results of all matrix products in the traced program."""
  found = []

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        found.append(eqn.outvars[0].aval.shape)
      for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          walk(inner)

  walk(jax.make_jaxpr(function)(*args).jaxpr)
  return found


def step_of(method, sizes=flops.SIZES):
  loss, plain, params, batch = flops.case(method, sizes)
  trainable, frozen = pelt.partition(params)
  tx = optax.adamw(1e-3)
  args = trainable, frozen, jax.eval_shape(tx.init, trainable), batch
  return flops.train_step(loss, tx), args, plain


def test_a_lora_step_costs_two_forward_passes(lora):
  # The backward pass through frozen kernels is one product for each of the forward's; the rest is
  # LoRA's own three products (3.5 %), less what the first layer's input does not need.
  assert 1.95 < lora["ratio"] <= 2.06


@pytest.mark.parity
def test_full_fine_tuning_costs_three():
  full = flops.measure(pelt.full())
  assert full["ratio"] == pytest.approx(3.0, abs=0.02)
  assert full["step_dots"] == full["needed_dots"]


@pytest.mark.parity
@pytest.mark.parametrize("method", [pelt.prefix_tuning(20), pelt.p_tuning_v2(20)])
def test_a_prefix_costs_its_own_products_and_less_than_tokens(method):
  found = flops.measure(method)
  assert found["step_dots"] == found["needed_dots"]
  assert found["step"] <= 1.02 * found["needed_dots"]
  loss, plain, _, batch = flops.case(method, length=flops.LENGTH + 20)
  assert found["forward"] < found["forward_nodes"] < flops.compiled_flops(loss, plain, batch)


@pytest.mark.parity
def test_virtual_tokens_cost_what_tokens_cost():
  found = flops.measure(pelt.prompt_tuning(20))
  assert found["forward_nodes"] <= 1.001 * found["forward"]
  assert found["step_dots"] == found["needed_dots"]


def test_the_step_has_no_product_that_the_gradient_does_not_need(lora):
  assert lora["step_dots"] == lora["needed_dots"]
  # Elementwise work (softmax, norms, AdamW) is about 1 % at width 256.
  assert lora["step"] <= 1.01 * lora["needed_dots"]


def test_no_product_has_the_shape_of_a_frozen_kernel():
  step, args, plain = step_of(QUERY_VALUE)
  assert not kernels(plain) & set(products(step, *args))
  step, args, plain = step_of(pelt.full())
  assert kernels(plain) <= {s for shape in products(step, *args) for s in (shape, shape[::-1])}


def test_optimizer_state_is_for_the_trainable_part_alone(lora):
  per_site = 8 * (256 + 256)
  assert lora["trainable"] == 4 * 2 * per_site
  assert lora["optimizer"] == 2 * lora["trainable"] + 1  # two moments and AdamW's counter


@pytest.mark.parity
def test_the_whole_tree_route_costs_the_same(lora):
  loss, _, params, batch = flops.case(QUERY_VALUE)
  tx = optax.multi_transform(
    {"trainable": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, pelt.labels
  )

  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  whole = flops.compiled_flops(step, params, jax.eval_shape(tx.init, params), batch)
  # Adding zero updates to the base is one FLOP per parameter.
  assert whole == pytest.approx(lora["step"], rel=2e-3)


@pytest.mark.parity
def test_scanned_and_rematerialized_layers_need_no_more():
  counts = {}
  for scan, remat in ((False, False), (True, False), (False, True), (True, True)):
    loss, _, params, batch = flops.case(QUERY_VALUE, scan=scan, remat=remat)
    trainable, frozen = pelt.partition(params)
    joined = lambda t, f, b, loss=loss: loss(pelt.combine(t, f), b)
    wanted = flops.needed(joined, trainable, frozen, batch)
    done = flops.dots_in(jax.value_and_grad(joined), trainable, frozen, batch)
    # One body serves all layers of a scan, so the first layer's input gradient is computed too.
    assert wanted.needed <= done <= wanted.needed + wanted.again
    counts[scan, remat] = wanted.needed
  assert counts[False, False] == counts[False, True]
  assert counts[True, False] == counts[True, True]
  assert counts[False, False] <= counts[True, False] <= 1.03 * counts[False, False]


def test_the_counter_on_a_program_done_by_hand():
  def loss(t, x, w):
    h = jnp.dot(x, w)  # frozen, and before anything trains: no gradient at all
    y = jnp.dot(h, t)  # the gradient of t
    return jnp.dot(y, w).sum()  # the gradient of y

  t, x, w = jnp.ones((3, 3)), jnp.ones((5, 3)), jnp.ones((3, 3))
  one = 2 * 5 * 3 * 3
  count = flops.needed(loss, t, x, w)
  assert (count.forward, count.backward) == (3 * one, 2 * one)
  assert flops.dots_in(jax.grad(loss), t, x, w) == 5 * one


@pytest.mark.parity
def test_an_adalora_step_costs_what_a_lora_step_of_its_first_rank_costs():
  def step_flops(method):
    loss, _, params, batch = flops.case(method)
    init, step = training.train_step(
      lambda *_: None, lambda _, p, b, key: loss(p, b), optax.adamw(1e-3), method, clip=1.0
    )
    shapes = jax.eval_shape(init, params)
    return flops.compiled_flops(step, *shapes, batch, jax.random.key(0))

  lora = step_flops(pelt.lora(rank=12, targets="all-linear"))
  # The regulariser, the scores and the choice are all that comes on top.
  assert lora < step_flops(pelt.adalora(steps=100, rank=12)) <= 1.05 * lora
