"""LoRA+: groups of their own for b and tables, and PEFT's four rates."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from tests.test_core.tiny import values


class Model(nn.Module):
  """A table, a kernel, a norm, a head of several axes."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(11, 4, name="emb")(ids)
    x = nn.LayerNorm(name="norm")(nn.Dense(6, name="lin")(x))
    return nn.DenseGeneral((2, 3), name="head")(x)


IDS = jnp.array([[1, 3]])


@pytest.fixture(autouse=True)
def standard():
  with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises floats to powers of integers
    yield


def params_of(method):
  model = Model()
  base = model.init(jax.random.key(0), IDS)["params"]
  return method.init(jax.random.key(1), base, pelt.sites(model, IDS))


ALL = pelt.chain(
  pelt.lora(2, targets=("emb", "lin/kernel"), plus=True), pelt.train(("head", "norm"))
)


def stepped(tx, trainable, seed=0):
  grads = jax.tree.map(lambda v: values(v.shape, seed + v.size, v.dtype), trainable)
  updates, _ = tx.update(grads, tx.init(trainable), trainable)
  return grads, updates


def test_labels():
  params = params_of(ALL)
  found = pelt.labels(params)
  assert (found["lin"]["kernel"].a, found["lin"]["kernel"].b) == ("trainable", "lora_b")
  table = found["emb"]["embedding"]
  assert table.a == table.b == "lora_embedding"
  assert found["lin"]["kernel"].scaling == found["lin"]["kernel"].base == "frozen"
  frozen = params_of(pelt.lora(2, targets="lin/kernel", plus=True, group=None))
  assert set(jax.tree.leaves(pelt.labels(frozen))) == {"frozen"}
  magnitude = params_of(pelt.dora(2, targets="lin/kernel", plus=True))["lin"]["kernel"]
  assert (magnitude.group, magnitude.base.b_group) == ("lora_b", "lora_b")
  assert params_of(pelt.pissa(2, targets="lin/kernel", plus=True))["lin"]["kernel"].b_group
  fused = pelt.lora(2, targets="lin/kernel", fused=((0,), 2), plus=True)
  assert pelt.labels(params_of(fused))["lin"]["kernel"].b == "lora_b"


def test_sgd_moves_b_ratio_times_as_far():
  trainable, _ = pelt.partition(params_of(ALL))
  tx = pelt.lora_plus(optax.sgd, 0.5, ratio=16, embedding_rate=0.125)
  grads, updates = stepped(tx, trainable)
  rates = {
    "lin": {"kernel": {"a": 0.5, "b": 8.0}},
    "emb": {"embedding": {"a": 0.125, "b": 0.125}},
    "head": {"kernel": {"value": 0.5}, "bias": {"value": 8.0}},  # its bias has two axes
    "norm": {"scale": {"value": 8.0}, "bias": {"value": 8.0}},
  }
  for module, leaves in rates.items():
    for leaf, fields in leaves.items():
      for field, rate in fields.items():
        g, u = (getattr(tree[module][leaf], field) for tree in (grads, updates))
        np.testing.assert_array_equal(u, -rate * g, err_msg=f"{module}/{leaf}/{field}")


def test_vectors_do_not_decay():
  trainable, _ = pelt.partition(params_of(ALL))
  tx = pelt.lora_plus(optax.adamw, 0.5, ratio=2, embedding_rate=0.25, weight_decay=0.5)
  zero = jax.tree.map(jnp.zeros_like, trainable)
  updates, _ = tx.update(zero, tx.init(trainable), trainable)
  expected = {
    "lin": ("kernel", "a", 0.25), "emb": ("embedding", "b", 0.125),
    "head": ("kernel", "value", 0.25), "norm": ("scale", "value", 0.0),
  }  # fmt: skip
  for module, (leaf, field, rate) in expected.items():
    p, u = (getattr(tree[module][leaf], field) for tree in (trainable, updates))
    np.testing.assert_allclose(u, -rate * p, rtol=1e-6, err_msg=module)
  b = jax.tree.map(jnp.ones_like, trainable)
  updates, _ = tx.update(zero, tx.init(b), b)
  np.testing.assert_allclose(updates["lin"]["kernel"].b, -0.5)
  np.testing.assert_array_equal(updates["head"]["bias"].value, 0.0)
  scanned = jax.tree.map(lambda v: jnp.stack([v] * 3), b["norm"]["scale"].add_axis(0, {}))
  stack = {**b, "norm": {**b["norm"], "scale": scanned}}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, stack), tx.init(stack), stack)
  np.testing.assert_array_equal(updates["norm"]["scale"].value, 0.0)  # vectors of three layers


