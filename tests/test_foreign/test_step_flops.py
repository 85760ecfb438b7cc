"""A step on transformers' Flax models computes no frozen kernel's gradient."""

import jax
import jax.numpy as jnp
import pytest

import pelt_jax as pelt
from tests.support import require

pytestmark = pytest.mark.parity
require("flax_transformers")
from tests.test_foreign import families  # noqa: E402
from tests.test_foreign.counting import check_step  # noqa: E402

# Width 1024, as in BERT-large: the elementwise share falls with the width, and BERT's exact GELU
# alone takes 1 % of the products at 768.
BATCH, LENGTH = 8, 64  # short: softmax and masks grow with the square of the length
TABLE = 128  # Llama's table of angles has max_position_embeddings columns, whatever the heads


@pytest.fixture(autouse=True)
def promotion():
  with families.promotion():
    yield


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_step_flops(name):
  module = families.module(name, width=1024, layers=2, heads=16, length=TABLE)
  ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
  args = (ids, ids, ids, ids, None) if name == "bert" else (ids, ids, ids)
  targets = {"bert": ("query", "value"), "gpt2": "c_attn", "llama": ("q_proj", "v_proj")}[name]
  ratio = check_step(
    module,
    args,
    pelt.lora(rank=8, targets=targets),
    without=families.FlaxConv1D.__call__ if name == "gpt2" else None,
    roles=families.BERT_ROLES if name == "bert" else None,
    deterministic=True,
  )
  assert ratio < 2.1
