"""The layers of DeepMind's `gemma`, unmodified: einsum kernels of more than two axes."""

import importlib

import jax
import numpy as np
import pytest
from flax import linen as nn

import pelt_jax as pelt
from tests.support import require

pytestmark = pytest.mark.parity
require("gemma")
layers = importlib.import_module("gemma.gm.nn._layers")  # the rest of it needs TensorFlow


class Attention(nn.Module):
  """Keys and values as gemma projects them, normed."""

  @nn.compact
  def __call__(self, x):
    k, v = layers.Einsum((2, 3, 8, 4), name="kv_einsum")("...SD,CKDH->C...SKH", x)
    return layers.RMSNorm(name="norm")(k + v)


@pytest.fixture
def model():
  module, x = Attention(), jax.random.normal(jax.random.key(0), (2, 5, 8))
  return module, module.init(jax.random.key(1), x)["params"], x


def test_unknown_modules_materialize_their_nodes(model):
  module, params, x = model
  tuned = pelt.train(("kv_einsum", "norm")).init(jax.random.key(2), params, pelt.sites(module, x))
  assert pelt.count(tuned).trainable == 2 * 3 * 8 * 4 + 4
  wanted = module.apply({"params": params}, x)
  np.testing.assert_array_equal(pelt.bypass(module.apply)({"params": tuned}, x), wanted)


def test_lora_on_a_kernel_of_four_axes(model):
  module, params, x = model
  adapted = pelt.lora(rank=2, targets="kv_einsum").init(
    jax.random.key(2), params, pelt.sites(module, x)
  )
  wanted = module.apply({"params": params}, x)
  np.testing.assert_array_equal(pelt.bypass(module.apply)({"params": adapted}, x), wanted)
