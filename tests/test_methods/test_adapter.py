"""Adapters: each style's formula on every family, counts, identities, bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes
from pelt_jax._node import Bypass, Chain
from pelt_jax._transform import add_bypass
from pelt_jax._walk import get_at, walk
from pelt_jax.methods._adapter_drop import without_adapters
from tests.test_models.helpers import VOCAB, build, built, close, random_params, tokens

LONG = pytest.mark.parity
STYLES = ("houlsby", "pfeiffer", "parallel", "scaled_parallel")
SMALL = {"bottleneck": 5}
SHORT = {("bert", "houlsby"), ("bert", "pfeiffer"), ("llama", "pfeiffer"), ("llama", "residual")}


class Tell(Bypass):
  """Records what a module takes and gives."""

  def __call__(self, call, x, *args, **kwargs):
    out = call.next(x, *args, **kwargs)
    call.record("in", x)
    call.record("out", out[0] if isinstance(out, tuple) else out)
    return out


def moved(params, scale=0.3):
  """Every trainable array off its start."""
  trainable, rest = pelt.partition(params)
  flat, tree = jax.tree.flatten(trainable)
  rng = np.random.default_rng(0)
  flat = [x + scale * jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in flat]
  return pelt.combine(jax.tree.unflatten(tree, flat), rest)


def inputs(name):
  ids = tokens(2, 6)
  return (ids, np.ones_like(ids), tokens(2, 5)) if name in ("t5", "bart") else (ids,)


TASK = {"t5": "seq2seq", "bart": "seq2seq"}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
  "name", ["bert", *(pytest.param(n, marks=LONG) for n in ("llama", "gpt2", "t5", "bart"))]
)
def test_zero_up_is_the_base(name, style):
  """Eagerly bit for bit, on loops; the norms that Houlsby's train are the model's own."""
  model, scanned = built(name, TASK.get(name, "encoder"))
  looped = model.clone(scan=False)
  base = models.to_looped(scanned, model)
  method = pelt.adapter(style, init="zero_up", **SMALL)
  args = inputs(name)
  kwargs = {"decoder_input_ids": args[2]} if len(args) == 3 else {}
  params = method.init(jax.random.key(1), base, pelt.sites(looped, *args[:1], **kwargs))
  run = pelt.bypass(looped.apply)
  want = looped.apply({"params": base}, *args[:1], **kwargs)
  np.testing.assert_array_equal(run({"params": params}, *args[:1], **kwargs), want)
  if name == "bert":  # compiled, fusion rounds otherwise
    jitted = (
      jax.jit(f)({"params": p}, *args[:1]) for f, p in ((run, params), (looped.apply, base))
    )
    close(*jitted, 1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_taken_out_the_base_is_what_it_was(style):
  model, scanned = built("bert", "encoder")
  looped, base = model.clone(scan=False), models.to_looped(scanned, model)
  sites = pelt.sites(looped, tokens(2, 6))
  method = pelt.adapter(style, train_norms=False, **SMALL)
  params = moved(method.init(jax.random.key(1), base, sites))
  bare = without_adapters(params, range(3))
  assert jax.tree.structure(bare) == jax.tree.structure(base)
  jax.tree.map(np.testing.assert_array_equal, bare, base)


ACT = {
  "relu": lambda x: np.maximum(x, 0),
  "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def branch(node, x, layer):
  """u(x) of one layer, in NumPy."""
  b = node.branch
  down, down_bias, up, up_bias = (
    np.asarray(v)[layer] for v in (b.down, b.down_bias, b.up, b.up_bias)
  )
  out = ACT[b.activation](x @ down + down_bias) @ up + up_bias
  return out if b.scaling is None else np.asarray(b.scaling)[layer] * out


# Where one family's layer takes and gives what the formulas name: attention's output, its residual
# stream and input; the same of the feed-forward network; what stands after the layer.
PLACES = {
  "llama": (
    ("self_attn", "input_layernorm", "self_attn"),
    ("mlp", "post_attention_layernorm", "mlp"),
  ),
  "gpt2": (("attn", "ln_1", "attn"), ("mlp", "ln_2", "mlp")),
  "bert": (
    ("attention/output/dropout", "attention", "attention"),
    ("output/dropout", "intermediate", "intermediate"),
  ),
}
LAYERS = {"llama": "layers", "gpt2": "h", "bert": "encoder/layer"}
NORM = {"bert": ("attention/output/LayerNorm", "output/LayerNorm")}


@functools.cache
def float64(name):
  model = build(name, "encoder", scan=True, dtype="float64")
  return model, random_params(model)


@pytest.mark.parametrize(("name", "style"), [
  pytest.param(name, style, marks=[] if (name, style) in SHORT else [LONG])
  for name in ("bert", "llama", "gpt2")
  for style in (*STYLES, "residual")
])  # fmt: skip
def test_the_formula_by_hand(name, style):
  """What each layer hands on, from what its sublayers took and gave."""
  with jax.enable_x64(True):
    model, base = float64(name)
    sites, ids = pelt.sites(model, tokens(2, 6)), tokens(2, 6)
    options = {"style": "parallel", "tap": "residual"} if style == "residual" else {"style": style}
    stack = LAYERS[name]
    params = base
    for place in {p for three in PLACES[name] for p in three}:
      params = add_bypass(params, sites, f"{stack}/{place}", Tell(stacked=1))
    params = moved(pelt.adapter(**options, **SMALL).init(jax.random.key(1), params, sites))
    last, seen = pelt.bypass(model.apply)({"params": params}, ids, record=("in", "out"))
    found = {
      path.removesuffix("/bypass").removeprefix(f"{stack}/"): node
      for path, value in walk(params)
      for node in (value.nodes if isinstance(value, Chain) else (value,))
      if isinstance(node, nodes.After | nodes.AroundNorm)
    }
    assert len(found) == (2 if style == "houlsby" else 1)
    value = lambda path, side: np.asarray(seen[f"{stack}/{path}"][side])
    norm = lambda x, n, i: normalized(name, params, stack, i, n, x)
    for n in range(3):
      for i, (out, stream, source) in enumerate(PLACES[name]):
        h, r, x = value(out, "out")[n], value(stream, "in")[n], value(source, "in")[n]
        node = found.get(NORM[name][i] if name == "bert" and style == "pfeiffer" else out)
        if style == "houlsby":
          total = r + h + branch(node, h, n)
        elif node is None:
          total = r + h
        elif style == "pfeiffer":
          total = r + h + branch(node, norm(r + h, n, i) if name == "bert" else r + h, n)
        else:
          total = r + h + branch(node, r if style == "residual" else x, n)
        got = norm(total, n, i) if name == "bert" else total
        if i == 0:
          want = value(PLACES[name][1][1], "in")[n]
        elif n < 2:
          want = value(PLACES[name][0][1], "in")[n + 1]
        else:
          want, got = last, final(name, params, got)
        close(want, got, 1e-12)


def normalized(name, params, stack, i, layer, x):
  scale, bias = (
    np.asarray(_plain(get_at(params, f"{stack}/{NORM[name][i]}/{n}")))[layer]
    for n in ("scale", "bias")
  )
  return _norm(x, scale, bias, 1e-12)


def _plain(leaf):
  leaf = leaf.base if isinstance(leaf, nodes.Guard) else leaf
  return leaf.materialize() if isinstance(leaf, nodes.Tuned) else leaf


def _norm(x, scale, bias, eps):
  apart = x - x.mean(-1, keepdims=True)
  return apart / np.sqrt((apart**2).mean(-1, keepdims=True) + eps) * scale + bias


def final(name, params, x):
  if name == "bert":
    return x
  if name == "gpt2":
    scale, bias = (np.asarray(_plain(get_at(params, f"ln_f/{n}"))) for n in ("scale", "bias"))
    return _norm(x, scale, bias, 1e-5)
  scale = np.asarray(_plain(get_at(params, "norm/scale")))
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def test_counts_are_the_published_ones():
  """Pfeiffer's on BERT-base, m = 48; Houlsby's on BERT-large, m = 64, norms apart."""

  def counted(method, **sizes):
    config = {"model_type": "bert", "vocab_size": 7, "max_position_embeddings": 8} | sizes
    model = models.from_config(config, task="encoder", scan=True)
    ids = jnp.zeros((1, 4), jnp.int32)
    base = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    sites = pelt.sites(model, ids)
    return pelt.count(jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites), base))

  base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
  large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
  assert counted(pelt.adapter("pfeiffer"), **base).trainable == 894_528
  counts = counted(pelt.adapter("houlsby"), **large, intermediate_size=4096)
  assert counts.trainable == 6_343_680 + 100_352
  assert counted(pelt.adapter("houlsby", train_norms=False), **large).trainable == 6_343_680
  for m, share in ((8, 0.28), (64, 1.92), (256, 7.56)):
    counts = counted(pelt.adapter("houlsby", bottleneck=m), **large)
    assert round(100 * counts.trainable / 335_141_888, 2) == share  # of BERT-large, uncased
  d, m, layers = 768, 384, 12
  assert counted(pelt.adapter("parallel"), **base).trainable == layers * (2 * d * m + m + d)
  learned = counted(pelt.adapter("scaled_parallel", scaling="learned"), **base)
  assert learned.trainable == layers * (2 * d * m + m + d + 1)
  channels = counted(pelt.adapter("scaled_parallel", scaling="channel", norm=True), **base)
  assert channels.trainable == layers * (2 * d * m + m + 4 * d)


@pytest.mark.parametrize(("style", "spread"), [("houlsby", 0.01 * 0.8796), ("pfeiffer", 0.02)])
def test_starts(style, spread):
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, tokens(1, 4))
  params = pelt.adapter(style, bottleneck=400).init(jax.random.key(0), base, sites)
  found = [n.branch for _, n in walk(params) if isinstance(n, nodes.After)]
  for b in found:
    for array in (b.down, b.up):
      np.testing.assert_allclose(np.std(array), spread, rtol=0.02)
      assert abs(np.asarray(array)).max() < (0.02 + 1e-7 if style == "houlsby" else 0.2)
    assert not np.asarray(b.down_bias).any() and not np.asarray(b.up_bias).any()
  paths = [b.down for b in found]
  assert len({float(x.ravel()[0]) for p in paths for x in p}) == sum(len(p) for p in paths)


@pytest.mark.parametrize("scaling", [None, "learned", "channel"])
def test_parallel_ones_start_from_loras_a_and_zero(scaling):
  """W_down from U(-d^-1/2, d^-1/2), of variance 1/(3 d); s = 4, or what trains from 1."""
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, tokens(1, 4))
  method = pelt.adapter("scaled_parallel", bottleneck=400, scaling=scaling)
  params = method.init(jax.random.key(0), base, sites)
  (b,) = (n.branch for _, n in walk(params) if isinstance(n, nodes.After))
  np.testing.assert_allclose(np.std(b.down), (3 * 32) ** -0.5, rtol=0.02)
  assert 0.99 * 32**-0.5 < np.abs(b.down).max() <= 32**-0.5
  assert not any(np.asarray(x).any() for x in (b.down_bias, b.up, b.up_bias))
  start = b.scaling if scaling is None else b.scaling.value
  assert start.shape == ((3, 32) if scaling == "channel" else (3,))
  np.testing.assert_array_equal(start, 4.0 if scaling is None else 1.0)


def test_two_small_matrices_are_near_the_identity():
  """|u(x)| <= |W_up| |W_down| |x|; on average sigma² sqrt(m d) |x| if linear, else below."""
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, tokens(1, 4))
  params = pelt.adapter("houlsby").init(jax.random.key(0), base, sites)
  (first, *_) = (n.branch for _, n in walk(params) if isinstance(n, nodes.After))
  b = jax.tree.map(lambda x: x[0], first).replace(stacked=0)
  x = jax.random.normal(jax.random.key(1), (500, 32))
  bound = np.linalg.norm(b.down, 2) * np.linalg.norm(b.up, 2)
  spread = (0.8796 * 0.01) ** 2 * math.sqrt(64 * 32)
  for activation in ("gelu_tanh", "gelu", "relu", "silu", "tanh", "identity"):
    u = b.replace(activation=activation)(None, x)
    share = np.linalg.norm(u, axis=-1) / np.linalg.norm(x, axis=-1)
    assert share.max() <= bound
    assert share.mean() < 1.1 * spread
  np.testing.assert_allclose(share.mean(), spread, rtol=0.1)  # the identity's


def test_parallel_with_the_identity_is_a_lora():
  """x W_down W_up beside the feed-forward network's one matrix: LoRA on it, with s = alpha / r."""
  import flax.linen as nn

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x + nn.Dense(4, name="ffn")(x)

  model, x = Net(), jax.random.normal(jax.random.key(0), (2, 3, 4))
  base = model.init(jax.random.key(1), x)["params"]
  roles = {"ffn": (pelt.Role("ffn", "after", "in"),)}
  sites = pelt.sites(model, x, roles=roles)
  method = pelt.adapter("scaled_parallel", bottleneck=2, activation="identity", scaling=1.5)
  params = moved(method.init(jax.random.key(2), base, sites))
  b = params["ffn"]["bypass"].branch
  lora = pelt.lora(rank=2, alpha=3, targets="ffn").init(jax.random.key(3), base, sites)
  kernel = lora["ffn"]["kernel"].replace(a=b.down, b=b.up)
  bias = base["ffn"]["bias"] + 1.5 * (b.down_bias @ b.up + b.up_bias)
  lora = {"ffn": {"kernel": kernel, "bias": bias}}
  got, want = (pelt.bypass(model.apply)({"params": p}, x) for p in (params, lora))
  np.testing.assert_allclose(got, want, atol=1e-6)


