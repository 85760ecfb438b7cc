"""Stacks, averages and soups: formulas by hand, heads, labels, banks, bad input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes, training
from pelt_jax._transform import add_bypass
from pelt_jax._walk import get_at, update_at, walk
from pelt_jax.methods._named import check_tasks
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

LONG = pytest.mark.parity
D = 4


class Layer(nn.Module):
  """norm(x + ffn(x))."""

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(D, name="ffn", param_dtype=jnp.float64)(x)
    return nn.LayerNorm(name="norm", param_dtype=jnp.float64, dtype=jnp.float64)(x + h)


# Where a net sits, and what it reads of the input x, the sublayer's output h, moved by d, and norm.
PLACES = {
  "after": ("ffn", nodes.After, {}, lambda x, h, d, norm: h + d),
  "parallel": ("ffn", nodes.After, {"tap": "in"}, lambda x, h, d, norm: x),
  "sum": ("ffn", nodes.After, {"tap": "in", "plus": True}, lambda x, h, d, norm: x + h + d),
  "around": ("norm", nodes.AroundNorm, {}, lambda x, h, d, norm: norm(x + h + d)),
  "before": ("norm", nodes.Before, {}, lambda x, h, d, norm: x + h + d),
  "before, tapped": ("norm", nodes.Before, {"tap": "in"}, lambda x, h, d, norm: x + h),
}


@pytest.fixture
def float64():
  # Flax's LayerNorm promotes float64 with float32, which strict promotion forbids.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield


def layer():
  """The layer, its params and input, three nets of unequal width and their formula."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape))
  model, x = Layer(), array(2, 3, D)
  base = jax.tree.map(lambda v: array(*v.shape), model.init(jax.random.key(0), x)["params"])
  nets = {
    name: nodes.Bottleneck(array(D, m), array(m), array(m, D), array(D), activation="tanh")
    for name, m in (("a", 2), ("b", 3), ("c", 4))
  }

  def formula(name):
    net = jax.tree.map(np.asarray, nets[name])
    return lambda x: np.tanh(x @ net.down + net.down_bias) @ net.up + net.up_bias

  return model, base, x, nets, {name: formula(name) for name in nets}


def at(place, model, base, x, net):
  path, kind, fields, _ = PLACES[place]
  return add_bypass(base, pelt.sites(model, x), path, kind(branch=net, **fields))


def by_hand(place, base, x, compose):
  """The layer where `compose(read)` is what the nets add, `read(d)` what they read by then."""
  base, x = jax.tree.map(np.asarray, base), np.asarray(x)

  def norm(s):
    apart = s - s.mean(-1, keepdims=True)
    scale, bias = base["norm"]["scale"], base["norm"]["bias"]
    return apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-6) * scale + bias

  h = x @ base["ffn"]["kernel"] + base["ffn"]["bias"]
  return norm(x + h + compose(lambda d: PLACES[place][3](x, h, d, norm)))


@pytest.mark.parametrize("place", list(PLACES))
def test_formulas_and_nesting(place, float64):
  """In float64, on one layer: a stack of an average, an average of a stack, other orders."""
  model, base, x, nets, u = layer()
  one = {name: at(place, model, base, x, net) for name, net in nets.items()}
  apply = pelt.bypass(model.apply)
  weights = {"b": 1.5, "c": -0.25}

  def stack_of_average(read):
    first = u["a"](read(0))
    return first + 1.5 * u["b"](read(first)) - 0.25 * u["c"](read(first))

  mean = pelt.average({n: one[n] for n in "bc"}, weights=weights, normalize=False)
  got = apply({"params": pelt.stack({"a": one["a"], "mean": mean})}, x)
  close(got, by_hand(place, base, x, stack_of_average), 1e-13)

  def average_of_stack(read):
    first = u["a"](read(0))
    return 0.2 * (first + u["b"](read(first))) + 0.8 * u["c"](read(0))

  pair = pelt.stack({n: one[n] for n in "ab"})
  params = pelt.average({"pair": pair, "c": one["c"]}, weights={"pair": 1, "c": 4})
  got = apply({"params": params}, x)
  close(got, by_hand(place, base, x, average_of_stack), 1e-13)

  uniform = lambda read: sum(u[n](read(0)) for n in "abc") / 3
  close(apply({"params": pelt.average(one)}, x), by_hand(place, base, x, uniform), 1e-13)
  # The order matters where a net reads what the others moved.
  turned = apply({"params": pelt.stack({n: one[n] for n in "ba"})}, x)
  same = np.abs(turned - apply({"params": pair}, x)).max() < 1e-12
  assert same == (place in ("parallel", "before, tapped"))


