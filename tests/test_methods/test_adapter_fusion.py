"""AdapterFusion: identities, stage 2, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes, training
from pelt_jax._walk import update_at, walk
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

LONG = pytest.mark.parity
NAMES = ("sst2", "trec", "wnut")


def tasks(name="bert", count=3, task="encoder", **options):
  model, base = built(name, task)
  sites = pelt.sites(model, tokens(2, 6))
  method = pelt.adapter("pfeiffer", **({"bottleneck": 5} | options))
  made = [moved(method.init(jax.random.key(i), base, sites), 0.1 + i / 10) for i in range(count)]
  return model, base, sites, dict(zip(NAMES, made, strict=False))


def fused(*args, count=3, name="bert", **options):
  model, base, sites, members = tasks(name, count)
  params = pelt.adapter_fusion(members, **options).init(jax.random.key(9), base, sites)
  return model, params, members, pelt.bypass(model.apply)


def fusions(params):
  found = ((p, n.branch) for p, n in walk(params) if isinstance(n, nodes.After | nodes.AroundNorm))
  return {p: b for p, b in found if isinstance(b, nodes.Fusion)}


def with_fields(params, **changes):
  """Every fusion's arrays replaced by `change(array)`."""
  new = {}
  for path, node in walk(params):
    branch = getattr(node, "branch", None)
    if isinstance(branch, nodes.Fusion):
      fields = {n: f(getattr(branch, n)) for n, f in changes.items()}
      new[path] = node.replace(branch=branch.replace(**fields))
  return update_at(params, new)


identity = lambda v: jnp.broadcast_to(jnp.eye(v.shape[-1], dtype=v.dtype), v.shape)


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=LONG)])
def test_one_adapter_with_the_identity_is_that_adapter(name):
  _, params, members, apply = fused(count=1, name=name)
  ids = tokens(2, 6)
  want = apply({"params": members["sst2"]}, ids)
  close(apply({"params": with_fields(params, value=identity)}, ids), want, 2e-6)


@LONG
def test_equal_adapters_need_no_choice():
  model, base, sites, members = tasks(count=1)
  same = dict.fromkeys(NAMES, members["sst2"])
  params = pelt.adapter_fusion(same).init(jax.random.key(9), base, sites)
  params = with_fields(params, query=lambda q: q + 1.0, value=identity)
  apply, ids = pelt.bypass(model.apply), tokens(2, 6)
  close(apply({"params": params}, ids), apply({"params": members["sst2"]}, ids), 2e-6)


