"""UniPELT within a budget: exact sizes by hand, never over it, the smallest, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes
from pelt_jax._walk import every_node
from tests.test_models.helpers import built, tokens

LONG = pytest.mark.parity

L, D = 3, 32
PRICE = {"rank": L * 4 * D, "length": L * 2 * D, "bottleneck": L * (2 * D + 1)}  # of one more
FIXED = L * (4 * (D + 1) + D)  # gates, and the bias of each adapter's output


def sized(budget, **options):
  """The sizes that a budget gives on the tiny BERT, and what they store."""
  model, base = built("bert", "classification")
  sites = pelt.sites(model, tokens(2, 6))
  method = pelt.chain(pelt.unipelt_within(budget, **options), pelt.train("head"))
  params = jax.eval_shape(lambda p: method.init(jax.random.key(1), p, sites), base)
  found = {}
  for node in every_node(jax.eval_shape(pelt.fold, params)):
    if isinstance(node, nodes.LoraWeight):
      found["rank"] = node.a.shape[-1]
    elif isinstance(node, nodes.Prefix):
      found["length"] = node.keys.shape[-3]
    elif isinstance(node, nodes.Bottleneck):
      found["bottleneck"] = node.down.shape[-1]
  return found, pelt.count(params, sites).stored


def test_sizes_by_hand():
  """All ones are the start; then the smallest share of 8, 10 and 12 grows while it fits."""
  options = {"length": 10, "rank": 8, "bottleneck": 12}
  least = FIXED + sum(PRICE.values())
  assert sized(least, **options) == ({"rank": 1, "length": 1, "bottleneck": 1}, least)
  # Shares 1/8, 1/10, 1/12: first the bottleneck, then the length, then the rank, in turn.
  second = least + PRICE["bottleneck"]
  assert sized(second, **options) == ({"rank": 1, "length": 1, "bottleneck": 2}, second)
  assert sized(second - 1, **options)[0] == {"rank": 1, "length": 2, "bottleneck": 1}  # it is less
  third = second + PRICE["length"]
  assert sized(third, **options) == ({"rank": 1, "length": 2, "bottleneck": 2}, third)
  # 2/12 and 2/10 against 1/8: the rank is next, and nothing smaller takes its place in between.
  fourth = third + PRICE["rank"]
  assert sized(fourth, **options) == ({"rank": 2, "length": 2, "bottleneck": 2}, fourth)


@LONG
def test_what_was_there_before_does_not_count():
  model, base = built("bert", "encoder")
  sites = pelt.sites(model, tokens(2, 6))
  least = FIXED + sum(PRICE.values())
  method = pelt.chain(pelt.lora(3, targets="ffn_out"), pelt.unipelt_within(least))
  params = jax.eval_shape(lambda p: method.init(jax.random.key(1), p, sites), base)
  assert pelt.count(params).stored == least + L * 3 * (D + 48)


@LONG
def test_never_over_the_budget_nor_short_of_what_fits():
  most = {"length": 4, "rank": 2, "bottleneck": 6}
  full = FIXED + sum(PRICE[n] * most[n] for n in most)
  for budget in (1500, 1900, full - 1, full, 10 * full):
    sizes, stored = sized(budget, **most)
    assert stored == FIXED + sum(PRICE[n] * sizes[n] for n in sizes) <= budget
    room = budget - stored
    assert all(PRICE[n] > room for n in sizes if sizes[n] < most[n])
    assert (sizes == most) == (budget >= full)


@LONG
def test_a_large_budget_is_unipelt():
  model, base = built("bert", "encoder")
  sites = pelt.sites(model, tokens(2, 6))
  for options in ({}, {"parts": ("prefix", "adapter"), "reduction": 8}):
    methods = pelt.unipelt_within(10**9, hidden=7, **options), pelt.unipelt(hidden=7, **options)
    got, want = (m.init(jax.random.key(1), base, sites) for m in methods)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@LONG
def test_bert_base_at_a_tenth():
  config = {"model_type": "bert", "vocab_size": 7, "max_position_embeddings": 8}
  config |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
  model = models.from_config(config, task="encoder", scan=True)
  ids = jnp.zeros((1, 4), jnp.int32)
  base = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  sites = pelt.sites(model, ids)
  method = pelt.unipelt_within(141_067)  # a tenth of 1,410,672
  stored = pelt.count(
    jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites), base)
  ).stored
  # 46,128 of gates and biases; length 1 and rank 1, since those are 55,296; bottlenecks of 2.
  assert stored == 36_912 + 12 * 768 + 18_432 + 36_864 + 2 * 12 * 1537


def test_a_budget_under_the_smallest_names_it():
  least = FIXED + sum(PRICE.values())
  with pytest.raises(
    ValueError, match=f"rank=1, length=1, bottleneck=1, stores {least} numbers; give it at least"
  ):
    sized(least - 1)
  with pytest.raises(ValueError, match=f"length=1, stores {L * (2 * D + D + 1)} numbers"):
    sized(10, parts=("prefix",))


@pytest.mark.parametrize(("budget", "options", "match"), [
  (0, {}, "budget must be a whole number"),
  (1000, {"rank": 0}, "rank"),
  (1000, {"parts": ()}, "parts must be some of"),
  (1000, {"bottleneck": 4, "reduction": 2}, "give one of them"),
])  # fmt: skip
def test_bad_options(budget, options, match):
  with pytest.raises(ValueError, match=match):
    pelt.unipelt_within(budget, **options)