@LONG
def test_pfeiffers_beside_barts_cross_attention():
  """All three sublayers of a decoder, each with its own norm twice."""
  with jax.enable_x64(True):
    model = build("bart", "seq2seq", scan=True, dtype="float64")
    base, ids, targets = random_params(model), tokens(2, 6), tokens(2, 5)
    sites = pelt.sites(model, ids, decoder_input_ids=targets)
    stack = "model/decoder/layers"
    places = ("self_attn", "encoder_attn", "fc1")
    outs = ("self_attn_dropout", "encoder_attn_dropout", "ffn_dropout")
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    params = base
    for place in (*places, *outs):
      params = add_bypass(params, sites, f"{stack}/{place}", Tell(stacked=1))
    where = ("attention_block", "cross_attention_block", "ffn")
    method = pelt.adapter("pfeiffer", targets=where, **SMALL)
    params = moved(method.init(jax.random.key(1), params, sites))
    _, seen = pelt.bypass(model.apply)(
      {"params": params}, ids, decoder_input_ids=targets, record=("in", "out")
    )
    value = lambda path, side: np.asarray(seen[f"{stack}/{path}"][side])
    for n in range(3):
      following = [*(value(p, "in")[n] for p in places[1:])]
      following += [value(places[0], "in")[n + 1]] if n < 2 else []
      for i, want in enumerate(following):
        node = get_at(params, f"{stack}/{norms[i]}/bypass")
        scale, bias = (
          np.asarray(_plain(get_at(params, f"{stack}/{norms[i]}/{k}")))[n]
          for k in ("scale", "bias")
        )
        norm = lambda s, a=scale, b=bias: _norm(s, a, b, 1e-5)
        total = value(places[i], "in")[n] + value(outs[i], "out")[n]
        close(norm(total + branch(node, norm(total), n)), want, 1e-12)