def test_members_drop_apart(float64):
  model, base, x, nets, _ = layer()
  apply = pelt.bypass(model.apply)
  run = lambda p: apply({"params": p}, x, train_nodes=True, rngs={"dropout": jax.random.key(0)})
  net = nets["a"].replace(dropout=nodes.Dropout(jnp.asarray(0.5)), up=100 * nets["a"].up)
  for place in ("parallel", "around"):
    one = at(place, model, base, x, net)
    twice = pelt.average({"one": one, "same": one})
    assert np.abs(run(twice) - run(one)).max() > 1e-2
    two = pelt.stack({"one": one, "same": one})
    three = pelt.average({"one": one, "same": one}, weights=dict(one=1, same=1), normalize=False)
    assert (
      np.abs(run(two) - run(at(place, model, base, x, net.replace(up=2 * net.up)))).max() > 1e-2
    )
    assert place != "parallel" or np.abs(run(two) - run(three)).max() < 1e-9


def tasks(name="bert", style="pfeiffer", task="encoder", count=3, **options):
  """A tiny model and adapters of several tasks, with heads where the model has one."""
  model, base = built(name, task)
  sites = pelt.sites(model, tokens(2, 6))
  options = {"bottleneck": 5, "train_norms": False} | options
  method = pelt.adapter(style, **options)
  if task == "classification":
    method = pelt.chain(method, pelt.train("head"))
  made = [moved(method.init(jax.random.key(i), base, sites), 0.1 + i / 10) for i in range(count)]
  return model, base, sites, dict(zip(("sst2", "trec", "wnut"), made, strict=False))


@LONG
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_of_one_and_of_equals(name):
  model, base, _, some = tasks(name)
  apply, ids, one = jax.jit(pelt.bypass(model.apply)), tokens(2, 6), some["sst2"]
  want, plain = apply({"params": one}, ids), model.apply({"params": base}, ids)
  equal = dict.fromkeys(some, one)
  nothing = dict(zip(some, (1.0, -2.0, 1.0), strict=True))
  for params in (pelt.stack({"a": one}), pelt.soup(equal), pelt.average(equal)):
    close(apply({"params": params}, ids), want, 2e-6)
  params = pelt.average(equal, weights=nothing, normalize=False)
  close(apply({"params": params}, ids), plain, 2e-6)
  alone = pelt.average(some, weights={"sst2": 0.0, "trec": 0.0, "wnut": -3.0})
  close(apply({"params": alone}, ids), apply({"params": some["wnut"]}, ids), 2e-6)


base_of = lambda params: pelt.partition(params, extra=True)[2]


def test_soup_of_parameters():
  """Arrays of the adapters and heads by hand; a head chosen; LoRAs; fixed numbers stay."""
  _, base, sites, some = tasks(style="scaled_parallel", task="classification")
  weights = {"sst2": 2.0, "trec": -1.0, "wnut": 3.0}
  params = pelt.soup(some, weights=weights)
  assert jax.tree.structure(params) == jax.tree.structure(some["sst2"])
  shares = [0.5, -0.25, 0.75]
  for path, leaf in jax.tree_util.tree_leaves_with_path(pelt.partition(params)[0]):
    parts = [dict(jax.tree_util.tree_leaves_with_path(p))[path] for p in some.values()]
    want = sum(w * np.asarray(x, np.float64) for w, x in zip(shares, parts, strict=True))
    close(leaf, want, 1e-6)
  for leaf, want in zip(*map(jax.tree.leaves, map(base_of, (params, some["sst2"]))), strict=True):
    np.testing.assert_array_equal(leaf, want)
  scaling = next(n.branch.scaling for _, n in walk(params) if isinstance(n, nodes.After))
  np.testing.assert_array_equal(scaling, 4.0)
  chosen = pelt.soup(some, weights=weights, normalize=False, head="trec")
  kernel = lambda p: p["classifier"]["kernel"].value
  np.testing.assert_array_equal(kernel(chosen), kernel(some["trec"]))
  lora = pelt.lora(2, targets="query").init(jax.random.key(0), base, sites)
  lora = {n: moved(lora, s) for n, s in (("a", 0.1), ("b", 0.3))}
  factor = lambda p: next(n.a for _, n in walk(p) if isinstance(n, nodes.LoraWeight))
  close(factor(pelt.soup(lora)), (factor(lora["a"]) + factor(lora["b"])) / 2, 1e-6)