@pytest.mark.parametrize("rate", [1e-2, optax.linear_schedule(1e-2, 0.0, 4)])
@pytest.mark.parametrize(
  ("optimizer", "options", "close"),
  [
    (optax.sgd, dict(momentum=0.9), 0.0),
    # Its correction of the moments is a program of all leaves, fused as they come: an ulp of 0.01.
    (optax.adamw, dict(weight_decay=0.1), 1e-9),
  ],
)
def test_ratio_one_is_the_plain_optimizer(optimizer, options, close, rate):
  method = pelt.chain(pelt.lora(2, targets="lin/kernel", plus=True), pelt.train("head/kernel"))
  trainable, _ = pelt.partition(params_of(method))
  runs = []
  for tx in (pelt.lora_plus(optimizer, rate, ratio=1, **options), optimizer(rate, **options)):
    state, at = tx.init(trainable), trainable
    for i in range(3):
      grads = jax.tree.map(lambda v, i=i: values(v.shape, i + v.size, v.dtype), at)
      updates, state = tx.update(grads, state, at)
      at = jax.tree.map(jnp.add, at, updates)
    runs.append(at)
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=close)
  jax.tree.map(same, *runs)


def test_the_whole_tree_goes_too():
  params = params_of(pelt.lora(2, targets="lin/kernel", plus=True))
  updates = stepped(pelt.lora_plus(optax.sgd, 1.0, ratio=2), params)[1]
  np.testing.assert_array_equal(updates["lin"]["kernel"].base, 0.0)
  assert jnp.abs(updates["lin"]["kernel"].b).max() > 0


def test_bad_input():
  with pytest.raises(TypeError, match="such as optax.adamw"):
    pelt.lora_plus(optax.adamw(1e-3), 1e-3, ratio=2)
  for options, name in (
    (dict(ratio=0.5), "ratio"),
    (dict(ratio=float("nan")), "ratio"),
    (dict(ratio=2, embedding_rate=-1.0), "embedding_rate"),
  ):
    with pytest.raises(ValueError, match=f"{name} must be"):
      pelt.lora_plus(optax.adamw, 1e-3, **options)
  with pytest.raises(ValueError, match="learning_rate must be"):
    pelt.lora_plus(optax.adamw, -1e-3, ratio=2)
  with pytest.raises(ValueError, match=r"weight_decay=0.1: sgd has no such"):
    pelt.lora_plus(optax.sgd, 1e-3, ratio=2, weight_decay=0.1)
  trainable, _ = pelt.partition(params_of(pelt.lora(2, targets="lin/kernel")))
  with pytest.raises(ValueError, match="plus=True"):
    pelt.lora_plus(optax.sgd, 1e-3, ratio=2).init(trainable)


def test_rates_may_be_injected():
  params = {"w": pelt.nodes.LoraWeight(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0)}
  params["w"] = params["w"].replace(b_group="lora_b")
  trainable, _ = pelt.partition(params)
  make = lambda learning_rate: pelt.lora_plus(optax.sgd, learning_rate, ratio=4.0)
  tx = optax.inject_hyperparams(make)(learning_rate=0.5)
  updates, _ = jax.jit(tx.update)(trainable, tx.init(trainable), trainable)
  np.testing.assert_allclose(updates["w"].a, -0.5)
  np.testing.assert_allclose(updates["w"].b, -2.0)
  with pytest.raises(ValueError, match="weight_decay is bound in optimizer"):
    pelt.lora_plus(functools.partial(optax.adamw, weight_decay=0.1), 1e-3, ratio=4.0)