@LONG
@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=LONG)])
def test_heads_before_their_projection(name):
  """Multi-head parallel: (heads + u(x)) W_o."""
  model, base = built(name, "encoder")
  sites, ids = pelt.sites(model, tokens(2, 6)), tokens(2, 6)
  method = pelt.adapter("parallel", targets="attention_heads", **SMALL)
  params = moved(method.init(jax.random.key(1), base, sites))
  (node,) = (n for _, n in walk(params) if isinstance(n, nodes.Before))
  out = "self_attn/o_proj" if name == "llama" else "attention/output/dense"
  path = f"{LAYERS[name]}/{out}"
  told = add_bypass(params, sites, path, Tell(stacked=1))
  inner = get_at(told, f"{path}/bypass")
  assert isinstance(inner, Chain)  # the adapter inside, the witness outside
  _, seen = pelt.bypass(model.apply)({"params": told}, ids, record=("in", "out"))
  source = add_bypass(params, sites, f"{LAYERS[name]}/{PLACES[name][0][2]}", Tell(stacked=1))
  _, above = pelt.bypass(model.apply)({"params": source}, ids, record=("in", "out"))
  x = np.asarray(above[f"{LAYERS[name]}/{PLACES[name][0][2]}"]["in"])
  kernel = np.asarray(_plain(get_at(params, f"{path}/kernel")))
  for n in range(3):
    heads = np.asarray(seen[path]["in"])[n] + branch(node, x[n], n)
    want = heads @ kernel[n]
    if name == "bert":
      want = want + np.asarray(_plain(get_at(params, f"{path}/bias")))[n]
    close(np.asarray(seen[path]["out"])[n], want, 1e-5)