def test_the_formula_by_hand_and_the_order_of_the_adapters():
  """One layer's node against NumPy, in float64; permuted adapters give permuted weights."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape))
    d, m, n = 4, 3, 3
    members = nodes.Bottleneck(array(n, d, m), array(n, m), array(n, m, d), array(n, d), None)
    node = nodes.Fusion(
      members, array(d, d), array(d), array(d, d), array(d), array(d, d), names=NAMES
    )
    x = array(2, 5, d)

    class Call:
      def __init__(self):
        self.seen = {}

      def salt(self, number):
        return self

      def record(self, name, value):
        self.seen[name] = value

    call = Call()
    got = node(call, x)
    z = [
      np.maximum(x @ members.down[i] + members.down_bias[i][None, None], 0) @ members.up[i]
      + members.up_bias[i][None, None]
      for i in range(n)
    ]
    z = np.stack([np.asarray(v) for v in z])
    q = np.asarray(x) @ np.asarray(node.query) + np.asarray(node.query_bias)
    k = z @ np.asarray(node.key) + np.asarray(node.key_bias)
    scores = np.einsum("btd,nbtd->btn", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("btn,nbtd->btd", weights, z @ np.asarray(node.value))
    close(got, want, 1e-12)
    close(call.seen["fusion"], weights, 1e-12)
    order = jnp.array([2, 0, 1])
    turned = node.replace(members=jax.tree.map(lambda a: a[order], members))
    close(turned(call, x), want, 1e-12)
    close(call.seen["fusion"], weights[..., order], 1e-12)
    # Without preference the mean of the outputs.
    zero = node.replace(query=node.query * 0, query_bias=node.query_bias * 0)
    close(zero(call, x), (z @ np.asarray(node.value)).mean(0), 1e-12)


def test_starts_and_its_regulariser():
  _, params, _, apply = fused()
  _, seen = apply({"params": params}, tokens(2, 6), record="fusion")
  ((path, branch),) = fusions(params).items()
  np.testing.assert_allclose(seen[path.removesuffix("/bypass")]["fusion"].sum(-1), 1.0, rtol=1e-6)
  d, layers = 32, 3
  assert branch.value.shape == (layers, d, d)
  np.testing.assert_allclose(branch.value[1], np.eye(d) + 1e-6 * (1 - np.eye(d)), atol=1e-9)
  drawn = [x for matrix in (branch.query, branch.key) for x in matrix]
  for i, matrix in enumerate(drawn):  # of every layer their own
    np.testing.assert_allclose(np.std(matrix), 0.02, rtol=0.1)
    assert all(np.abs(matrix - other).max() > 1e-2 for other in drawn[:i])
  assert not np.asarray(branch.query_bias).any() and not np.asarray(branch.key_bias).any()
  np.testing.assert_allclose(pelt.penalty(params), 0.01 * layers * d * (d - 1) * 1e-12, rtol=0.02)
  moved_ = with_fields(params, value=lambda v: v + 0.5)
  np.testing.assert_allclose(pelt.penalty(moved_), 0.01 * layers * d * d * 0.25, rtol=1e-3)
  none = fused(static=True)[1]
  assert pelt.penalty(none) == 0.0 and pelt.count(none).trainable == layers * (2 * d * d + 2 * d)


def test_the_regularisers_gradient():
  """2 * 0.01 (V - I), and nothing for queries and keys."""
  _, params, _, _ = fused()
  params = with_fields(params, value=lambda v: v + 0.25)
  _, grads = pelt.value_and_grad(pelt.penalty)(*pelt.partition(params))
  ((_, branch),) = fusions(grads).items()
  np.testing.assert_allclose(branch.value, 0.02 * 0.25, rtol=1e-4)
  assert not np.asarray(branch.query).any() and not np.asarray(branch.key_bias).any()


def test_counts_are_the_published_ones():
  """1,771,008 a layer and 21,252,096 in all on BERT-base."""
  config = {"model_type": "bert", "vocab_size": 7, "max_position_embeddings": 8}
  config |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
  model = models.from_config(config, task="encoder", scan=True)
  ids = jnp.zeros((1, 4), jnp.int32)
  base, sites = jax.eval_shape(model.init, jax.random.key(0), ids)["params"], pelt.sites(model, ids)

  def init(base):
    alone = pelt.adapter("pfeiffer").init(jax.random.key(0), base, sites)
    return pelt.adapter_fusion({"a": alone, "b": alone}).init(jax.random.key(1), base, sites)

  count = pelt.count(jax.eval_shape(init, base))
  assert count.trainable == 12 * 1_771_008 == 21_252_096
  assert count.stored == 21_252_096 + 2 * 894_528


@LONG
def test_dropout_of_the_weights_is_of_training():
  _, params, _, apply = fused(dropout=0.5)
  run = lambda seed, train: apply(
    {"params": params}, tokens(2, 6), train_nodes=train, rngs={"dropout": jax.random.key(seed)}
  )
  np.testing.assert_array_equal(run(0, False), run(1, False))
  assert np.abs(run(0, True) - run(1, True)).max() > 1e-3


def test_stage_two_trains_queries_keys_and_values_alone():
  _, params, members, apply = fused()
  d, layers = 32, 3
  assert pelt.count(params).trainable == layers * (3 * d * d + 2 * d)
  loss = lambda apply, params, batch, key: jnp.mean(
    (apply({"params": params}, batch["input_ids"]) - 1) ** 2
  )
  train = training.train_step(apply, loss, optax.adam(1e-2))
  trainable, frozen, state = train.init(params)
  batch = {"input_ids": tokens(2, 6)}
  new, _, _ = jax.jit(train.step)(trainable, frozen, state, batch, jax.random.key(0))
  after = fusions(pelt.combine(new, frozen))
  ((path, before),) = fusions(params).items()
  jax.tree.map(np.testing.assert_array_equal, after[path].members, before.members)
  for name in ("query", "key", "value"):
    assert np.abs(getattr(after[path], name) - getattr(before, name)).max() > 1e-3
  # The members are those that were given.
  for i, name in enumerate(NAMES):
    node = next(n for _, n in walk(members[name]) if isinstance(n, nodes.AroundNorm))
    np.testing.assert_array_equal(before.members.down[:, i], node.branch.down)


@LONG
def test_looped_saved_and_refused_by_merge(tmp_path):
  model, params, _, apply = fused()
  ids = tokens(2, 6)
  want = jax.jit(apply)({"params": params}, ids)
  looped = pelt.bypass(model.clone(scan=False).apply)
  close(looped({"params": models.to_looped(params, model)}, ids), want, 5e-6)
  pelt.save(tmp_path / "fusion", params)
  loaded = pelt.load(tmp_path / "fusion", built("bert", "encoder")[1])
  close(jax.jit(apply)({"params": loaded}, ids), want, 0.0)
  with pytest.raises(ValueError, match="its weights depend on the input"):
    pelt.merge(params)


@LONG
def test_heads_are_the_tasks_own_and_other_leaves_an_error():
  model, base = built("bert", "classification")
  sites = pelt.sites(model, tokens(2, 6))
  head = pelt.chain(pelt.adapter("pfeiffer", bottleneck=5), pelt.train("head"))
  members = {n: head.init(jax.random.key(i), base, sites) for i, n in enumerate(NAMES)}
  method = pelt.chain(pelt.adapter_fusion(members), pelt.train("head"))
  params = method.init(jax.random.key(9), base, sites)
  assert pelt.count(params, sites).head == 32 * 5 + 5
  norms = pelt.adapter("pfeiffer", bottleneck=5, train_norms=True)
  members["trec"] = norms.init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match=r"adapters\['trec'\] changes leaves of the model"):
    pelt.adapter_fusion(members).init(jax.random.key(9), base, sites)


def test_what_cannot_be_fused_is_named():
  _, base, sites, members = tasks(count=2)
  init = lambda method: method.init(jax.random.key(0), base, sites)
  others = {
    "no adapter": (base, "holds no adapter"),
    "a prefix": (init(pelt.prefix_tuning(2)), "holds a Prefix"),
    "placement": (init(pelt.adapter("parallel", bottleneck=5)), "at different places"),
    "width": (init(pelt.adapter("pfeiffer", bottleneck=4)), "have other widths"),
    "activation": (
      init(pelt.adapter("pfeiffer", bottleneck=5, activation="gelu")),
      "placed or built differently",
    ),
  }
  for other, match in others.values():
    with pytest.raises(ValueError, match=match):
      pelt.adapter_fusion(members | {"wnut": other})
  with pytest.raises(ValueError, match="adapters is empty"):
    pelt.adapter_fusion({})
  with pytest.raises(TypeError, match="adapters must be params by name|Mapping"):
    pelt.adapter_fusion(list(members.values()))
  with pytest.raises(ValueError, match="regularization must be at least 0"):
    pelt.adapter_fusion(members, regularization=-1.0)
  with pytest.raises(ValueError, match="params hold an adapter at 'encoder/layer/.* already"):
    pelt.adapter_fusion(members).init(jax.random.key(0), members["sst2"], sites)
  moved_base = jax.tree.map(lambda x: x + 1, base)
  with pytest.raises(ValueError, match=r"adapters\['sst2'\] was trained on another base"):
    pelt.adapter_fusion(members).init(jax.random.key(0), moved_base, sites)
  llama = built("llama", "encoder")
  with pytest.raises(ValueError, match="that the model does not call"):
    pelt.adapter_fusion(members).init(
      jax.random.key(0), llama[1], pelt.sites(llama[0], tokens(2, 6))
    )
