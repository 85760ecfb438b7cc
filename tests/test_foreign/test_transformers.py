"""Flax models of transformers 4.57, unmodified."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests.support import require

pytestmark = pytest.mark.parity
transformers = require("flax_transformers")

TINY = dict(
  vocab_size=31,
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=3,
  num_attention_heads=2,
  max_position_embeddings=16,
)
FAMILIES = {
  "bert": (transformers.BertConfig, transformers.FlaxBertModel, TINY, ("query", "value")),
  "gpt2": (
    transformers.GPT2Config,
    transformers.FlaxGPT2LMHeadModel,
    dict(vocab_size=31, n_embd=16, n_layer=3, n_head=2, n_positions=16),
    ("attn/c_attn", "attn/c_proj"),
  ),
  "llama": (
    transformers.LlamaConfig,
    transformers.FlaxLlamaForCausalLM,
    TINY | dict(num_key_value_heads=2),
    ("q_proj", "v_proj"),
  ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def foreign(request):
  """A family's module, params, the arguments of its call and targets for LoRA."""
  config, family, sizes, targets = FAMILIES[request.param]
  # These models promote dtypes silently, as they always did.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    model = family(config(**sizes), seed=0)
    ids = jax.random.randint(jax.random.key(0), (2, 7), 0, 31)
    positions = jnp.broadcast_to(jnp.arange(7), ids.shape)
    mask = jnp.ones_like(ids)
    types = (jnp.zeros_like(ids),) if request.param == "bert" else ()
    head_mask = (None,) if request.param == "bert" else ()
    order = (ids, mask, *types, positions, *head_mask)
    yield model.module, model.params, order, targets


def out(apply, params, args):
  return jax.tree.leaves(apply({"params": params}, *args, deterministic=True))[0]


def test_bypass_of_a_plain_tree_changes_nothing(foreign):
  module, params, args, _ = foreign
  wanted = out(module.apply, params, args)
  np.testing.assert_array_equal(out(pelt.bypass(module.apply), params, args), wanted)


def test_lora_starts_as_the_identity_and_merges(foreign):
  module, params, args, targets = foreign
  adapted = pelt.lora(rank=2, alpha=6, targets=targets).init(
    jax.random.key(1), params, pelt.sites(module, *args)
  )
  apply = pelt.bypass(module.apply)
  before = out(module.apply, params, args)
  np.testing.assert_array_equal(out(apply, adapted, args), before)

  trainable, frozen = pelt.partition(adapted)
  assert len(jax.tree.leaves(trainable)) == 2 * 2 * 3  # a and b at two sites of three layers
  moved = pelt.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
  after = out(apply, moved, args)
  assert jnp.abs(after - before).max() > 1e-3
  # float32: three layers of sums over at most 64 terms of order 1.
  merged = out(module.apply, pelt.merge(moved), args)
  np.testing.assert_allclose(merged, after, rtol=0, atol=2e-5)