@LONG
@pytest.mark.parametrize(
  "style", ["houlsby", *(pytest.param(s, marks=LONG) for s in ("pfeiffer", "scaled_parallel"))]
)
def test_looped_equals_scanned_and_rematerialized(style):
  model, base = built("bert", "encoder")
  method, ids = pelt.adapter(style, **SMALL), tokens(2, 6)
  params = moved(method.init(jax.random.key(1), base, pelt.sites(model, ids)))
  want = jax.jit(pelt.bypass(model.apply))({"params": params}, ids)
  looped = models.to_looped(params, model)
  got = pelt.bypass(model.clone(scan=False).apply)({"params": looped}, ids)
  close(got, want, 5e-6)
  remat = pelt.bypass(model.clone(remat=True).apply)({"params": params}, ids)
  close(remat, want, 5e-6)
  with pytest.raises(RuntimeError, match="use pelt.bypass"):
    model.apply({"params": params}, ids)


@LONG
def test_padding_changes_nothing_and_rows_stand_alone():
  model, base = built("bert", "encoder")
  sites = pelt.sites(model, tokens(2, 6))
  params = moved(pelt.adapter("pfeiffer", **SMALL).init(jax.random.key(1), base, sites))
  apply = jax.jit(pelt.bypass(model.apply))
  ids, mask = tokens(2, 6), np.array([[1] * 6, [1] * 4 + [0] * 2])
  whole = apply({"params": params}, ids, mask)
  close(whole[1, :4], apply({"params": params}, ids[1:, :4])[0], 5e-6)
  close(apply({"params": params}, ids[::-1], mask[::-1]), whole[::-1], 5e-6)


