"""Fusions with the most used adapters alone: usage, the formula, layers of their own, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes, training
from pelt_jax._transform import add_bypass
from tests.test_methods.test_adapter_fusion import NAMES, fused, fusions, tasks, with_fields
from tests.test_models.helpers import built, close, padded, tokens

LONG = pytest.mark.parity
PLACE = "encoder/layer/output/LayerNorm"
# A scan's three layers keep other adapters each; in the last two are used alike.
USAGE = {PLACE: np.array([[0.3, 0.2, 0.5], [0.1, 0.7, 0.2], [0.3, 0.3, 0.3]])}
KEPT = [[0, 2], [1, 2], [0, 1]]


class Call:
  """What a branch asks of its Call."""

  def __init__(self):
    self.seen = {}

  def salt(self, number):
    return self

  def record(self, name, value):
    self.seen[name] = value


def by_hand(d=4, m=3, n=3):
  """A fusion in float64, as a params tree, and x."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape))
  members = nodes.Bottleneck(array(n, d, m), array(n, m), array(n, m, d), array(n, d), None)
  matrices = (array(d, d), array(d), array(d, d), array(d), array(d, d))
  fusion = nodes.Fusion(members, *matrices, names=NAMES, regularization=0.5)
  return {"ffn": {"bypass": nodes.After(fusion)}}, array(2, 5, d)


