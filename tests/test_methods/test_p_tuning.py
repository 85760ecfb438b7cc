"""P-Tuning: the encoder by hand, identities, groups, bad input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax._walk import get_at, update_at
from tests.test_models.helpers import VOCAB, built, close, tokens

LONG = pytest.mark.parity
TABLES = {"reader": "embed_tokens/embedding", "llama": "model/embed_tokens/embedding"}
MODELS = pytest.mark.parametrize("name", ["reader", pytest.param("llama", marks=LONG)])
N, D = 4, 32
TEMPLATE = (0, 2, 3, 7)  # where the virtual tokens stand in a row of ten


class Reader(nn.Module):
  """Sums what came so far, by position: the least model in which places matter."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(VOCAB, D, name="embed_tokens")(ids)
    weights = jnp.arange(1.0, 1.0 + ids.shape[1])[None, :, None]
    return nn.Dense(VOCAB, name="head")(jnp.cumsum(jnp.tanh(x * weights), axis=1))


@functools.cache
def model_and_base(name):
  if name == "reader":
    return Reader(), Reader().init(jax.random.key(0), tokens(2, 6))["params"]
  return built(name, "lm")


def started(length=N, name="reader", **options):
  model, base = model_and_base(name)
  sites = pelt.sites(model, tokens(2, 6))
  params = pelt.p_tuning(length, **options).init(jax.random.key(1), base, sites)
  return model, base, params, pelt.bypass(model.apply)


def encoder(params):
  (node,) = params["generators"].values()
  return node


def templated(ids, virtual, at=TEMPLATE):
  """Rows with virtual tokens at some places and text at the others."""
  rows = np.zeros((len(ids), ids.shape[1] + len(virtual)), np.int32)
  text = [i for i in range(rows.shape[1]) if i not in at]
  rows[:, text], rows[:, list(at)] = ids, np.array(virtual, np.int32)
  return rows


def lstm_by_hand(cell, x, reverse):
  w_ih, w_hh, b_ih, b_hh = (getattr(cell, n) for n in ("w_ih", "w_hh", "b_ih", "b_hh"))
  sigmoid = lambda v: 1 / (1 + np.exp(-v))
  size = len(w_hh)
  hidden, memory, states = np.zeros(size), np.zeros(size), [None] * len(x)
  for t in reversed(range(len(x))) if reverse else range(len(x)):
    gates = x[t] @ w_ih + b_ih + hidden @ w_hh + b_hh
    take, keep, new, show = (gates[k * size : (k + 1) * size] for k in range(4))
    memory = sigmoid(keep) * memory + sigmoid(take) * np.tanh(new)
    hidden = sigmoid(show) * np.tanh(memory)
    states[t] = hidden
  return np.stack(states)


def test_the_encoder_by_hand():
  _, _, params, _ = started(3, hidden=2, init="uniform")
  node = jax.tree.map(np.asarray, encoder(params))
  assert [c.w_ih.shape for c in node.forward] == [(D, 8), (4, 8)]
  x = node.embedding
  for ahead, back in zip(node.forward, node.backward, strict=True):
    x = np.concatenate([lstm_by_hand(ahead, x, False), lstm_by_hand(back, x, True)], axis=1)
  first, second = node.mlp
  x = np.maximum(x @ first.kernel + first.bias, 0) @ second.kernel + second.bias
  close(get_at(pelt.fold(params), TABLES["reader"]).prompt, x, 1e-6)


@pytest.mark.parametrize(
  ("options", "shapes"),
  [
    ({}, [(32, 32), (32, 32)]),
    ({"hidden": 32}, [(64, 32), (32, 32)]),  # the paper's code for few shots
    ({"encoder": "mlp"}, [(32, 32), (32, 32)]),
    ({"variant": "peft"}, [(64, 64), (64, 32)]),
    ({"variant": "peft", "encoder": "mlp", "hidden": 8}, [(32, 8), (8, 8), (8, 32)]),
  ],
)
def test_counts(options, shapes):
  _, _, params, _ = started(**options)
  node = encoder(params)
  assert [a.kernel.shape for a in node.mlp] == shapes
  lstm = 0
  if options.get("encoder") != "mlp":
    h = shapes[0][0] // 2
    lstm = 2 * (4 * h * (D + h) + 8 * h) + 2 * (4 * h * (2 * h + h) + 8 * h)
  counted = pelt.count(params)
  assert counted.trainable == N * D + lstm + sum(i * o + o for i, o in shapes)
  assert (counted.stored, counted.changed) == (N * D, 0)


def test_starts_as_torch_does():
  _, _, params, _ = started(200)
  node = encoder(params)
  assert abs(float(node.embedding.std()) - 1) < 0.05
  for cell in (*node.forward, *node.backward):
    for leaf in jax.tree.leaves(cell):
      assert 0.9 * 16**-0.5 < float(jnp.abs(leaf).max()) <= 16**-0.5
  for affine in node.mlp:
    assert 0.9 * 32**-0.5 < float(jnp.abs(affine.kernel).max()) <= 32**-0.5
    assert 0.5 * 32**-0.5 < float(jnp.abs(affine.bias).max()) <= 32**-0.5
  firsts = [float(jax.tree.leaves(c)[0].ravel()[0]) for c in (*node.forward, *node.backward)]
  assert len(set(firsts)) == 4


