"""Layers of DeepMind's `gemma`, unmodified: kernels of more axes than two, and their equations."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pelt_jax as pelt
from pelt_jax._node import Bypass, own
from pelt_jax._transform import add_bypass
from tests.support import require
from tests.test_foreign.counting import check_step

pytestmark = pytest.mark.parity
require("gemma")
layers = importlib.import_module("gemma.gm.nn._layers")  # the rest of it needs TensorFlow


@pytest.fixture
def rule():
  """The rule of gemma's layer, for one test: without it, kernels materialize."""
  before = dict(pelt._rules.RULES)

  @pelt.rule(layers.Einsum.__call__)
  def einsum(module, leaves, eqn, x):
    return leaves[module.weight_name].einsum(eqn, x)

  yield
  pelt._rules.RULES.clear()
  pelt._rules.RULES.update(before)


class Attention(nn.Module):
  """Projections in gemma's equations, fused (heads = kv heads) or grouped."""

  heads: int
  kv_heads: int
  width: int

  @nn.compact
  def __call__(self, x):
    d, h, n = x.shape[-1], self.width, self.heads
    if n == self.kv_heads:
      q, k, v = layers.Einsum((3, n, d, h), name="qkv_einsum")("BTD,SNDH->SBTNH", x)
    else:
      q = layers.Einsum((n, d, h), name="q_einsum")("BTD,NDH->BTNH", x)
      k, v = layers.Einsum((2, self.kv_heads, d, h), name="kv_einsum")("BSD,CKDH->CBSKH", x)
      k, v = (jnp.repeat(y, n // self.kv_heads, axis=2) for y in (k, v))
    weights = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(1.0 * h))
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
    return layers.Einsum((n, h, d), name="attn_vec_einsum")("BTNH,NHD->BTD", out)


class FeedForward(nn.Module):
  """Both products live in this module's own scope, as in gemma's checkpoints."""

  hidden: int
  transposed: bool

  @nn.compact
  def __call__(self, x):
    d, f = x.shape[-1], self.hidden
    shape = (2, f, d) if self.transposed else (2, d, f)
    gating = layers.Einsum(shape, weight_name="gating_einsum")
    nn.share_scope(self, gating)
    gate = gating("...F,NHF->...NH" if self.transposed else "...F,NFH->...NH", x)
    linear = layers.Einsum((f, d), weight_name="linear")
    nn.share_scope(self, linear)
    return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class Model(nn.Module):
  """Two blocks: grouped with a plain gate, fused with a transposed one."""

  width: int = 4
  hidden: int = 24

  @nn.compact
  def __call__(self, x):
    for i, (kv, transposed) in enumerate(((1, False), (4, True))):
      h = layers.RMSNorm(name=f"pre_attention_norm_{i}")(x)
      x = x + Attention(4, kv, self.width, name=f"attn_{i}")(h)
      h = layers.RMSNorm(name=f"pre_ffw_norm_{i}")(x)
      x = x + FeedForward(self.hidden, transposed, name=f"mlp_{i}")(h)
    return x


EINSUMS = ("*_einsum", "mlp_*")


@pytest.fixture(scope="module")
def model():
  module, x = Model(), jax.random.normal(jax.random.key(0), (2, 5, 8))
  params = module.init(jax.random.key(1), x)["params"]
  # gemma's initial values of 0.01 leave nothing to see behind the residual stream
  return module, jax.tree.map(lambda p: p * 30.0, params), x


def adapted(model, method):
  module, params, x = model
  return method.init(jax.random.key(2), params, pelt.sites(module, x))


def test_sites_know_the_equations(rule, model):
  module, _, x = model
  found = {s.path: s for s in pelt.sites(module, x) if s.kind == "leaf"}
  assert found["attn_0/kv_einsum/w"].equations == ("BSD,CKDH->CBSKH",)
  assert found["attn_1/attn_vec_einsum/w"].equations == ("BTNH,NHD->BTD",)
  assert found["mlp_1/gating_einsum"].equations == ("...F,NHF->...NH",)


def test_factors_contract_what_the_equation_contracts(rule, model):
  params = adapted(model, pelt.lora(rank=2, targets=EINSUMS))
  shapes = lambda node: (node.a.shape, node.b.shape)
  assert shapes(params["attn_0"]["q_einsum"]["w"]) == ((8, 2), (2, 4, 4))
  assert shapes(params["attn_0"]["kv_einsum"]["w"]) == ((8, 2), (2, 2, 1, 4))
  assert shapes(params["attn_1"]["qkv_einsum"]["w"]) == ((8, 2), (2, 3, 4, 4))
  assert shapes(params["attn_1"]["attn_vec_einsum"]["w"]) == ((4, 4, 2), (2, 8))
  assert shapes(params["mlp_0"]["gating_einsum"]) == ((8, 2), (2, 2, 24))
  assert shapes(params["mlp_1"]["linear"]) == ((24, 2), (2, 8))


@pytest.mark.parametrize("with_rule", [True, False])
def test_identity_merge_and_gradients(request, model, with_rule):
  if with_rule:
    request.getfixturevalue("rule")
  module, params, x = model
  nodes = adapted(model, pelt.lora(rank=2, alpha=6, targets=EINSUMS))
  apply = lambda p: pelt.bypass(module.apply)({"params": p}, x)
  np.testing.assert_array_equal(apply(nodes), module.apply({"params": params}, x))

  trainable, frozen = pelt.partition(nodes)
  assert len(jax.tree.leaves(trainable)) == 2 * 9
  trainable = jax.tree.map(lambda t: t + 0.1, trainable)
  loss = lambda p: (apply(p) ** 2).mean()
  merged = lambda p: (module.apply({"params": pelt.merge(p)}, x) ** 2).mean()
  value, grads = pelt.value_and_grad(loss)(trainable, frozen)
  wanted, others = pelt.value_and_grad(merged)(trainable, frozen)
  # float32: two blocks of sums over at most 96 terms.
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(others))
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
  jax.tree.map(compare, grads, others)