def test_usage_is_the_mean_over_real_tokens():
  first = np.array([[[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]])
  second = np.array([[[0.25, 0.75], [9.0, 9.0], [9.0, 9.0]]])
  records = [({"a": {"fusion": first}, "b": {"fusion": np.stack([first, first[..., ::-1]])}}, None)]
  # Four real tokens in all, the three of the first batch and one of the second.
  records.append(({"a": {"fusion": second}, "b": {"fusion": np.stack([second] * 2)}}, [[1, 0, 0]]))
  usage = pelt.fusion_usage(iter(records))
  np.testing.assert_array_equal(usage["a"], [1.75 / 4, 2.25 / 4])
  np.testing.assert_array_equal(usage["b"], [[1.75 / 4, 2.25 / 4], [1.75 / 4, 2.25 / 4]])
  twice = ({"a": {"fusion": (first, second)}}, None)  # a module that was called twice
  np.testing.assert_array_equal(pelt.fusion_usage([twice])["a"], [19.75 / 6, 20.25 / 6])


def test_softmax_over_what_is_left():
  """The kept weights over their sum; Q, K, V untouched; pruned again, names follow."""
  with jax.enable_x64(True):
    params, x = by_hand()
    fusion, call = params["ffn"]["bypass"].branch, Call()
    fusion(call, x)
    weights = np.asarray(call.seen["fusion"])[..., [0, 2]]
    weights /= weights.sum(-1, keepdims=True)
    m, value = jax.tree.map(np.asarray, (fusion.members, fusion.value))
    h = np.maximum(np.asarray(x)[None] @ m.down[:, None] + m.down_bias[:, None, None], 0)
    z = (h @ m.up[:, None] + m.up_bias[:, None, None])[[0, 2]]
    want = np.einsum("btn,nbtd->btd", weights, z) @ value
    pruned = pelt.prune_fusion(params, {"ffn": [0.4, 0.1, 0.2]}, keep=2)
    small = pruned["ffn"]["bypass"].branch
    close(small(call, x), want, 1e-12)
    close(call.seen["fusion"], weights, 1e-12)
    for name in ("query", "query_bias", "key", "key_bias", "value"):
      np.testing.assert_array_equal(getattr(small, name), getattr(fusion, name))
    assert small.remaining == ("sst2", "wnut") and fusion.remaining == NAMES
    assert small.penalty() == fusion.penalty() > 0
    last = pelt.prune_fusion(pruned, {"ffn": [0.1, 0.9]}, keep=1)["ffn"]["bypass"].branch
    assert last.remaining == ("wnut",)
    close(last(call, x), z[1] @ value, 1e-12)  # one adapter: its own output


def test_an_adapter_without_weight_is_not_missed():
  """Its score is -1000, so its weight is 0; N kept of N changes nothing at all."""
  with jax.enable_x64(True):
    params, x = by_hand()
    fusion = params["ffn"]["bypass"].branch
    members = fusion.members.replace(
      up=fusion.members.up.at[1].set(0), up_bias=fusion.members.up_bias.at[1].set(-250.0)
    )
    ones, d = jnp.ones(4), 4
    fusion = fusion.replace(
      members=members, query=jnp.zeros((d, d)), query_bias=ones, key=jnp.eye(d), key_bias=0 * ones
    )
    params, call = {"ffn": {"bypass": nodes.After(fusion)}}, Call()
    want = fusion(call, x)
    usage = {"ffn": jnp.mean(call.seen["fusion"], (0, 1))}
    assert usage["ffn"][1] == 0.0
    pruned = pelt.prune_fusion(params, usage, keep=2)["ffn"]["bypass"].branch
    np.testing.assert_allclose(pruned(call, x), want, rtol=0, atol=1e-13)
    same = pelt.prune_fusion(params, usage, keep=3)
    assert jax.tree.structure(same) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def stacked():
  """A fused model of scanned layers, pruned to two adapters by `USAGE`."""
  model, params, members, apply = fused()
  pruned = jax.jit(lambda: pelt.prune_fusion(params, USAGE, keep=2))()
  return model, params, pruned, members, apply


def test_stacked_layers_keep_their_own():
  """Each layer's members, their names, labels and counts."""
  _, params, pruned, members, _ = stacked()
  ((_, branch),) = fusions(pruned).items()
  names = tuple(tuple(NAMES[i] for i in row) for row in KEPT)
  assert branch.remaining == names
  for layer, row in enumerate(KEPT):
    for i, number in enumerate(row):
      node = members[NAMES[number]]["encoder"]["layer"]["output"]["LayerNorm"]["bypass"]
      np.testing.assert_array_equal(branch.members.down[layer, i], node.branch.down[layer])
  (before,), (after,) = (fusions(pelt.labels(p)).values() for p in (params, pruned))
  assert (after.query, after.members.down, after.kept) == ("trainable", "frozen", "frozen")
  assert jax.tree.leaves(before.replace(kept="frozen")) == jax.tree.leaves(after)
  assert pelt.count(pruned).trainable == pelt.count(params).trainable
  assert pelt.count(pruned).stored < pelt.count(params).stored


@LONG
def test_one_program_for_all_usages_scan_is_loop_files_and_training(tmp_path):
  model, params, pruned, _, apply = stacked()
  ids, compiled = tokens(2, 6), []

  @jax.jit
  def run(used):
    compiled.append(1)
    small = pelt.prune_fusion(params, {PLACE: used}, keep=2)
    return apply({"params": small}, ids, record="fusion")

  (out, seen), (other, _) = run(USAGE[PLACE]), run(USAGE[PLACE][::-1])
  assert len(compiled) == 1 and float(jnp.abs(out - other).max()) > 1e-3
  assert seen[PLACE]["fusion"].shape == (3, 2, 6, 2)
  np.testing.assert_allclose(seen[PLACE]["fusion"].sum(-1), 1.0, rtol=1e-6)
  close(jax.jit(apply)({"params": pruned}, ids), out, 1e-6)
  at = [f"encoder/layer/{i}/output/LayerNorm" for i in range(3)]
  usage = {place: USAGE[PLACE][i] for i, place in enumerate(at)}
  small = pelt.prune_fusion(models.to_looped(params, model), usage, keep=2)
  jax.tree.map(np.testing.assert_array_equal, small, models.to_looped(pruned, model))
  assert fusions(small)[f"{at[1]}/bypass"].remaining == ("trec", "wnut")
  plain = jax.jit(pelt.bypass(model.clone(scan=False).apply))
  close(plain({"params": small}, ids), out, 5e-6)
  pelt.save(tmp_path, pruned)
  loaded = pelt.load(tmp_path, built("bert", "encoder")[1])
  assert jax.tree.structure(loaded) == jax.tree.structure(pruned)
  jax.tree.map(np.testing.assert_array_equal, loaded, pruned)
  loss = lambda apply, params, batch, key: jnp.mean(apply({"params": params}, ids) ** 2)
  train = training.train_step(apply, loss, optax.adam(1e-2))
  trainable, frozen, state = train.init(pruned)
  new, _, _ = jax.jit(train.step)(trainable, frozen, state, {"ids": ids}, jax.random.key(0))
  ((_, branch),) = fusions(pruned).items()
  assert float(jnp.abs(fusions(new).popitem()[1].query - branch.query).max()) > 1e-3
  after = fusions(pelt.combine(new, frozen)).popitem()[1]
  jax.tree.map(np.testing.assert_array_equal, after.members, branch.members)


@LONG
def test_usage_of_a_model_over_batches():
  """Recorded under a scan with padding: padding counts nothing; what is used most is kept."""
  _, params, _, apply = fused()
  params = with_fields(params, query=lambda q: q * 5)
  batches = [padded(tokens(2, 6, seed), [6, 4 - seed], "right") for seed in range(2)]
  run = jax.jit(lambda ids, mask: apply({"params": params}, ids, mask, record="fusion")[1])
  usage = pelt.fusion_usage((run(ids, mask), mask) for ids, mask in batches)
  assert usage[PLACE].shape == (3, 3)
  np.testing.assert_allclose(usage[PLACE].sum(-1), 1.0, rtol=1e-6)
  values = [(np.asarray(run(*b)[PLACE]["fusion"]), b[1].astype(bool)) for b in batches]
  want = np.concatenate([v[:, m] for v, m in values], 1).mean(1)
  np.testing.assert_allclose(usage[PLACE], want, rtol=1e-6)
  pruned = pelt.prune_fusion(params, usage, keep=1)
  ((_, branch),) = fusions(pruned).items()
  assert branch.remaining == tuple((NAMES[i],) for i in want.argmax(-1))
  # Padding that is garbage moves nothing.
  other = [(np.where(mask == 1, ids, 7), mask) for ids, mask in batches]
  again = pelt.fusion_usage((run(ids, mask), mask) for ids, mask in other)
  np.testing.assert_allclose(again[PLACE], usage[PLACE], rtol=1e-5)


@LONG
def test_beside_other_nodes_of_a_site_and_before_a_bank():
  model, base, sites, members = tasks(count=2)
  method = pelt.adapter_fusion(members)
  runs = [method.init(jax.random.key(i), base, sites) for i in range(2)]
  usage = {PLACE: np.array([[0.4, 0.6]] * 3)}
  chained = add_bypass(runs[0], sites, PLACE, nodes.After(None, stacked=1))
  node = pelt.prune_fusion(chained, usage, keep=1)["encoder"]["layer"]["output"]["LayerNorm"]
  assert node["bypass"].nodes[0].branch.remaining == (("trec",),) * 3
  with pytest.raises(ValueError, match=r"in a bank: prune its members before pelt\.bank"):
    pelt.prune_fusion(pelt.bank(runs), usage, keep=1)
  small = [pelt.prune_fusion(r, usage, keep=1) for r in runs]
  apply, ids = pelt.bypass(model.apply), tokens(2, 6)
  out = apply({"params": pelt.bank(small)}, ids, rows=np.array([0, 1]))
  for i in range(2):
    close(out[i], apply({"params": small[i]}, ids)[i], 2e-6)


def test_bad_input_is_named():
  params, _ = by_hand()
  prune = lambda usage, keep: pelt.prune_fusion(params, usage, keep=keep)
  good = {"ffn": [0.3, 0.3, 0.4]}
  for keep in (0, -1, True):
    with pytest.raises(ValueError, match="keep must be a whole number of at least 1"):
      prune(good, keep)
  with pytest.raises(ValueError, match=r"keep=4, but 'ffn' has 3 adapters, \('sst2'"):
    prune(good, 4)
  with pytest.raises(ValueError, match=r"places \['mlp'\] where params hold no .* at \['ffn'\]"):
    prune({"mlp": [0.3, 0.3, 0.4]}, 2)
  with pytest.raises(ValueError, match="usage is empty"):
    prune({}, 2)
  with pytest.raises(ValueError, match=r"usage\['ffn'\] must have shape \(3,\).* got \(2,\)"):
    prune({"ffn": [0.5, 0.5]}, 2)
  with pytest.raises(ValueError, match="got a mapping; pelt.fusion_usage makes it"):
    prune({"ffn": {"fusion": np.ones((1, 2, 3))}}, 2)
  with pytest.raises(ValueError, match="no numbers"):
    prune({"ffn": [0.5, np.nan, 0.5]}, 2)
  record = {"ffn": {"fusion": np.ones((1, 2, 3)) / 3}}
  for wrong in ([record], record, (record, None)):
    with pytest.raises(TypeError, match=r"records must be \(record, mask\) per batch|tuple"):
      pelt.fusion_usage(wrong)
  with pytest.raises(ValueError, match="records is empty"):
    pelt.fusion_usage([])
  with pytest.raises(ValueError, match="holds no fusion weights"):
    pelt.fusion_usage([({"ffn": {"gates": np.ones(1)}}, None)])
  with pytest.raises(ValueError, match=r"mask has shape \(1, 3\).* are \(1, 2\)"):
    pelt.fusion_usage([(record, np.ones((1, 3)))])
  with pytest.raises(ValueError, match="no token is real"):
    pelt.fusion_usage([(record, np.zeros((1, 2)))])