@MODELS
def test_without_encoder_rows_of_the_table_are_the_discrete_template_bit_for_bit(name):
  words = [5, 9, 2, 5]
  model, base, params, apply = started(name=name, encoder="none", init="text", tokens=words)
  ids = tokens(2, 6)
  got = apply({"params": params}, templated(ids, pelt.virtual_tokens(params)))
  np.testing.assert_array_equal(got, model.apply({"params": base}, templated(ids, words)))


@MODELS
def test_slots_and_only_they_are_the_encoders_rows(name):
  _, base, params, apply = started(name=name)
  virtual = pelt.virtual_tokens(params)
  assert virtual == range(VOCAB, VOCAB + N)
  rows = templated(tokens(2, 6), virtual)
  table = get_at(pelt.fold(params), TABLES[name])
  got, plain = table.lookup(jnp.asarray(rows)), get_at(base, TABLES[name])
  slots = rows >= VOCAB
  assert (slots.sum(axis=1) == N).all()
  np.testing.assert_array_equal(got[~slots], plain[rows[~slots]])
  np.testing.assert_array_equal(got[slots], jnp.tile(encoder(params).prompt(), (2, 1)))
  swapped = rows.copy()
  swapped[:, [0, 2]] = rows[:, [2, 0]]
  first, second = apply({"params": params}, rows), apply({"params": params}, swapped)
  assert float(jnp.abs(first[:, -1] - second[:, -1]).max()) > 1e-4


@MODELS
def test_fold_leaves_a_plain_prompt_of_the_same_function(name, tmp_path):
  model, base, params, apply = started(name=name)
  rows = templated(tokens(2, 6), pelt.virtual_tokens(params))
  want = apply({"params": params}, rows)
  folded = pelt.fold(params)
  assert "generators" not in folded and pelt.virtual_tokens(folded) == range(VOCAB, VOCAB + N)
  np.testing.assert_array_equal(apply({"params": folded}, rows), want)
  for name, tree in (("whole", params), ("folded", folded)):
    pelt.save(tmp_path / name, tree)
    again = pelt.load(tmp_path / name, base)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    np.testing.assert_array_equal(apply({"params": again}, rows), want)
  prompt = pelt.prompt_tuning(N).init(jax.random.key(2), base, pelt.sites(model, tokens(2, 6)))
  assert jax.tree.structure(prompt) == jax.tree.structure(folded)


@MODELS
def test_mixed_batch_of_an_encoders_and_a_plain_prompt_equals_single_runs(name):
  model, base, first, apply = started(name=name)
  second = pelt.prompt_tuning(N).init(jax.random.key(7), base, pelt.sites(model, tokens(2, 6)))
  rows = templated(tokens(2, 6), pelt.virtual_tokens(first))
  both = apply({"params": pelt.bank([first, second])}, rows, rows=jnp.array([1, 0]))
  close(both[0], apply({"params": second}, rows)[0], 2e-6)
  close(both[1], apply({"params": first}, rows)[1], 2e-6)


@MODELS
def test_gradients_reach_the_encoder_alone_and_adam_moves_both_biases(name):
  _, _, params, apply = started(name=name)
  rows = templated(tokens(2, 6), pelt.virtual_tokens(params))
  trainable, frozen = pelt.partition(params)
  kept = pelt.labels(params)
  generators = kept.pop("generators")
  assert set(jax.tree.leaves(generators)) == {"trainable"}
  assert set(jax.tree.leaves(kept)) == {"frozen"}
  compiled = []

  @jax.jit
  def gradient(trainable, rows):
    compiled.append(1)
    loss = lambda p: (apply({"params": p}, rows) ** 2).mean()
    return pelt.value_and_grad(loss)(trainable, frozen)[1]

  grads = gradient(trainable, rows)
  gradient(trainable, rows + 0)
  assert len(compiled) == 1
  assert all(bool((jnp.abs(g) > 0).any()) for g in jax.tree.leaves(grads))
  tx = optax.adam(0.01, eps=0.0)
  with jax.numpy_dtype_promotion("standard"):  # of optax
    updates, _ = tx.update(grads, tx.init(trainable))
  for cell in (*encoder(updates).forward, *encoder(updates).backward):
    moved = jnp.abs(cell.b_ih + cell.b_hh)
    close(moved, np.full(moved.shape, 0.02), 1e-5)


@LONG
def test_looped_equals_scanned():
  looped, base = built("llama", "lm", scan=False)
  method = pelt.p_tuning(N)
  params = method.init(jax.random.key(1), base, pelt.sites(looped, tokens(2, 6)))
  scanned = looped.clone(scan=True)
  rows = templated(tokens(2, 6), pelt.virtual_tokens(params))
  want = pelt.bypass(looped.apply)({"params": params}, rows)
  params = pelt.models.to_scanned(params, scanned)
  close(pelt.bypass(scanned.apply)({"params": params}, rows), want, 2e-6)


