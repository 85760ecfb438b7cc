import jax
import numpy as np
import pytest

import pelt_jax as pelt
from tests.test_models.helpers import (
  ENCODERS,
  PAD,
  build,
  built,
  close,
  padded,
  tokens,
  trees_close,
)


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_changes_nothing(name):
  model, params = built(name, "classification")
  apply = jax.jit(model.apply)
  ids, lengths = tokens(2, 9), [9, 5]
  batch, mask = padded(ids, lengths, "right")
  single = [apply({"params": params}, ids[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
  close(apply({"params": params}, batch, mask), np.stack(single), 2e-6)
  other = np.where(mask == 1, batch, 7)  # what stands under the mask does not matter
  if name == "bert":  # RoBERTa counts positions by the padding id, as its reference does
    close(apply({"params": params}, other, mask), np.stack(single), 2e-6)


def test_packed_segments_equal_separate_rows():
  model, params = built("bert", "tagging")
  a, b = tokens(1, 4, seed=1), tokens(1, 5, seed=2)
  packed = np.concatenate([a, b, [[PAD]]], axis=1)
  segments, positions = np.array([[1] * 4 + [2] * 5 + [0]]), np.array([[*range(4), *range(5), 0]])
  out = model.apply({"params": params}, packed, None, positions, segment_ids=segments)
  close(out[:, :4], model.apply({"params": params}, a), 2e-6)
  close(out[:, 4:9], model.apply({"params": params}, b), 2e-6)


def test_dropout_acts_only_when_told():
  model, params = built("bert", "classification")
  ids = tokens(2, 6)
  apply = jax.jit(model.apply, static_argnames="deterministic")
  run = lambda s, d: apply(
    {"params": params}, ids, deterministic=d, rngs={"dropout": jax.random.key(s)}
  )
  np.testing.assert_array_equal(run(0, True), apply({"params": params}, ids))
  np.testing.assert_array_equal(run(0, False), run(0, False))
  assert (np.asarray(run(0, False)) != np.asarray(run(1, False))).any()


PER_LAYER = {
  "query", "key", "value", "attention_out", "ffn_in", "ffn_out", "ffn", "attention",
  "attention_heads", "attention_block", "attention_sum", "ffn_sum", "layer",
}  # fmt: skip


@pytest.mark.parametrize(("name", "task", "head"), [
  ("bert", "classification", ["classifier"]),
  ("roberta", "classification", ["classifier/dense", "classifier/out_proj"]),
  ("roberta", "tagging", ["classifier"]),
  ("bert", "encoder", []),
  ("bert", "mlm", ["cls/predictions", "cls/predictions/transform/LayerNorm",
                   "cls/predictions/transform/dense"]),
  ("roberta", "mlm", ["lm_head", "lm_head/dense", "lm_head/layer_norm"]),
])  # fmt: skip
@pytest.mark.parametrize("scan", [False, True])
def test_every_role_names_its_modules(name, task, head, scan):
  found: dict[str, list] = {}
  for site in pelt.sites(build(name, task, scan=scan), tokens(1, 4)):
    if site.kind == "call":
      for served in site.roles:
        found.setdefault(served.role, []).append(site.path)
  layers = 1 if scan else 3
  assert {r: len(found[r]) for r in PER_LAYER} == dict.fromkeys(PER_LAYER, layers)
  assert len(found["norm"]) == 1 + 2 * layers and len(found["embedding"]) == 1
  assert sorted(found.get("head", [])) == head
  assert not any("attention/output" in p for p in found["ffn_out"] + found["ffn"])


@pytest.mark.parametrize("name", ENCODERS)
def test_one_position_of_a_masked_language_model(name):
  model, params = built(name, "mlm")
  ids, at = tokens(2, 6), np.array([4, 1])
  whole = model.apply({"params": params}, ids)
  assert whole.shape == (2, 6, 97)
  close(model.apply({"params": params}, ids, at=at), whole[np.arange(2), at], 2e-6)
  outside = model.apply({"params": params}, ids, at=np.array([4, 6]))
  assert np.isfinite(outside[0]).all() and np.isnan(outside[1]).all()


def noisy(params):
  """Params whose zero initialisations are zero no more."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  new = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, new)


@pytest.mark.parametrize(
  ("name", "method"),
  [
    ("roberta", pelt.lora(rank=2)),
    pytest.param("bert", pelt.mam(3, bottleneck=4), marks=pytest.mark.parity),
    pytest.param("bert", pelt.adapter("houlsby", bottleneck=4), marks=pytest.mark.parity),
    pytest.param("bert", pelt.adapter_drop(1, bottleneck=4), marks=pytest.mark.parity),
  ],
)
def test_the_last_layer_may_compute_the_pooled_token_alone(name, method):
  """The same logits and gradients; of the last layer, queries and what follows them cost less."""
  model, base = built(name, "classification", False)
  ids, mask = padded(tokens(2, 9), [9, 5], "right")
  sites = pelt.sites(model, ids, mask)
  params = noisy(method.init(jax.random.key(0), base, sites))

  def run(model):
    apply = pelt.bypass(model.apply)
    loss = lambda p: jax.numpy.sum(apply({"params": p}, ids, mask) ** 3)
    compiled = jax.jit(pelt.value_and_grad(loss)).lower(*pelt.partition(params)).compile()
    return compiled(*pelt.partition(params)), compiled.cost_analysis()["flops"]

  found, few = run(model.clone(pooled_only=True))
  wanted, many = run(model)
  trees_close(found, wanted, 1e-5)
  assert few < 0.9 * many


def test_what_cannot_compute_the_pooled_token_alone_says_so():
  model, base = built("bert", "classification", False)
  ids, mask = padded(tokens(2, 9), [9, 5], "right")
  params = pelt.unipelt().init(jax.random.key(0), base, pelt.sites(model, ids, mask))
  with pytest.raises(ValueError, match="of which a model with pooled_only=True computes one token"):
    pelt.bypass(model.clone(pooled_only=True).apply)({"params": params}, ids, mask)
  with pytest.raises(ValueError, match="pooled_only=True needs scan=False"):
    build("bert", "classification", scan=True).clone(pooled_only=True).init(jax.random.key(0), ids)
