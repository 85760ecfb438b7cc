"""LoRA-FA: LoRA with a frozen a."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from tests.test_core.tiny import values


def made(method, x):
  model = nn.Dense(3, use_bias=False)
  params = {"kernel": values((4, 3), 0)}
  return model, method.init(jax.random.key(1), params, pelt.sites(model, x))


def test_it_is_a_lora_of_which_b_alone_trains(tmp_path):
  x, options = values((2, 4), 1), dict(rank=2, alpha=6, targets="kernel", dropout=0.5)
  model, params = made(pelt.lora_fa(**options), x)
  _, other = made(pelt.lora(**options), x)
  node, lora = params["kernel"], other["kernel"]
  assert isinstance(node, nodes.LoraFaWeight)
  np.testing.assert_array_equal(node.a, lora.a)  # drawn alike
  node, lora = (n.replace(b=values((2, 3), 2)) for n in (node, lora))
  rngs = {"dropout": jax.random.key(3)}
  run = lambda n: pelt.bypass(model.apply)(
    {"params": {"kernel": n}}, x, train_nodes=True, rngs=rngs
  )
  np.testing.assert_array_equal(run(node), run(lora))
  trainable, frozen = pelt.partition({"kernel": node})
  assert [v.shape for v in jax.tree.leaves(trainable)] == [(2, 3)]
  grads = pelt.value_and_grad(lambda p: jnp.sum(run(p["kernel"]) ** 2))(trainable, frozen)[1]
  want = jax.grad(lambda n: jnp.sum(run(n) ** 2))(lora).b
  np.testing.assert_allclose(grads["kernel"].b, want, rtol=1e-6)
  # a is the method's own: files hold it, jobs that are mapped have each their own
  assert pelt.partition({"kernel": node}, extra=True)[1]["kernel"].a is node.a
  pelt.save(tmp_path, {"kernel": node})
  loaded = pelt.load(tmp_path, {"kernel": values((4, 3), 0)})["kernel"]
  np.testing.assert_array_equal(loaded.a, node.a)
  counts = pelt.count({"kernel": node})
  assert (counts.trainable, counts.changed, counts.rank) == (6, 12, 2)


def test_tables_are_refused():
  model, ids = nn.Embed(11, 4), jnp.array([1])
  base = model.init(jax.random.key(0), ids)["params"]
  with pytest.raises(ValueError, match="lora_fa: 'embedding' is a table"):
    pelt.lora_fa(2, targets="embedding").init(jax.random.key(1), base, pelt.sites(model, ids))