@LONG
def test_scanned_looped_saved_and_refused_by_merge(tmp_path):
  model, base, _, some = tasks()
  weights = {"mean": 2.0, "sst2": -1.0}
  mean = pelt.average({n: some[n] for n in ("trec", "wnut")})
  more = pelt.average({"mean": mean, "sst2": some["sst2"]}, weights=weights)
  params = pelt.stack(some | {"more": more})
  apply, ids = jax.jit(pelt.bypass(model.apply)), tokens(2, 6)
  want = apply({"params": params}, ids)
  looped = pelt.bypass(model.clone(scan=False).apply)
  close(looped({"params": models.to_looped(params, model)}, ids), want, 5e-6)
  pelt.save(tmp_path / "stack", params)
  loaded = pelt.load(tmp_path / "stack", base)
  np.testing.assert_array_equal(apply({"params": loaded}, ids), want)
  with pytest.raises(ValueError, match="activation 'relu' stands between its two matrices"):
    pelt.merge(params)
  with pytest.raises(RuntimeError, match=r"use pelt\.bypass"):
    model.apply({"params": params}, ids)


@LONG
def test_weights_are_numbers_of_the_program():
  """Other weights take the same program; traced ones may be searched by their gradient."""
  model, _, _, some = tasks(count=2)
  apply, ids = jax.jit(pelt.bypass(model.apply)), tokens(2, 6)

  @jax.jit
  def total(weights):
    params = pelt.average(some, weights=weights, normalize=False)
    return jnp.sum(pelt.bypass(model.apply)({"params": params}, ids) ** 2)

  weights = {"sst2": 0.3, "trec": 0.9}
  want = jnp.sum(apply({"params": pelt.average(some, weights=weights, normalize=False)}, ids) ** 2)
  close(total(weights), want, 1e-5)
  slope, by = jax.grad(total)(weights)["trec"], 0.01
  up, down = (total(weights | {"trec": 0.9 + s * by}) for s in (1, -1))
  close(slope, (up - down) / (2 * by), 1e-2)
  apply({"params": pelt.average(some, weights={"sst2": 5, "trec": 1})}, ids)
  assert apply._cache_size() == 1


def branch(params):
  return next(n.branch for _, n in walk(params) if isinstance(n, nodes.AroundNorm))


def test_heads_are_chosen_and_adapters_train_by_name():
  _, base, sites, some = tasks(task="classification")
  with pytest.raises(ValueError, match=r"all trained leaves of the model itself.*head='sst2'"):
    pelt.stack(some)
  params = pelt.average(some, head="trec", train=("trec",))
  np.testing.assert_array_equal(
    params["classifier"]["kernel"].value, some["trec"]["classifier"]["kernel"].value
  )
  assert pelt.count(params, sites).trainable == pelt.count(some["trec"], sites).trainable
  assert pelt.count(params, sites).head == 32 * 5 + 5
  every = pelt.average(some, head="trec")
  assert pelt.count(every, sites).trainable == 3 * pelt.count(some["trec"], sites).trainable
  none = pelt.average(some, head="trec", train=())
  with pytest.raises(ValueError, match="nothing in params trains"):
    pelt.partition(none)
  # One head needs no choice: a language's adapter has none.
  language = pelt.adapter("pfeiffer", bottleneck=3).init(jax.random.key(9), base, sites)
  params = pelt.stack({"language": language, "task": some["wnut"]}, train="task")
  assert pelt.count(params, sites).head == 32 * 5 + 5
  labels = [set(jax.tree.leaves(pelt.labels(b))) for b in branch(params).branches]
  assert labels == [{"frozen"}, {"trainable"}]


