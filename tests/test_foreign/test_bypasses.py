"""Bypass nodes in transformers' Flax BERT, against its last layer written out by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax._node import Bypass, own
from pelt_jax._transform import add_bypass
from tests.support import require

pytestmark = pytest.mark.parity
require("flax_transformers")
from tests.test_foreign import families  # noqa: E402

WIDTH, LAYERS = 16, 3
LAST = f"encoder/layer/{LAYERS - 1}"


@pytest.fixture(autouse=True)
def promotion():
  with families.promotion():
    yield


@pytest.fixture(scope="module")
def bert():
  with families.promotion():
    yield families.make("bert", width=WIDTH, layers=LAYERS)


def drawn(seed, *shape):
  return 0.3 * jax.random.normal(jax.random.key(seed), shape)


def bottleneck(seed=0, up=True):
  up = drawn(seed + 1, 4, WIDTH) if up else jnp.zeros((4, WIDTH))
  return nodes.Bottleneck(drawn(seed, WIDTH, 4), drawn(seed + 2, 4), up, None, jnp.float32(2.0))


def gate():
  return nodes.MeanGate(drawn(5, WIDTH, 1), drawn(6, 1))


def gated(up=True):
  return nodes.Gated(gate(), bottleneck(up=up))


# name -> (path under a layer, node); a node with `up=False` starts as the identity
PLACED = {
  "houlsby": ("output/dropout", lambda up: nodes.After(bottleneck(up=up))),
  "pfeiffer": ("output/LayerNorm", lambda up: nodes.AroundNorm(bottleneck(up=up))),
  "parallel": (
    "output/dropout",
    lambda up: nodes.After(bottleneck(up=up), tap="../../intermediate:in"),
  ),
  "gated": ("output/dropout", lambda up: nodes.After(gated(up))),
}


def adapted(foreign, name, *, up, layers=(LAYERS - 1,)):
  where, make = PLACED[name]
  params, sites = foreign.params, foreign.sites()
  for layer in layers:
    params = add_bypass(params, sites, f"encoder/layer/{layer}/{where}", make(up))
  return params


def by_hand(foreign, name):
  """The last layer's second half, from what the unmodified model's modules gave."""
  keep = lambda module, _: isinstance(module, (nn.Dropout, nn.LayerNorm))
  _, seen = foreign.module.apply(
    {"params": foreign.params}, *foreign.args, capture_intermediates=keep, mutable="intermediates"
  )
  layer = seen["intermediates"]["encoder"]["layer"][str(LAYERS - 1)]
  fed = layer["output"]["dropout"]["__call__"][0]
  x = layer["attention"]["output"]["LayerNorm"]["__call__"][0]
  own = foreign.params["encoder"]["layer"][str(LAYERS - 1)]["output"]["LayerNorm"]
  b = bottleneck()

  def branch(h):
    return 2.0 * jnp.maximum(h @ b.down + b.down_bias, 0) @ b.up

  def norm(s):
    mean, var = s.mean(-1, keepdims=True), s.var(-1, keepdims=True)
    return (s - mean) / jnp.sqrt(var + 1e-12) * own["scale"] + own["bias"]

  if name == "houlsby":
    return norm(fed + branch(fed) + x)
  if name == "pfeiffer":
    return norm(fed + x + branch(norm(fed + x)))
  if name == "parallel":
    return norm(fed + branch(x) + x)
  g, real = gate(), foreign.args[1][..., None]
  gates = jax.nn.sigmoid(fed @ g.kernel + g.bias)
  return norm(fed + (gates * real).sum(1, keepdims=True) / real.sum(1)[:, None] * branch(fed) + x)


@pytest.mark.parametrize("name", PLACED)
def test_starts_as_the_identity(bert, name):
  params = adapted(bert, name, up=False, layers=range(LAYERS))
  wanted = bert.out(bert.params, bypass=False)
  np.testing.assert_array_equal(bert.out(params), wanted)


@pytest.mark.parametrize("name", PLACED)
def test_agrees_with_the_layer_by_hand(bert, name):
  wanted = by_hand(bert, name)
  plain = bert.out(bert.params, bypass=False)
  assert jnp.abs(wanted - plain).max() > 1e-2
  # float32, one LayerNorm of values of order 1.
  np.testing.assert_allclose(bert.out(adapted(bert, name, up=True)), wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", PLACED)
def test_gradient_checkpointing_changes_neither_values_nor_gradients(bert, name):
  other = families.make("bert", width=WIDTH, layers=LAYERS, remat=True)
  results = []
  for foreign in (bert, other):
    params = adapted(foreign, name, up=True, layers=range(LAYERS))
    params = pelt.lora(rank=2, targets=("query", "value")).init(
      jax.random.key(1), params, foreign.sites(families.BERT_ROLES)
    )
    trainable, frozen = pelt.partition(families.moved(params))
    weights = drawn(9, 2, 7, WIDTH)
    loss = lambda p, f=foreign, w=weights: (f.out(p) * w).sum()
    results.append(pelt.value_and_grad(loss)(trainable, frozen))
  text = str(jax.make_jaxpr(lambda p: other.out(p))(pelt.combine(trainable, frozen)))
  assert text.count("remat") + text.count("checkpoint") >= LAYERS
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(results[1][1]))
  # Sums of 200 terms of order 1 in float32, in another order.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


def test_forgetting_the_bypass_raises(bert):
  params = adapted(bert, "pfeiffer", up=True)
  with pytest.raises(RuntimeError, match="pelt.bypass"):
    bert.out(params, bypass=False)
  with pytest.raises(ValueError, match="cannot be merged"):
    pelt.merge(params)


def test_two_nodes_at_one_site_run_in_order(bert):
  params, sites = bert.params, bert.sites()
  at = f"{LAST}/output/dropout"
  for seed in (0, 20):
    params = add_bypass(params, sites, at, nodes.After(bottleneck(seed)))
  swapped = bert.params
  for seed in (20, 0):
    swapped = add_bypass(swapped, sites, at, nodes.After(bottleneck(seed)))
  once = adapted(bert, "houlsby", up=True)
  values = [bert.out(p) for p in (params, swapped, once)]
  assert min(jnp.abs(values[0] - v).max() for v in values[1:]) > 1e-3


def test_dropout_of_a_node_leaves_the_model_s_own_masks(bert):
  lora = pelt.lora(rank=2, targets=("query", "value"), dropout=0.5)
  params = lora.init(jax.random.key(1), bert.params, bert.sites(families.BERT_ROLES))
  apply = pelt.bypass(bert.module.apply)
  train = dict(deterministic=False, rngs={"dropout": jax.random.key(2)})
  start = apply({"params": params}, *bert.args, **train)[0]
  np.testing.assert_array_equal(
    start, bert.module.apply({"params": bert.params}, *bert.args, **train)[0]
  )
  params = families.moved(params)
  dropped, kept = (
    apply({"params": params}, *bert.args, **train, train_nodes=t)[0] for t in (True, False)
  )
  assert jnp.abs(dropped - kept).max() > 1e-3


class DrawsAKey(Bypass):
  """Takes a random key before the module does, and changes nothing."""

  scale: Any = own()

  def __call__(self, call, *args, **kwargs):
    noise = jax.random.normal(call.rng(), ())
    return call.next(*args, **kwargs) + 0.0 * noise * self.scale


def test_keys_of_a_node_do_not_advance_the_dropout_it_wraps(bert):
  params = add_bypass(bert.params, bert.sites(), f"{LAST}/output/dropout", DrawsAKey(jnp.ones(())))
  train = dict(deterministic=False, rngs={"dropout": jax.random.key(2)})
  wanted = bert.module.apply({"params": bert.params}, *bert.args, **train)[0]
  found = pelt.bypass(bert.module.apply)({"params": params}, *bert.args, **train)[0]
  np.testing.assert_array_equal(found, wanted)
