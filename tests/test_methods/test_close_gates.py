"""Closing gates: the state by hand, frozen arrays, absent parts, pruned trees, bad input."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes, training
from pelt_jax._walk import every_node, get_at, map_arrays, update_at, walk
from pelt_jax.methods._gates import gated_parts
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import build, built, close, random_params, tokens

LONG = pytest.mark.parity
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
SMALL = {"length": 3, "rank": 2, "bottleneck": 5, "hidden": 7}
SELF = "encoder/layer/{}/attention/self"
PLACES = (  # of one layer's parts in BERT: paths and the module that tells
  f"{SELF}/query/kernel",
  f"{SELF}/value/kernel",
  f"{SELF}/core/bypass",
  "encoder/layer/{}/output/LayerNorm/bypass",
)


def test_no_gradient_opens_a_gate():
  call = types.SimpleNamespace(context=types.SimpleNamespace(record=()))
  gate, x = nodes.Closable(jnp.float32(0.5), jnp.float32(1.0)), jnp.ones((2, 3, 4))
  value, grads = jax.value_and_grad(lambda g: jnp.sum(g(call, x)))(gate)
  assert (float(value), float(grads.gate), float(grads.open)) == (0.5, 1.0, 0.0)
  shut = gate.replace(open=jnp.float32(0.0))
  value, grads = jax.value_and_grad(lambda g: jnp.sum(g(call, x)))(shut)
  assert (float(value), float(grads.gate), float(grads.open)) == (0.0, 0.0, 0.0)


@functools.cache
def closable(name="bert", scan=False, scale=0.3, dtype="float32", task="encoder", **options):
  model = build(name, task, scan=scan, dtype=dtype)
  base = random_params(model)
  method = pelt.chain(pelt.unipelt(**(SMALL | options)), pelt.close_gates(0.1, 1, every=1))
  sites = pelt.sites(model, tokens(2, 6), MASK)
  return model, base, moved_but_open(method.init(jax.random.key(1), base, sites), scale), method


def moved_but_open(params, scale=0.3):
  """Every trainable array off its start but what says that a gate is open."""
  told = map_arrays(lambda k, g, x, path: path.endswith("/open"), params)
  return jax.tree.map(lambda o, a, b: a if o else b, told, params, moved(params, scale))


def shut(params, *paths, layers=None):
  """Params whose gates at some paths are closed, by the fact alone."""

  def closed(path, value):
    if not any(p in path for p in paths):
      return value
    off = lambda x: x.replace(open=x.open * 0 if layers is None else x.open.at[layers].set(0))
    is_gate = lambda x: isinstance(x, nodes.Closable)
    return jax.tree.map(lambda x: off(x) if is_gate(x) else x, value, is_leaf=is_gate)

  return update_at(params, {p: closed(p, v) for p, v in walk(params)})


def one_part(stacked):
  """A tree with one gated prefix, its gate and the record of a mean."""
  lead = (2,) if stacked else ()
  keys = jnp.ones((*lead, 3, 1, 2))
  params = {"core": {"bypass": nodes.Prefix(keys, keys, jnp.ones(lead), stacked=len(lead))}}
  method = pelt.close_gates(0.25, 2, every=2)
  params = method.init(jax.random.key(0), params, ())
  trainable, _ = pelt.partition(params)
  update = jax.jit(method.post_step.update)

  def told(*means):  # two rows, whose mean it is
    rows = jnp.asarray(means, jnp.float32)[:, None, None] + jnp.array([[[-0.125], [0.125]]])
    return {"core": {"mean_gate": rows if stacked else rows[0]}}

  return trainable, method.post_step.init(trainable), update, told


def test_the_state_by_hand():
  """Evaluations are means of two steps; two in a row under 1/4 close, one above starts again."""
  trainable, state, update, told = one_part(stacked=False)
  # 0.125 | 0.25 is not under | 0.1875, 0.21875: closed at the eighth step, and for good
  means = [0.0, 0.25, 0.5, 0.0, 0.125, 0.25, 0.375, 0.0625, 1.0, 1.0]
  streaks = [0, 1, 1, 0, 0, 1, 1, 2, 2, 0]
  for i, (mean, streak) in enumerate(zip(means, streaks, strict=True)):
    new = jax.tree.map(lambda x: x + 1, trainable)
    after, state = update(state, trainable, new, None, told(mean))
    (part,) = state.parts.values()
    assert int(part.streak) == streak and bool(part.closed) == (i >= 7)
    node = after["core"]["bypass"]
    assert float(node.gate.open) == (i < 7)  # whatever an optimizer did to it
    moved_by = 0.0 if i >= 7 else 1.0
    for was, now in ((1.0, node.keys), (1.0, node.values), (1.0, node.gate.gate)):
      np.testing.assert_array_equal(now, was + moved_by)
  assert int(state.steps) == len(means)


def test_layers_of_a_scan_close_one_by_one():
  trainable, state, update, told = one_part(stacked=True)
  for _ in range(4):
    new = jax.tree.map(lambda x: x + 1, trainable)
    after, state = update(state, trainable, new, None, told(0.75, 0.125))
  node = after["core"]["bypass"]
  np.testing.assert_array_equal(node.gate.open, [1, 0])
  np.testing.assert_array_equal(node.keys[:, 0, 0, 0], [2, 1])
  np.testing.assert_array_equal(node.gate.gate, [2, 1])
  assert pelt.closed_gates(after)["core"].tolist() == [False, True]


def double(name="bert"):
  with jax.enable_x64(True):
    return closable(name, dtype="float64", gate_pool="token" if name == "llama" else "mean")


def run(model, params, name="bert"):
  args = (tokens(2, 6),) if name == "llama" else (tokens(2, 6), MASK)
  return pelt.bypass(model.apply)({"params": params}, *args)


def test_a_pruned_tree_computes_what_the_closed_one_did():
  """One of each kind closed, in different layers; float64, sums in another order apart."""
  with jax.enable_x64(True):
    model, _, params, _ = double()
    paths = [place.format(i % 3) for i, place in enumerate(PLACES)]
    closed = shut(params, *paths)
    assert sorted(p for p, c in pelt.closed_gates(closed).items() if c) == sorted(
      p.removesuffix("/bypass") for p in paths
    )
    pruned = pelt.prune_gates(closed)
    want = run(model, closed)
    close(run(model, pruned), want, 1e-12)
    assert np.abs(np.asarray(run(model, params) - want)).max() > 1e-3
    before, after = (pelt.count(pelt.fold(p)).stored for p in (closed, pruned))
    assert not any(isinstance(n, nodes.Closable) for n in every_node(pruned))
  is_lora = lambda p: any(isinstance(n, nodes.LoraWeight) for n in every_node(get_at(pruned, p)))
  assert [is_lora(p) for p in paths[:2]] == [False, False]
  assert [get_at(pruned, p) for p in paths[2:]] == [None, None]
  # Of four gates a layer three times over, what four parts held is gone, and the flags of all.
  gone = 2 * (2 * 2 * 32 + 33) + (2 * 3 * 32 + 33) + (2 * 5 * 32 + 5 + 32 + 33) + 12
  assert before - after == gone


@LONG
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_all_parts_closed_are_the_base(name):
  with jax.enable_x64(True):
    model, base, params, _ = double(name)
    closed = shut(params, "")
    args = (tokens(2, 6),) if name == "llama" else (tokens(2, 6), MASK)
    close(run(model, closed, name), model.apply({"params": base}, *args), 1e-12)
    pruned = pelt.prune_gates(closed)
  assert jax.tree.structure(pruned) == jax.tree.structure(base)
  jax.tree.map(np.testing.assert_array_equal, pruned, base)


def test_scanned_layers_are_pruned_together_or_not_at_all():
  model, _, params, _ = closable(scan=True)
  kernel, bypass = (p.replace("/{}", "") for p in (PLACES[0], PLACES[3]))
  mixed = shut(params, kernel, layers=jnp.array([0, 2]))
  with pytest.raises(ValueError, match=r"to_looped(?s:.)*query/kernel: of its layers \[0, 2\]"):
    pelt.prune_gates(mixed)
  both = shut(mixed, kernel, bypass)
  pruned = pelt.prune_gates(both)
  assert get_at(pruned, bypass) is None
  looped = pelt.prune_gates(models.to_looped(pelt.fold(mixed), model))
  assert list(pelt.closed_gates(mixed)[kernel]) == [True, False, True]
  apart = [isinstance(get_at(looped, PLACES[0].format(i)), nodes.LoraWeight) for i in range(3)]
  assert apart == [False, True, False]


@LONG
def test_scanned_pruned_and_looped_outputs():
  model, _, params, _ = closable(scan=True)
  kernel, bypass = (p.replace("/{}", "") for p in (PLACES[0], PLACES[3]))
  both = shut(params, kernel, bypass)
  close(run(model, pelt.prune_gates(both)), run(model, both), 2e-6)
  mixed = shut(params, *PLACES[0].split("{}"), layers=jnp.array([0, 2]))
  looped = pelt.prune_gates(models.to_looped(pelt.fold(mixed), model))
  close(run(model.clone(scan=False), looped), run(model, mixed), 5e-6)


def low(params, *paths):
  """Params whose gates at some paths are nearly shut, whatever they read."""

  def biased(path, value):
    if not any(p in path for p in paths):
      return value
    is_gate = lambda x: isinstance(x, nodes.MeanGate)
    off = lambda x: x.replace(kernel=x.kernel * 0, bias=x.bias * 0 - 6.0)
    return jax.tree.map(lambda x: off(x) if is_gate(x) else x, value, is_leaf=is_gate)

  return update_at(params, {p: biased(p, v) for p, v in walk(params)})


@LONG
def test_training_closes_and_freezes():
  """AdamW with momentum and decay: closed parts stay bit for bit, the others and a head move."""
  model = build("bert", "classification", scan=True)
  base = random_params(model)
  ids = tokens(4, 6)
  method = pelt.chain(pelt.unipelt(**SMALL), pelt.close_gates(0.1, 2, every=1), pelt.train("head"))
  params = method.init(jax.random.key(1), base, pelt.sites(model, ids, np.ones_like(ids)))
  params = moved_but_open(params, 0.1)
  scanned = [f"bert/{p.replace('/{}', '')}" for p in PLACES]
  params = low(params, scanned[0], scanned[2])
  loss = training.recorded(training.cross_entropy, "mean_gate")
  batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": np.arange(4)}
  trees = {}
  for accumulate in (1, 2):
    tx = optax.adamw(1e-2, weight_decay=0.1)
    train = training.train_step(pelt.bypass(model.apply), loss, tx, method, accumulate=accumulate)
    trainable, frozen, state = train.init(params)
    step, seen = jax.jit(train.step), []
    for i in range(4):
      trainable, state, _ = step(trainable, frozen, state, batch, jax.random.key(i))
      seen.append(trainable)
    trees[accumulate] = seen
    if accumulate == 1:
      assert int(state.post[0].steps) == 4
  flags = [pelt.closed_gates(t) for t in trees[1]]
  names = [p.removesuffix("/bypass") for p in scanned]
  assert not any(f.any() for f in flags[0].values())
  for name, flag in flags[1].items():
    assert flag.all() == (name in (names[0], names[2])) and flag.any() == flag.all()
  assert {p: f.tolist() for p, f in pelt.closed_gates(trees[2][1]).items()} == {
    p: f.tolist() for p, f in flags[1].items()
  }
  _, first, second, last = trees[1]
  apart = _moved_paths(second, last)
  open_, closed = (scanned[1], scanned[3], "classifier"), (scanned[0], scanned[2], "generators")
  assert any(p.startswith(open_) for p in apart) and not any(p.startswith(closed) for p in apart)
  frozen_since = _moved_paths(first, second)
  assert not any(p.startswith(closed) for p in frozen_since)


def _moved_paths(a, b):
  was = {}
  map_arrays(lambda k, g, x, path: was.setdefault(path, np.asarray(x)), a)
  moved = []

  def visit(kind, group, x, path):
    if not np.array_equal(x, was[path]):
      moved.append(path)

  map_arrays(visit, b)
  return moved


def test_a_generator_keeps_what_makes_closed_layers():
  """Columns of one layer stay, those of others and the shared part move; all closed, all stay."""
  _, _, params, method = closable(scan=True)
  trainable, _ = pelt.partition(params)
  state = method.post_step.init(trainable)
  record = {p.module: None for p in gated_parts(trainable)}
  core = SELF.replace("/{}", "") + "/core"
  new = jax.tree.map(lambda x: x + 1, trainable)

  def closed_at(*layers):
    means = lambda path: np.array([0.01 if path == core and i in layers else 0.9 for i in range(3)])
    told = {p: {"mean_gate": jnp.asarray(means(p), jnp.float32)[:, None, None]} for p in record}
    after, _ = method.post_step.update(state, trainable, new, None, told)
    (made,) = after["generators"].values()
    (old,) = trainable["generators"].values()
    change = lambda name: np.asarray(getattr(made, name) - getattr(old, name))
    return {n: change(n) for n in ("embedding", "w1", "b1", "w2", "b2")}

  width = 2 * 32
  by = closed_at(1)
  want = np.repeat([1.0, 0.0, 1.0], width)
  np.testing.assert_allclose(by["b2"], want, atol=1e-6)
  np.testing.assert_allclose(by["w2"], np.broadcast_to(want, (7, 3 * width)), atol=1e-6)
  assert all(np.abs(by[n] - 1).max() < 1e-6 for n in ("embedding", "w1", "b1"))
  by = closed_at(0, 1, 2)
  assert all(np.abs(x).max() == 0 for x in by.values())


@LONG
def test_fused_projections_numbers_and_banks():
  """GPT-2's joint gates close together; a bank's row uses its own member's flags."""
  model, _, params, method = closable("gpt2", scale=0.1, gate_pool="token", fused=((0, 2), 3))
  apply, ids = pelt.bypass(model.apply), tokens(2, 6)
  _, seen = apply({"params": params}, ids, MASK, record="mean_gate")
  assert {v["mean_gate"].shape for v in seen.values()} == {(1, 1), (2, 1), (2, 2)}
  closed = shut(params, "attn")
  close(apply({"params": pelt.prune_gates(closed)}, ids), apply({"params": closed}, ids), 2e-6)
  trainable, _ = pelt.partition(params)
  state = method.post_step.init(trainable)
  _, state = method.post_step.update(state, trainable, trainable, None, seen)
  assert not any(bool(p.closed) for p in state[0].parts.values())
  bank = pelt.bank([closed, params])
  both = apply({"params": bank}, ids, rows=np.array([1, 0]))
  close(both[0], apply({"params": params}, ids)[0], 5e-6)
  close(both[1], apply({"params": closed}, ids)[1], 5e-6)