@LONG
def test_rows_choose_the_task():
  model, base = built("llama", "encoder")
  sites, ids = pelt.sites(model, tokens(2, 6)), tokens(2, 6)
  method = pelt.adapter("pfeiffer", **SMALL)
  two = [moved(method.init(jax.random.key(i), base, sites), 0.2 + i / 10) for i in (1, 2)]
  apply = jax.jit(pelt.bypass(model.apply))
  both = apply({"params": pelt.bank(two)}, ids, rows=np.array([1, 0]))
  for row, member in ((0, 1), (1, 0)):
    close(both[row], apply({"params": two[member]}, ids)[row], 5e-6)


def test_layers_left_out_and_widths_by_layer():
  model, scanned = built("bert", "encoder")
  looped, base = model.clone(scan=False), models.to_looped(scanned, model)
  sites = pelt.sites(looped, tokens(1, 4))
  method = pelt.adapter("pfeiffer", bottleneck={0: 3, 2: 7}, layers=(0, 2))
  params = method.init(jax.random.key(1), base, sites)
  widths = {p: n.branch.down.shape for p, n in walk(params) if isinstance(n, nodes.AroundNorm)}
  assert widths == {
    "encoder/layer/0/output/LayerNorm/bypass": (32, 3),
    "encoder/layer/2/output/LayerNorm/bypass": (32, 7),
  }
  for options, match in (
    ({"bottleneck": {3: 4}}, r"bottleneck names layers \[3\]; 'ffn' is in layers \[0, 1, 2\]"),
    ({"layers": []}, "layers must be at least one layer number"),
  ):
    with pytest.raises(ValueError, match=match):
      pelt.adapter("pfeiffer", **options).init(jax.random.key(1), base, sites)
  for options, match in (({"bottleneck": {0: 3}}, "differs by layer"), ({"layers": (0,)}, "scan")):
    with pytest.raises(ValueError, match=match):
      pelt.adapter("pfeiffer", **options).init(
        jax.random.key(1), scanned, pelt.sites(model, tokens(1, 4))
      )


