"""Prefixes through the real attention core, against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax.interop._peft_saved import unguarded
from pelt_jax.models import AttentionCore
from tests.test_models.helpers import built, tokens

B, T, H, K, D, P = 2, 5, 4, 2, 8, 3  # four heads over two groups of keys
CAUSAL = np.tril(np.ones((T, T), bool))[None, None]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def inputs():
  return draw(B, T, H, D, seed=0), draw(B, T, K, D, seed=1), draw(B, T, K, D, seed=2)


def prefix():
  return draw(P, K, D, seed=3), draw(P, K, D, seed=4)


def attend(q, k, v, mask=None, bias=None, *, scale=None):
  return AttentionCore(scale=scale).apply({}, q, k, v, mask, bias)


def attend_with(keys, values, *args, scale=None, core=attend):
  """The core behind a prefix, as `bypass` runs the node."""
  call = type("Call", (), {"path": "core"})()
  call.next = lambda *a: core(*a, scale=scale)
  return nodes.Prefix(keys, values)(call, *args)


def rows(x):
  return jnp.broadcast_to(x[None], (B, *x.shape))


def scores(q, k, scale):
  """(B, H, T, S), head h against group h // 2."""
  return jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, H // K, axis=2)) * scale


def assert_close(got, want, tolerance=1e-13):
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_behind_a_prefix_is_a_mixture_of_two(biased):
  """(1 - l) Attn(q, K, V) + l Attn(q, P_k, P_v), l = sigmoid(LSE prefix - LSE text).

  T5's bias, which is the text's alone, stands inside the second LSE; T5 divides no scores.
  """
  q, k, v = inputs()
  own_k, own_v = prefix()
  bias = draw(1, H, T, T, seed=5) if biased else None
  scale = 1.0 if biased else D**-0.5
  text = scores(q, k, scale) + (bias if biased else 0.0)
  text = jax.nn.logsumexp(jnp.where(CAUSAL, text, -jnp.inf), axis=-1)
  share = jax.nn.sigmoid(jax.nn.logsumexp(scores(q, rows(own_k), scale), axis=-1) - text)
  share = jnp.moveaxis(share, 1, 2)[..., None]
  base = attend(q, k, v, CAUSAL, bias, scale=scale)
  alone = attend(q, rows(own_k), rows(own_v), scale=scale)
  got = attend_with(own_k, own_v, q, k, v, CAUSAL, bias, scale=scale)
  assert_close(got, (1 - share) * base + share * alone)
  assert float(share.std()) > 0.1


def test_keys_that_no_query_looks_at_leave_the_base():
  q, k, v = inputs()
  q = q.at[..., 0].set(1.0)  # every query has the same share of the first axis
  own_k, own_v = prefix()
  far = own_k.at[..., 0].set(-1e5)
  assert_close(attend_with(far, own_v, q, k, v, CAUSAL), attend(q, k, v, CAUSAL), 1e-15)
  assert np.abs(attend_with(own_k, own_v, q, k, v, CAUSAL) - attend(q, k, v, CAUSAL)).max() > 0.1


def test_a_row_twice_is_one_whose_logit_is_ln_2_higher():
  q, k, v = inputs()
  q = q.at[..., 0].set(1.0)
  own_k, own_v = prefix()
  twice = [jnp.concatenate([x, x[:1]]) for x in (own_k, own_v)]
  higher = own_k.at[0, :, 0].add(np.log(2) * D**0.5)
  got = attend_with(*twice, q, k, v, CAUSAL)
  assert_close(got, attend_with(higher, own_v, q, k, v, CAUSAL))
  assert np.abs(got - attend_with(own_k, own_v, q, k, v, CAUSAL)).max() > 0.01


def test_gradients_of_keys_and_values_in_closed_form():
  """dP_v = sum a g, dP_k = sum a (g . (v_p - o)) q / sqrt(D), over rows, tokens, heads."""
  q, k, v = inputs()
  g = draw(B, T, H, D, seed=6)
  loss = lambda p: jnp.sum(attend_with(*p, q, k, v, CAUSAL) * g)
  got_k, got_v = jax.grad(loss)(prefix())
  own_k, own_v = prefix()
  whole = jnp.concatenate([scores(q, rows(own_k), D**-0.5), scores(q, k, D**-0.5)], axis=-1)
  mask = np.concatenate([np.ones((1, 1, T, P), bool), CAUSAL], axis=-1)
  weights = jax.nn.softmax(jnp.where(mask, whole, -jnp.inf), axis=-1)[..., :P]
  out = attend_with(own_k, own_v, q, k, v, CAUSAL)
  wide = jnp.repeat(own_v, H // K, axis=1)  # (P, H, D)
  along = jnp.einsum("bthd,phd->bhtp", g, wide) - jnp.einsum("bthd,bthd->bht", g, out)[..., None]
  by_head_v = jnp.einsum("bhtp,bthd->phd", weights, g)
  by_head_k = jnp.einsum("bhtp,bthd->phd", weights * along, q) * D**-0.5
  for got, want in ((got_k, by_head_k), (got_v, by_head_v)):
    assert_close(got, want.reshape(P, K, H // K, D).sum(axis=2))
    assert np.abs(got).max() > 0.1


def test_a_bias_gets_zero_columns_and_stays_as_it_is_for_the_text():
  q, k, v = inputs()
  bias = draw(1, H, T, T, seed=5)
  seen = {}

  def core(q, k, v, mask, bias, scale):
    seen.update(mask=mask, bias=bias)
    return attend(q, k, v, mask, bias, scale=scale)

  own_k, own_v = prefix()
  out = attend_with(own_k, own_v, q, k, v, CAUSAL, bias, scale=1.0, core=core)
  np.testing.assert_array_equal(seen["bias"][..., P:], bias)
  np.testing.assert_array_equal(seen["bias"][..., :P], np.zeros((1, H, T, P)))
  np.testing.assert_array_equal(seen["mask"][..., P:], CAUSAL)
  assert np.asarray(seen["mask"][..., :P]).all()
  order = np.array([2, 0, 1])
  turned = attend_with(own_k[order], own_v[order], q, k, v, CAUSAL, bias, scale=1.0)
  assert_close(turned, out)


def test_a_keys_bias_trains_against_the_prefix():
  """Added to a prefix's keys too it would change nothing: its gradient is minus theirs, summed."""
  with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm
    model, base = built("bert", "classification", scan=False)
    model = model.clone(dtype=jnp.dtype("float64"))
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), base)
    ids = tokens(2, 6)
    sites = pelt.sites(model, ids)
    method = pelt.chain(pelt.bitfit("key"), pelt.prefix_tuning(P, reparametrize=False))
    params = method.init(jax.random.key(1), base, sites)
    loss = lambda p: jnp.sum(jnp.sin(pelt.bypass(model.apply)({"params": p}, ids)))
    grads = jax.jit(pelt.value_and_grad(loss))(*pelt.partition(params))[1]
  for layer in grads["bert"]["encoder"]["layer"].values():
    inner = layer["attention"]["self"]
    bias, keys = unguarded(inner["key"]["bias"]).value, inner["core"]["bypass"].keys
    assert_close(bias, -keys.sum(axis=0).reshape(-1), 1e-12)
    assert np.abs(bias).max() > 1e-3