@LONG
def test_the_mean_looks_at_real_tokens(tmp_path):
  """Gates per token are averaged over the mask; and what was closed is saved."""
  model, base, params, _ = closable("llama", scan=True, gate_pool="token")
  apply = jax.jit(functools.partial(pelt.bypass(model.apply), record="mean_gate"))
  ids = tokens(2, 6)
  _, seen = apply({"params": params}, ids, MASK)
  _, alone = apply({"params": params}, ids[1:, :4], MASK[1:, :4])
  for path, told in seen.items():
    close(told["mean_gate"][:, -1:], alone[path]["mean_gate"], 2e-6)
  closed = shut(params, "")
  pelt.save(tmp_path, closed)
  loaded = pelt.load(tmp_path, base)
  assert jax.tree.structure(loaded) == jax.tree.structure(closed)
  assert all(c.all() for c in pelt.closed_gates(loaded).values())


@pytest.mark.parametrize(("options", "match"), [
  ({"epsilon": 0.0}, "epsilon must be above 0 and below 1"),
  ({"epsilon": 1.0}, "epsilon must be above 0"),
  ({"patience": 0}, "patience must be a whole number"),
  ({"every": 0}, "every must be a whole number"),
])  # fmt: skip
def test_bad_options(options, match):
  with pytest.raises(ValueError, match=match):
    pelt.close_gates(**options)


