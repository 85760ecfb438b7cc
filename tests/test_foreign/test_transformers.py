"""Weight nodes in the Flax models of transformers 4.57."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests.support import require

pytestmark = pytest.mark.parity
require("flax_transformers")
from tests.test_foreign import families  # noqa: E402

TARGETS = {
  "bert": ("query", "value"),  # roles, which the test states
  "gpt2": ("attn/c_attn", "attn/c_proj", "mlp/c_fc"),  # path patterns
  "llama": ("q_proj", "v_proj", "down_proj"),
}
METHODS = {
  "lora": lambda targets: pelt.lora(rank=2, alpha=6, targets=targets),
  "lora all-linear": lambda targets: pelt.lora(rank=2, alpha=6, targets="all-linear"),
  "bitfit and lora": lambda targets: pelt.chain(
    pelt.lora(rank=2, alpha=6, targets=targets), pelt.bitfit()
  ),
}


@pytest.fixture(autouse=True)
def promotion():
  with families.promotion():
    yield


@pytest.fixture(scope="module", params=TARGETS)
def family(request):
  with families.promotion():
    roles = families.BERT_ROLES if request.param == "bert" else None
    yield families.make(request.param), roles, TARGETS[request.param], request.param


@pytest.fixture(params=METHODS)
def case(request, family):
  foreign, roles, targets, name = family
  if name == "llama" and "bitfit" in request.param:
    method = METHODS["lora"](targets)  # Llama has no biases
  else:
    method = METHODS[request.param](targets)
  return foreign, foreign.adapted(method, roles)


def test_bypass_of_a_plain_tree_changes_nothing(family):
  foreign = family[0]
  wanted = foreign.out(foreign.params, bypass=False)
  np.testing.assert_array_equal(foreign.out(foreign.params), wanted)


def test_nodes_start_as_the_identity(case):
  foreign, adapted = case
  wanted = foreign.out(foreign.params, bypass=False)
  np.testing.assert_array_equal(foreign.out(adapted), wanted)


def test_merged_bypassed_and_materialized_agree(case):
  foreign, adapted = case
  params = families.moved(adapted)
  bypassed = foreign.out(params)
  assert jnp.abs(bypassed - foreign.out(foreign.params, bypass=False)).max() > 1e-2
  # float32: three layers of sums over at most 64 terms of order 1.
  merged = pelt.merge(params)
  assert jax.tree.structure(merged) == jax.tree.structure(dict(foreign.params))
  np.testing.assert_allclose(foreign.out(merged, bypass=False), bypassed, rtol=0, atol=2e-5)
  # Without the bypass, modules see each node as its plain array.
  np.testing.assert_allclose(foreign.out(params, bypass=False), bypassed, rtol=0, atol=2e-5)


def test_gradients_reach_the_nodes_and_nothing_else(case):
  foreign, adapted = case
  trainable, frozen = pelt.partition(families.moved(adapted))
  # Not a sum of squares: BERT ends in a LayerNorm, which holds that constant.
  weights = jax.random.normal(jax.random.key(3), foreign.out(adapted).shape)
  loss = lambda params: (foreign.out(params) * weights).sum()
  _, grads = pelt.value_and_grad(loss)(trainable, frozen)
  assert jax.tree.structure(grads) == jax.tree.structure(trainable)
  names = {str(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(grads)}
  assert names <= {".a", ".b", ".value"}
  # The last layer's key and value biases aside (a key's has no effect), all matter; along the
  # gradient the loss changes as it says. Differences of float32 losses carry about 1e-3.
  norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
  step = 1e-2 / norm
  ahead, behind = (
    loss(pelt.combine(jax.tree.map(lambda x, g, s=s: x + s * step * g, trainable, grads), frozen))
    for s in (1, -1)
  )
  np.testing.assert_allclose((ahead - behind) / (2 * step), norm**2, rtol=2e-2)
  # The same through the merged params' own modules.
  plain = lambda params: (foreign.out(pelt.merge(params), bypass=False) * weights).sum()
  _, wanted = pelt.value_and_grad(plain)(trainable, frozen)
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-5 * scale), grads, wanted
  )


def test_fused_lora_on_gpt2s_transposed_kernel():
  foreign = families.make("gpt2")
  method = pelt.lora(rank=2, alpha=6, targets="c_attn", fused=((0, 2), 3))
  params = families.moved(foreign.adapted(method))
  merged = pelt.merge(params)
  np.testing.assert_allclose(
    foreign.out(merged, bypass=False), foreign.out(params), rtol=0, atol=2e-5
  )
  for layer in "012":
    get = lambda tree, n=layer: tree["transformer"]["h"][n]["attn"]["c_attn"]["kernel"]
    change = get(merged) - get(foreign.params)
    assert change.shape == (48, 16)
    np.testing.assert_array_equal(change[16:32], 0)  # the keys
    assert min(jnp.abs(change[:16]).min(), jnp.abs(change[32:]).min()) > 0


def test_targets_that_match_nothing_name_the_nearest():
  foreign = families.make("llama")
  with pytest.raises(ValueError, match="self_attn/q_proj"):
    foreign.adapted(pelt.lora(targets="q_projection"))