def test_norms_and_kernels_train_whole(model):
  module, params, x = model
  tuned = adapted(model, pelt.train(("kv_einsum", "pre_*_norm_*")))
  assert pelt.count(tuned).trainable == 2 * 1 * 8 * 4 + 4 * 8
  wanted = module.apply({"params": params}, x)
  np.testing.assert_array_equal(pelt.bypass(module.apply)({"params": tuned}, x), wanted)


class Unnamed(nn.Module):
  """Layers that Flax names by counting."""

  @nn.compact
  def __call__(self, x):
    return layers.RMSNorm()(layers.Einsum((8, 8))("...D,DF->...F", x))


class Twice(Bypass):
  """Runs its module on its own output."""

  scale: Any = own()

  def __call__(self, call, x):
    return self.scale * call.next(call.next(x))


@pytest.mark.parametrize("with_rule", [True, False])
def test_a_node_may_run_its_module_twice(request, with_rule):
  if with_rule:
    request.getfixturevalue("rule")
  models = Attention(4, 1, 4), FeedForward(24, True), Unnamed()
  for module, at in zip(models, ("q_einsum", "linear", "Einsum_0"), strict=True):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    plain = module.init(jax.random.key(1), x)["params"]
    sites = pelt.sites(module, x)
    params = add_bypass(plain, sites, "", Twice(jnp.float32(0.5)))
    params = pelt.lora(rank=2, targets=at).init(jax.random.key(2), params, sites)
    once = lambda x, m=module, p=plain: m.apply({"params": p}, x)
    found = pelt.bypass(module.apply)({"params": params}, x)
    np.testing.assert_array_equal(found, 0.5 * once(once(x)))


def test_step_flops(rule):
  module = Model(width=192, hidden=3072)
  x = jax.ShapeDtypeStruct((8, 64, 768), jnp.float32)
  check_step(module, (x,), pelt.lora(rank=4, targets=EINSUMS), without=layers.Einsum.__call__)