def test_bad_trees_and_records():
  model, base = built("bert", "encoder")
  sites, key = pelt.sites(model, tokens(2, 6), MASK), jax.random.key(0)
  close_gates, some = pelt.close_gates(), pelt.unipelt(**SMALL, parts=("adapter",))
  with pytest.raises(ValueError, match="params hold no gates. Chain it behind"):
    close_gates.init(key, base, sites)
  with pytest.raises(ValueError, match="several gates at .*LayerNorm"):
    pelt.chain(some, some, close_gates).init(key, base, sites)
  with pytest.raises(ValueError, match="do not train"):
    frozen = pelt.unipelt(**SMALL, parts=("adapter",), group=None)
    pelt.chain(frozen, close_gates).init(key, base, sites)
  params = pelt.chain(some, close_gates).init(key, base, sites)
  trainable, _ = pelt.partition(params)
  state = close_gates.post_step.init(trainable)
  update = close_gates.post_step.update
  with pytest.raises(ValueError, match=r"training.recorded\(loss, \"mean_gate\"\)"):
    update(state, trainable, trainable, None)
  with pytest.raises(ValueError, match='the record has no "mean_gate" of .*LayerNorm'):
    update(state, trainable, trainable, None, {"x": {"gates": jnp.ones(2)}})
  with pytest.raises(ValueError, match="hold no gates of pelt.close_gates"):
    pelt.prune_gates(base)
  with pytest.raises(ValueError, match="call it outside jit"):
    jax.jit(pelt.prune_gates)(params)
  with pytest.raises(ValueError, match="names of the values"):
    training.recorded(training.cross_entropy)
