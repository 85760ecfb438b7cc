"""Prefix tuning and P-Tuning v2: identities in float64, counts, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes, training
from pelt_jax._walk import update_at, walk
from tests.test_models.helpers import built, close, padded, tokens

LONG = pytest.mark.parity
DEEP = ("llama", pytest.param("qwen2-mixed", marks=LONG), pytest.param("bert", marks=LONG))


def task_of(name):
  return "classification" if name == "bert" else "lm"


def prefixed(name, length=4, *, scan=True, **options):
  model, base = built(name, task_of(name), scan=scan)
  method = pelt.prefix_tuning(length, **{"reparametrize": False, **options})
  params = method.init(jax.random.key(1), base, pelt.sites(model, tokens(2, 6)))
  return model, base, params, pelt.bypass(model.apply)


def prefixes(params):
  for path, node in walk(params):
    if isinstance(node, nodes.Prefix):
      yield path, node


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=LONG)])
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=LONG)])
def test_a_prefix_of_real_tokens_is_the_model_reading_them_first(name, scan):
  model, base = built(name, "lm", scan=scan)
  sites, apply = pelt.sites(model, tokens(2, 6)), pelt.bypass(model.apply)
  words, ids = tokens(1, 4, seed=3), tokens(2, 6)
  init = pelt.prefix_from(apply, base, words, sites)
  method = pelt.prefix_tuning(4, reparametrize=False, init=init)
  params = method.init(jax.random.key(1), base, sites)
  want = model.apply({"params": base}, np.concatenate([np.tile(words, (2, 1)), ids], axis=1))
  close(apply({"params": params}, ids), want[:, 4:], 2e-6)
  unshifted = pelt.prefix_tuning(4, reparametrize=False, init=init, shift_positions=False)
  params = unshifted.init(jax.random.key(1), base, sites)
  with pytest.raises(AssertionError):  # rotary positions make the difference
    close(apply({"params": params}, ids), want[:, 4:], 1e-3)


@pytest.mark.parametrize("name", DEEP)
def test_the_mlp_folds_to_the_table_it_makes(name):
  model, _, params, apply = prefixed(name, reparametrize=True, hidden=8, embed_dim=5)
  folded = pelt.fold(params)
  assert "generators" not in folded
  ids = tokens(2, 6)
  np.testing.assert_array_equal(apply({"params": params}, ids), apply({"params": folded}, ids))
  c = model.config
  kv = getattr(c, "num_key_value_heads", c.num_attention_heads) * (
    getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
  )
  stored = 2 * c.num_hidden_layers * 4 * kv
  out = stored // 4
  counted = pelt.count(params)
  assert counted.stored == stored
  assert counted.trainable == 4 * 5 + (5 * 8 + 8) + (8 * out + out)


@LONG
@pytest.mark.parametrize("name", DEEP)
def test_looped_equals_scanned_and_rematerialized(name):
  looped, base = built(name, task_of(name), scan=False)
  sites = pelt.sites(looped, tokens(2, 6))
  ids = tokens(2, 6)
  for reparametrize in (True, False):
    method = pelt.prefix_tuning(4, reparametrize=reparametrize, hidden=8)
    params = pelt.fold(method.init(jax.random.key(1), base, sites))
    want = pelt.bypass(looped.apply)({"params": params}, ids)
    for scan, remat in ((True, False), (False, True), (True, True)):
      other = looped.clone(scan=scan, remat=remat)
      there = models.to_scanned(params, other) if scan else params
      close(pelt.bypass(other.apply)({"params": there}, ids), want, 2e-6)
    assert float(jnp.abs(want - looped.apply({"params": base}, ids)).max()) > 1e-3


@LONG
def test_the_mlp_makes_k0_v0_k1_v1_in_order():
  model, base = built("llama", "lm", scan=False)
  sites = pelt.sites(model, tokens(2, 6))
  params = pelt.prefix_tuning(2, hidden=4).init(jax.random.key(1), base, sites)
  (mlp,) = params["generators"].values()
  table = jnp.tanh(mlp.embedding @ mlp.w1 + mlp.b1[None]) @ mlp.w2 + mlp.b2[None]
  table = table.reshape(2, 3, 2, 2, 8)  # rows, layers, keys and values, heads, width
  for path, node in prefixes(pelt.fold(params)):
    layer = int(path.split("/")[2])
    close(node.keys, table[:, layer, 0], 1e-6)
    close(node.values, table[:, layer, 1], 1e-6)


def test_permuting_the_rows_changes_nothing_and_all_queries_see_them():
  model, base, params, apply = prefixed("llama")
  ids = tokens(2, 6)
  order = jnp.array([2, 0, 3, 1])
  changes = {
    path: node.replace(keys=node.keys[:, order], values=node.values[:, order])
    for path, node in prefixes(params)
  }
  out = apply({"params": params}, ids)
  close(apply({"params": update_at(params, changes)}, ids), out, 2e-6)
  moved = jnp.abs(out - model.apply({"params": base}, ids)).max(axis=(0, 2))
  assert (moved > 1e-3).all()  # the first position too


@LONG
def test_two_equal_rows_are_one_of_twice_the_weight():
  """exp(s + ln 2) = 2 exp(s): shown on values, whose rows may differ only in their sum."""
  _, _, params, apply = prefixed("llama", 2)
  ids = tokens(2, 6)
  double = lambda x: jnp.concatenate([x, x[:, :1]], axis=1)
  twice, summed = {}, {}
  for path, node in prefixes(params):
    twice[path] = node.replace(keys=double(node.keys), values=double(node.values))
    values = double(node.values).at[:, 0].multiply(0.5).at[:, 2].multiply(1.5)
    summed[path] = twice[path].replace(values=values)
  a, b = (apply({"params": update_at(params, c)}, ids) for c in (twice, summed))
  close(a, b, 2e-6)


@LONG
def test_cached_generation_equals_the_full_forward():
  _, _, params, apply = prefixed("llama")
  ids, mask = padded(tokens(2, 6), [4, 6], "left")
  made = training.generate(
    apply, params, jnp.asarray(ids), jnp.asarray(mask), max_new_tokens=4
  ).tokens
  rows, valid = np.asarray(ids), np.asarray(mask)
  for i in range(4):
    logits = apply({"params": params}, rows, valid)[:, -1]
    best = np.asarray(jnp.argmax(logits, axis=-1), np.int32)
    np.testing.assert_array_equal(made[:, i], best)
    rows = np.concatenate([rows, best[:, None]], axis=1)
    valid = np.concatenate([valid, np.ones_like(best)[:, None]], axis=1)


@LONG
def test_padding_is_unaffected():
  _, _, params, apply = prefixed("llama")
  ids = tokens(2, 6)
  right, mask = padded(ids, [4, 6], "right")
  got = apply({"params": params}, right, mask)
  close(got[0, :4], apply({"params": params}, ids[:1, :4])[0], 2e-6)


def test_mixed_batch_of_unequal_prefixes_equals_single_runs():
  model, base, first, apply = prefixed("llama", 4)
  sites = pelt.sites(model, tokens(2, 6))
  second = pelt.prefix_tuning(2, hidden=4).init(jax.random.key(5), base, sites)
  ids = tokens(2, 6)
  both = apply({"params": pelt.bank([first, second])}, ids, rows=jnp.array([1, 0]))
  close(both[0], apply({"params": second}, ids)[0], 2e-6)
  close(both[1], apply({"params": first}, ids)[1], 2e-6)


def test_dropout_is_of_training_and_differs_by_row_and_layer():
  _, _, params, apply = prefixed("llama", dropout=0.5)
  ids = np.tile(tokens(1, 6), (2, 1))
  still = apply({"params": params}, ids)
  close(still[0], still[1], 1e-6)
  rngs = {"dropout": jax.random.key(0)}
  drawn = apply({"params": params}, ids, deterministic=False, rngs=rngs)
  assert float(jnp.abs(drawn[0] - drawn[1]).max()) > 1e-3


@LONG
def test_p_tuning_v2_is_the_flat_prefix():
  model, base = built("bert", "classification")
  sites, ids = pelt.sites(model, tokens(2, 6)), tokens(2, 6)
  run = lambda method: pelt.bypass(model.apply)(
    {"params": method.init(jax.random.key(1), base, sites)}, ids
  )
  np.testing.assert_array_equal(
    run(pelt.p_tuning_v2(5)), run(pelt.prefix_tuning(5, reparametrize=False))
  )
  both = pelt.chain(pelt.p_tuning_v2(5), pelt.train("head"))
  counted = pelt.count(both.init(jax.random.key(1), base, sites), sites)
  c = model.config
  assert counted.trainable == 2 * c.num_hidden_layers * 5 * c.hidden_size
  assert counted.head == c.hidden_size * 5 + 5


def test_saved_and_loaded_with_its_mlp(tmp_path):
  _, base, params, apply = prefixed("llama", reparametrize=True, hidden=8)
  pelt.save(tmp_path, params)
  ids = tokens(2, 6)
  again = pelt.load(tmp_path, base)
  np.testing.assert_array_equal(*(apply({"params": p}, ids) for p in (params, again)))
  assert pelt.count(again).trainable == pelt.count(params).trainable


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"length": 0}, "length must be a whole number of at least 1"),
    ({"hidden": 0}, "hidden must be a whole number of at least 1"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ({"init": {}}, "it needs reparametrize=False"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    pelt.prefix_tuning(**options)


def test_bad_targets():
  model, base = built("llama", "lm")
  sites = pelt.sites(model, tokens(2, 6))
  start = lambda method: method.init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match=r"called with \(q, k, v\).*mlp"):
    start(pelt.prefix_tuning(targets="mlp"))
  with pytest.raises(ValueError, match="init and the attention cores differ"):
    start(pelt.prefix_tuning(reparametrize=False, init={"x": (0, 0)}))
  init = pelt.prefix_from(pelt.bypass(model.apply), base, tokens(1, 4), sites)
  with pytest.raises(ValueError, match=r"has shapes .*expected \(3, 5, 2, 8\)"):
    start(pelt.prefix_tuning(5, reparametrize=False, init=init))
  with pytest.raises(ValueError, match="one row of tokens"):
    pelt.prefix_from(pelt.bypass(model.apply), base, tokens(2, 4), sites)
  params = start(pelt.prefix_tuning(4))
  with pytest.raises(RuntimeError, match="use pelt.bypass"):
    model.apply({"params": params}, tokens(2, 6))


@LONG
@pytest.mark.parametrize("options", [{}, {"reparametrize": True, "hidden": 8}])
def test_another_tasks_prefix_is_where_training_starts(options):
  model, base, trained, apply = prefixed("llama", **options)
  again = pelt.p_tuning_v2(4, init=pelt.prefix_of(trained), dropout=0.0)
  params = again.init(jax.random.key(9), base, pelt.sites(model, tokens(2, 6)))
  ids = tokens(2, 6)
  np.testing.assert_array_equal(apply({"params": params}, ids), apply({"params": trained}, ids))
  banked = pelt.bank([trained, trained])
  several = again.init(jax.random.key(8), params, pelt.sites(model, tokens(2, 6)))
  for wrong, match in ((base, "no prefix"), (banked, "a bank"), (several, "several prefixes")):
    with pytest.raises(ValueError, match=match):
      pelt.prefix_of(wrong)


def counted(method, config, **sizes):
  """Counts and shapes of a model that is never made."""
  model = models.from_config(config | sizes, task="encoder", scan=True)
  ids = jnp.zeros((1, 4), jnp.int32)
  base = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  sites = pelt.sites(model, ids)
  params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites), base)
  return pelt.count(params), params


def test_counts_are_the_published_ones():
  """GPT-2 medium with l = 5 and 10; BERT-base with l = 10, stored and in training."""
  medium = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 7}
  for length, stored in ((5, 245_760), (10, 491_520)):
    counts, _ = counted(pelt.prefix_tuning(length), medium)
    assert counts.stored == stored
    d, k, out = 1024, 512, 2 * 24 * 1024
    assert counts.trainable == length * d + d * k + k + k * out + out
  bert = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 7}
  counts, _ = counted(pelt.prefix_tuning(10), bert, num_attention_heads=12)
  assert (counts.stored, counts.trainable) == (184_320, 10 * 768 + 9_849_344)


def test_starts():
  """E from N(0, 1), the MLP's maps from U(-1/sqrt(n), 1/sqrt(n)), flat prefixes from N(0, 1)."""
  model, base = built("qwen3", "lm")  # its heads are wider together than the model
  sites = pelt.sites(model, tokens(1, 4))
  params = pelt.prefix_tuning(200).init(jax.random.key(0), base, sites)
  (made,) = params["generators"].values()
  embedding, w1, b1, w2, b2 = jax.tree.leaves(made)
  assert embedding.shape == (200, 32) and w1.shape == (32, 512)
  np.testing.assert_allclose([embedding.mean(), embedding.std()], [0, 1], atol=0.03)
  for array, n in ((w1, 32), (b1, 32), (w2, 512), (b2, 512)):
    top = float(jnp.abs(array).max())
    assert 0.93 * n**-0.5 < top <= n**-0.5, (array.shape, top)
    np.testing.assert_allclose(array.std(), (3 * n) ** -0.5, rtol=0.08)
  _, _, flat, _ = prefixed("llama", 200)
  for _, node in prefixes(flat):
    for array in (node.keys, node.values):
      np.testing.assert_allclose([array.mean(), array.std()], [0, 1], atol=0.03)
  _, deep = counted(pelt.p_tuning_v2(3), {"model_type": "llama", "vocab_size": 7})
  assert all(node.dropout is not None for _, node in prefixes(deep))
  small = pelt.p_tuning_v2(3).init(jax.random.key(0), base, sites)
  assert [float(n.dropout.rate[0]) for _, n in prefixes(small)] == [pytest.approx(0.1)]


def test_three_prefixes_of_an_encoder_decoder():
  """Encoder, decoder and cross attention: an MLP each, 2 l d numbers a layer stored."""
  model, base = built("bart", "seq2seq")
  sites = pelt.sites(model, tokens(1, 4), decoder_input_ids=tokens(1, 3))
  params = pelt.prefix_tuning(2, hidden=4).init(jax.random.key(0), base, sites)
  assert len(params["generators"]) == 3
  assert pelt.count(params).stored == 2 * 2 * 32 * (2 + 3 + 3)


@LONG
def test_zero_keys_and_values_are_no_identity():
  """They take l / (l + sum_j exp(q . k_j / sqrt(d_h))) of the softmax, against what PEFT says."""
  model, base, params, apply = prefixed("llama", shift_positions=False)
  zero = jax.tree.map(jnp.zeros_like, pelt.partition(params)[0])
  params = pelt.combine(zero, pelt.partition(params)[1])
  ids = tokens(2, 6)
  apart = jnp.abs(apply({"params": params}, ids) - model.apply({"params": base}, ids)).max()
  assert float(apart) > 1e-2