@MODELS
def test_vmap_over_encoders(name):
  _, _, params, apply = started(name=name)
  rows = templated(tokens(2, 6), pelt.virtual_tokens(params))
  trainable, extra, base = pelt.partition(params, extra=True)
  run = lambda t: apply({"params": pelt.combine(t, extra, base)}, rows)
  two = jax.tree.map(lambda x: jnp.stack([x, x * 1.5]), trainable)
  got = jax.jit(jax.vmap(run))(two)
  for i, scale in enumerate((1.0, 1.5)):
    close(got[i], run(jax.tree.map(lambda x, s=scale: x * s, trainable)), 1e-5)


def test_the_backbone_trains_in_a_group_of_its_own():
  model, base = model_and_base("reader")
  sites = pelt.sites(model, tokens(2, 6))
  method = pelt.chain(pelt.train("head"), pelt.p_tuning(N, encoder="mlp", tune_backbone=True))
  params = method.init(jax.random.key(1), base, sites)
  assert pelt.count(params).trainable == N * D + 2 * (D * D + D) + VOCAB * D + (D + 1) * VOCAB
  trainable, _ = pelt.partition(params)
  tx = optax.multi_transform({"trainable": optax.sgd(1.0), "backbone": optax.sgd(0.5)}, pelt.labels)
  updates, _ = tx.update(jax.tree.map(np.ones_like, trainable), tx.init(trainable))
  moved = lambda tree: {float(x.min()) for x in jax.tree.leaves(tree)}
  assert moved(updates["generators"]) == moved(updates["head"]) == {-1.0}
  assert moved(updates["embed_tokens"]) == {-0.5}


@LONG
def test_all_of_a_bert_trains_beside_the_encoder():
  model, base = built("bert", "classification")
  sites = pelt.sites(model, tokens(2, 6))
  start = lambda **options: pelt.p_tuning(N, **options).init(jax.random.key(1), base, sites)
  both, alone = (pelt.count(start(tune_backbone=b)).trainable for b in (True, False))
  assert both - alone == sum(x.size for x in jax.tree.leaves(base))


def test_an_array_is_what_it_starts_from():
  rows = np.arange(N * D, dtype=np.float32).reshape(N, D)
  for method in (pelt.p_tuning(N, encoder="none", init=rows), pelt.prompt_tuning(N, init=rows)):
    model, base = model_and_base("reader")
    params = method.init(jax.random.key(1), base, pelt.sites(model, tokens(2, 6)))
    np.testing.assert_array_equal(get_at(params, TABLES["reader"]).prompt, rows)
  _, _, params, _ = started(init=jnp.asarray(rows))
  np.testing.assert_array_equal(encoder(params).embedding, rows)
  with pytest.raises(ValueError, match=r"init has shape \(4, 32\), expected .*length=5"):
    pelt.prompt_tuning(5, init=rows)
  with pytest.raises(ValueError, match="init is an array"):
    pelt.prompt_tuning(N, init=rows, tokens=[1])
  with pytest.raises(ValueError, match="init has rows of 31 numbers, the table has rows of 32"):
    started(init=rows[:, 1:])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"length": 0}, "length must be a whole number of at least 1, got 0"),
    ({"encoder": "none", "hidden": 4}, "hidden is the width of an encoder"),
    ({"hidden": 0}, "hidden must be a whole number"),
    ({"lstm_layers": 0}, "lstm_layers must be a whole number"),
    ({"init": "xavier"}, "init must be one of"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    pelt.p_tuning(**options)


def test_one_table_holds_one_prompt():
  model, base, params, apply = started()
  sites = pelt.sites(model, tokens(2, 6))
  with pytest.raises(ValueError, match="p_tuning: .* holds a prompt already"):
    pelt.p_tuning(N).init(jax.random.key(0), params, sites)
  plain = update_at(params, {TABLES["reader"]: get_at(base, TABLES["reader"])})
  with pytest.raises(ValueError, match="no prompt waits for its generator at 'embed_tokens"):
    apply({"params": plain}, tokens(2, 6))


@pytest.mark.parity
def test_another_tasks_prompt_is_where_training_starts():
  model, base = built("qwen2", "lm")
  sites = pelt.sites(model, tokens(2, 6))
  trained = pelt.p_tuning(3, hidden=4).init(jax.random.key(1), base, sites)
  start = pelt.prompt_of(trained)
  params = pelt.prompt_tuning(3, init=start).init(jax.random.key(9), base, sites)
  np.testing.assert_array_equal(pelt.prompt_of(params), start)
  ids = np.concatenate([np.tile(np.arange(97, 100, dtype=np.int32), (2, 1)), tokens(2, 6)], 1)
  apply = pelt.bypass(model.apply)
  np.testing.assert_array_equal(apply({"params": params}, ids), apply({"params": trained}, ids))
  for wrong, match in ((base, "hold 0 prompts"), (pelt.bank([params, params]), "a bank")):
    with pytest.raises(ValueError, match=match):
      pelt.prompt_of(wrong)
