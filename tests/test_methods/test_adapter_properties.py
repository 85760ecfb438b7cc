"""What holds of every method that rests on adapters: bfloat16, vmap over trained arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

PREFIX = {"length": 2, "hidden": 5}
METHODS = {
  "houlsby": pelt.adapter("houlsby", bottleneck=3),
  "pfeiffer": pelt.adapter("pfeiffer", bottleneck=3),
  "learned": pelt.adapter("parallel", bottleneck=3, scaling="learned"),
  "heads": pelt.adapter("parallel", bottleneck=3, targets="attention_heads"),
  "robust": pelt.adapter_drop(0, robust=True, bottleneck=3),
  "mam": pelt.mam(bottleneck=3, **PREFIX),
  "unipelt": pelt.unipelt(rank=2, bottleneck=3, **PREFIX),
  "gated": pelt.design("relu", "parallel", "ffn", "gated", size=3),
}
SHORT = ("houlsby", "unipelt")
table = pytest.mark.parametrize(
  "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.parity) for n in METHODS]
)
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2])


def made(name, dtype):
  model, base = built("bert", "encoder")
  model = model.clone(dtype=dtype)
  base = jax.tree.map(lambda x: x.astype(dtype), base)
  sites = pelt.sites(model, tokens(2, 6), MASK)
  return model, base, moved(METHODS[name].init(jax.random.key(0), base, sites))


def run(model, params):
  return pelt.bypass(model.apply)({"params": params}, tokens(2, 6), MASK)


@table
def test_bfloat16_stays_and_computes_nearly_the_same(name):
  model, base, params = made(name, "bfloat16")
  # Numbers, one per layer, such as a scaling or a length, stay float32.
  arrays = [x for x in jax.tree.leaves(params) if x.ndim > 1]
  assert {str(x.dtype) for x in arrays} == {"bfloat16"}
  got = run(model, params)
  assert got.dtype == jnp.bfloat16
  exact = lambda tree: jax.tree.map(
    lambda x: x.astype("float32") if x.dtype == jnp.bfloat16 else x, tree
  )
  wide = model.clone(dtype="float32")
  want, bare = run(wide, exact(params)), run(wide, exact(base))
  # Eight bits of mantissa through three layers; the method changes far more.
  assert jnp.abs(got.astype("float32") - want).mean() < 0.02 * jnp.abs(want).mean()
  assert jnp.abs(want - bare).mean() > 0.05 * jnp.abs(want).mean()


@table
def test_one_program_runs_several(name):
  with jax.enable_x64(True):
    model, _, params = made(name, "float64")
    trainable, extra, base = pelt.partition(params, extra=True)
    both = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), trainable)
    one = lambda t: run(model, pelt.combine(t, extra, base))
    got = jax.jit(jax.vmap(one))(both)
    for i, factor in enumerate((1.0, 1.5)):
      close(got[i], jax.jit(one)(jax.tree.map(lambda x, f=factor: f * x, trainable)), 1e-12)
    assert jnp.abs(got[0] - got[1]).max() > 1e-3