@LONG
def test_dropout_is_of_training_and_differs_by_layer():
  model, base = built("llama", "encoder")
  ids = tokens(2, 6)
  method = pelt.adapter("parallel", dropout=0.5, **SMALL)
  params = moved(method.init(jax.random.key(1), base, pelt.sites(model, ids)))
  apply = pelt.bypass(model.apply)
  run = lambda seed, train: apply(
    {"params": params}, ids, train_nodes=train, rngs={"dropout": jax.random.key(seed)}
  )
  np.testing.assert_array_equal(run(0, False), run(1, False))
  assert np.abs(run(0, True) - run(1, True)).max() > 1e-3


def test_saved_merged_and_taken_out(tmp_path):
  model, base = built("bert", "encoder")
  ids = tokens(2, 6)
  method = pelt.adapter("houlsby", **SMALL)
  params = moved(method.init(jax.random.key(1), base, pelt.sites(model, ids)))
  pelt.save(tmp_path / "adapter", params)
  loaded = pelt.load(tmp_path / "adapter", base)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  with pytest.raises(
    ValueError, match=r"output/dropout/bypass: After .*activation 'gelu_tanh' stands between"
  ):
    pelt.merge(params)


@pytest.mark.parametrize(("options", "match"), [
  ({"style": "lester"}, "style must be one of houlsby"),
  ({"activation": "softsign"}, "activation must be one of"),
  ({"init": "xavier"}, "init must be one of"),
  ({"tap": "residual"}, "tap='residual' is for parallel styles"),
  ({"style": "parallel", "tap": "output"}, "tap must be"),
  ({"bottleneck": 0}, "bottleneck must be a whole number"),
  ({"bottleneck": {1: 0}}, r"bottleneck\[1\] must be a whole number"),
  ({"bottleneck": 4, "reduction": 2}, "give one of them"),
  ({"scaling": "global"}, "scaling must be a number, 'learned' or 'channel'"),
  ({"scaling": float("nan")}, "scaling must be a finite number, got nan"),
  ({"dropout": 1.0}, "dropout must be"),
])  # fmt: skip
def test_bad_options(options, match):
  with pytest.raises(ValueError, match=match):
    pelt.adapter(**options)


def test_a_place_that_a_style_cannot_use_is_named():
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, tokens(1, 4))
  for style, target in (("pfeiffer", "mlp/down_proj"), ("houlsby", "attention")):
    with pytest.raises(ValueError, match="does not say where its"):
      pelt.adapter(style, targets=target).init(jax.random.key(0), base, sites)
  assert VOCAB == 97