@LONG
def test_training_moves_what_it_should():
  model, base, sites, some = tasks(task="classification")
  language = pelt.adapter("pfeiffer", bottleneck=3).init(jax.random.key(9), base, sites)
  params = pelt.stack({"language": language, "task": some["wnut"]}, train="task")
  loss = lambda apply, params, batch, key: jnp.mean(apply({"params": params}, batch["ids"]) ** 2)
  train = training.train_step(pelt.bypass(model.apply), loss, optax.adam(1e-2))
  trainable, rest, state = train.init(params)
  step = jax.jit(train.step)
  new, _, _ = step(trainable, rest, state, {"ids": tokens(2, 6)}, jax.random.key(0))
  before, after = branch(params), branch(pelt.combine(new, rest))
  np.testing.assert_array_equal(after.branches[0].down, before.branches[0].down)
  assert np.abs(after.branches[1].down - before.branches[1].down).max() > 1e-3


@LONG
def test_a_stack_may_lack_layers():
  """As MAD-X leaves the language out of the last layer."""
  model, base = built("bert", "encoder")
  looped = model.clone(scan=False)
  base, ids = models.to_looped(base, model), tokens(2, 6)
  sites = pelt.sites(looped, ids)
  made = lambda key, layers: moved(
    pelt.adapter("pfeiffer", bottleneck=5, layers=layers).init(jax.random.key(key), base, sites)
  )
  low, high, every = made(1, (0, 1)), made(2, (1, 2)), made(3, (0, 1, 2))
  paths = [f"encoder/layer/{i}/output/LayerNorm/bypass" for i in range(3)]
  params = pelt.stack({"low": low, "high": high})
  branches = [get_at(params, path).branch for path in paths]
  assert [type(b).__name__ for b in branches] == ["Bottleneck", "Series", "Bottleneck"]
  alone = [get_at(p, paths[i]) for i, p in enumerate((low, params, high))]
  want = update_at(every, dict(zip(paths, alone, strict=True)))
  apply = pelt.bypass(looped.apply)
  np.testing.assert_array_equal(apply({"params": params}, ids), apply({"params": want}, ids))
  with pytest.raises(ValueError, match=r"different places.*average adapters of one placement"):
    pelt.average({"every": every, "high": high})


def gated(params):
  """Params whose placement has an array beside its branch."""
  path, node = next((p, n) for p, n in walk(params) if isinstance(n, nodes.AroundNorm))
  gate = nodes.MeanGate(jnp.zeros((3, 32, 1)), jnp.zeros((3, 1)), stacked=1)
  return update_at(params, {path: nodes.Mixed(gate=gate, branch=node.branch, stacked=1)})


def test_what_cannot_be_composed_is_named():
  _, base, sites, some = tasks(count=2)
  init = lambda method, seed=0: method.init(jax.random.key(seed), base, sites)
  pfeiffer = pelt.adapter("pfeiffer", bottleneck=5)
  other_model, other_base = built("llama", "encoder")
  elsewhere = pfeiffer.init(jax.random.key(0), other_base, pelt.sites(other_model, tokens(2, 6)))
  moved_base = jax.tree.map(lambda x: x + 1, base)
  others = {
    "no adapter": (base, "holds no adapter"),
    "a prefix": (init(pelt.prefix_tuning(2)), "holds a Prefix"),
    "a gate of its own": (gated(some["sst2"]), "holds a Mixed"),
    "lora": (init(pelt.chain(pfeiffer, pelt.lora(2, targets="query"))), "holds a LoraWeight"),
    "placement": (init(pelt.adapter("parallel", bottleneck=5)), "at different places"),
    "model": (elsewhere, "at different places"),
    "base": (
      pfeiffer.init(jax.random.key(0), moved_base, sites),
      "have other values at .* of the base",
    ),
  }
  for compose in (pelt.stack, pelt.average):
    for other, match in others.values():
      with pytest.raises(ValueError, match=match):
        compose(some | {"wnut": other})
    for options, match in (
      ({"head": "mnli"}, r"head='mnli' is none of the adapters \['sst2', 'trec'\]"),
      ({"train": ("sst2", "mnli")}, "train='mnli' is none of"),
    ):
      with pytest.raises(ValueError, match=match):
        compose(some, **options)
  for compose in (pelt.stack, pelt.average, pelt.soup):
    with pytest.raises(ValueError, match="adapters is empty"):
      compose({})
    with pytest.raises(TypeError, match="adapters must be params by name|Mapping"):
      compose(list(some.values()))
  for wrong, match in (
    (list(some.values()), 'tasks must be params by name, {"task": params, ...}, got list'),
    ({"a": "runs/a/adapter"}, r"tasks\['a'\] must be params, such as pelt.load.* gives, got str"),
  ):
    with pytest.raises(TypeError, match=match):
      check_tasks("tasks", wrong)
  # At one place, but another tap.
  llama = pelt.sites(other_model, tokens(2, 6))
  tapped = pelt.adapter("parallel", bottleneck=5, tap="residual")
  tapped = tapped.init(jax.random.key(0), other_base, llama)
  with pytest.raises(ValueError, match="are placed differently at 'layers/mlp'"):
    pelt.stack({"a": elsewhere, "b": tapped})
  for weights, match in (
    ({"sst2": 1.0}, r"which differ in \['trec'\]"),
    ({"sst2": 1.0, "trec": 1.0, "mnli": 1.0}, r"which differ in \['mnli'\]"),
    ({"sst2": 1.0, "trec": float("nan")}, r"weights\['trec'\] must be a finite number"),
    ({"sst2": 1.0, "trec": "2"}, r"weights\['trec'\] must be a finite number"),
    ({"sst2": 1.0, "trec": -1.0}, "sum to 0, so they cannot be divided by their sum"),
  ):
    for compose in (pelt.average, pelt.soup):
      with pytest.raises(ValueError, match=match):
        compose(some, weights=weights)
  with pytest.raises(TypeError, match="weights must be numbers by name|Mapping"):
    pelt.average(some, weights=[1, 2])
  wide = init(pelt.adapter("pfeiffer", bottleneck=4))
  heads = pelt.chain(pfeiffer, pelt.train("embeddings/LayerNorm"))
  tuned = {n: init(heads, i) for i, n in enumerate("ab")}
  scaled = {
    n: init(pelt.adapter("parallel", bottleneck=5, scaling=s)) for n, s in (("a", 1.0), ("b", 2.0))
  }
  for members, options, match in (
    (some | {"wide": wide}, {}, "the adapters 'sst2' and 'wide' have other widths"),
    ({"a": base, "b": base}, {}, "holds nothing that a method added"),
    (some | {"b": tuned["b"]}, {}, "placed or built differently"),
    (tuned, {"weights": {"a": 1, "b": 1}, "normalize": False}, "do not sum to 1"),
    (scaled, {}, "have other fixed numbers at .*scaling"),
    (some | {"model": elsewhere}, {}, "are at different places"),
    (some | {"base": others["base"][0]}, {}, "other values at"),
  ):
    with pytest.raises(ValueError, match=match):
      pelt.soup(members, **options)


@LONG
def test_a_stack_in_a_fusion_is_refused():
  """Its second adapter would have to read what a fusion cannot tell it."""
  model, base, sites, some = tasks(count=2)
  pair = pelt.stack(some)
  params = pelt.adapter_fusion({"a": pair, "b": pair}).init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="lies inside a branch that cannot tell it"):
    pelt.bypass(model.apply)({"params": params}, tokens(2, 6))
  fused = pelt.adapter_fusion(some).init(jax.random.key(0), base, sites)
  both = pelt.stack({"first": some["sst2"], "fused": fused})
  assert np.isfinite(pelt.bypass(model.apply)({"params": both}, tokens(2, 6))).all()
