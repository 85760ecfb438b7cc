"""The unified view: its table against the methods, formulas by hand, a new row, bad input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import nodes, training
from pelt_jax._walk import get_at
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

LONG = pytest.mark.parity

# Row of the table: its sizes and options, and the method that it is.
ROWS = {
  "prefix_tuning": ({"size": 3, "hidden": 7}, pelt.prefix_tuning(3, hidden=7)),
  "adapter": (
    {"size": 5, "init": "bert"},
    pelt.adapter("houlsby", bottleneck=5, activation="relu", init="bert", train_norms=False),
  ),
  "lora": ({"size": 2, "scaling": 1.5}, pelt.lora(2, 3.0, targets=("query", "value"))),
  "parallel_adapter": ({"size": 5}, pelt.adapter("parallel", bottleneck=5)),
  "multi_head_parallel_adapter": (
    {"size": 5},
    pelt.adapter("parallel", bottleneck=5, targets="attention_heads"),
  ),
  "scaled_parallel_adapter": ({"size": 5}, pelt.adapter("scaled_parallel", bottleneck=5)),
}


@pytest.mark.parametrize("name", ["bert", *(pytest.param(n, marks=LONG) for n in ("llama", "t5"))])
def test_the_papers_rows_are_the_methods(name):
  assert set(ROWS) == set(pelt.DESIGNS)
  model, base = built(name, "seq2seq" if name == "t5" else "encoder")
  kwargs = {"decoder_input_ids": tokens(2, 5)} if name == "t5" else {}
  sites = pelt.sites(model, tokens(2, 6), **kwargs)
  for row, (options, method) in ROWS.items():
    made = pelt.design(*pelt.DESIGNS[row], **options)
    got, want = (m.init(jax.random.key(1), base, sites) for m in (made, method))
    assert jax.tree.structure(got) == jax.tree.structure(want), row
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_mam_chains_two_rows():
  model, base = built("bert", "encoder")
  sites = pelt.sites(model, tokens(2, 6))
  chained = pelt.chain(
    pelt.design(*pelt.DESIGNS["prefix_tuning"], size=3, hidden=7),
    pelt.design(*pelt.DESIGNS["scaled_parallel_adapter"], size=5),
  )
  mam = pelt.mam(3, bottleneck=5, hidden=7)
  got, want = (m.init(jax.random.key(1), base, sites) for m in (chained, mam))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


class Net(nn.Module):
  """A projection to what the heads give, one back, and what stands for a feed-forward network."""

  @property
  def roles(self):
    return {
      "query": (pelt.Role("heads"),),
      "attention_heads": (pelt.Role("out", "before", "../in"),),
      "ffn": (pelt.Role("ffn", "after", "in"),),
    }

  @nn.compact
  def __call__(self, x):
    for features, name in ((6, "heads"), (4, "out"), (4, "ffn")):
      x = nn.Dense(features, param_dtype=jnp.float64, name=name)(x)
    return x


FORMS = {
  "linear": lambda x: x,
  "relu": lambda x: np.maximum(x, 0),
  "silu": lambda x: x / (1 + np.exp(-x)),
}
CASES = [
  (form, insertion, representation, composition)
  for form in FORMS
  for insertion in ("sequential", "parallel")
  for representation in ("ffn", "attention_heads", "query")
  for composition in ("simple", "scaled", "gated")
]
SHORT = {
  ("relu", "parallel", "ffn", "gated"),
  ("relu", "sequential", "attention_heads", "gated"),
  ("relu", "parallel", "attention_heads", "simple"),
  ("relu", "parallel", "query", "simple"),
  ("linear", "parallel", "query", "scaled"),
  ("linear", "sequential", "ffn", "scaled"),
}


@pytest.mark.parametrize(
  ("form", "insertion", "representation", "composition"),
  [pytest.param(*case, marks=[] if case in SHORT else [LONG]) for case in CASES],
)
def test_every_row_by_hand(form, insertion, representation, composition):
  """h + D, h + s D, (1 - g) h + g D with D and g of x or h, in NumPy and float64."""
  with jax.enable_x64(True):
    model = Net()
    x = jax.random.normal(jax.random.key(0), (2, 3, 4), jnp.float64)
    base = model.init(jax.random.key(1), x)["params"]
    scaling = {"scaling": 2.5} if composition == "scaled" else {}
    method = pelt.design(form, insertion, representation, composition, size=3, **scaling)
    params = moved(method.init(jax.random.key(2), base, pelt.sites(model, x)))
    got = pelt.bypass(model.apply)({"params": params}, x)

  dense = {n: tuple(np.asarray(base[n][k]) for k in ("kernel", "bias")) for n in base}
  run = lambda name, v: v @ dense[name][0] + dense[name][1]
  where = {"ffn": "ffn", "attention_heads": "out", "query": "heads"}[representation]
  s = scaling.get("scaling", 1.0)

  def change(v):
    kernel = get_at(params, f"{where}/kernel")
    if isinstance(kernel, nodes.LoraWeight):  # a bypass where no weight could hold the change
      assert (form, insertion, representation) == ("linear", "parallel", "query")
      return v @ np.asarray(kernel.a) @ np.asarray(kernel.b), None
    node = get_at(params, f"{where}/bypass")
    b = node.branch
    assert (b.down_bias is None) == (b.up_bias is None) == (form == "linear")
    down_bias, up_bias = (0 if v is None else np.asarray(v) for v in (b.down_bias, b.up_bias))
    delta = FORMS[form](v @ np.asarray(b.down) + down_bias) @ np.asarray(b.up) + up_bias
    gate = getattr(node, "gate", None)
    if gate is None:
      return delta, None
    return delta, 1 / (1 + np.exp(-(v @ np.asarray(gate.kernel) + np.asarray(gate.bias))))

  def modified(h, v):
    delta, gate = change(h if insertion == "sequential" else v)
    return h + s * delta if gate is None else (1 - gate) * h + gate * delta

  x = np.asarray(x)
  heads = run("heads", x)
  heads = modified(heads, x) if representation != "ffn" else heads
  y = run("out", heads)
  want = run("ffn", y)
  want = modified(want, y) if representation == "ffn" else want
  close(got, want, 1e-13)


@LONG
def test_gates_start_nearly_closed_and_learn():
  """The row that no method has, a gated parallel adapter: its loss falls, the model stays."""
  model, base = built("bert", "classification")
  ids = tokens(8, 6)
  method = pelt.design("relu", "parallel", "ffn", "gated", size=16)
  params = method.init(jax.random.key(1), base, pelt.sites(model, ids))
  apply = pelt.bypass(model.apply)
  _, seen = apply({"params": params}, ids, record="gates")
  (gates,) = (v["gates"] for v in seen.values())
  assert gates.shape == (3, 8, 6) and gates.min() > 0.005 and gates.max() < 0.06
  loss = lambda apply, params, batch, key: training.cross_entropy(apply, params, batch)
  train = training.train_step(apply, loss, optax.adam(3e-2), method)
  trainable, frozen, state = train.init(params)
  batch = {"input_ids": ids, "labels": np.arange(8) % 5}
  step, losses = jax.jit(train.step), []
  for i in range(30):
    trainable, state, metrics = step(trainable, frozen, state, batch, jax.random.key(i))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.75 * losses[0], losses
  with pytest.raises(ValueError, match="bypass: Mixed wraps a module call"):
    pelt.merge(pelt.combine(trainable, frozen))


@LONG
def test_a_gated_row_is_causal_and_scan_equals_loop():
  model, base = built("llama", "encoder")
  ids = tokens(2, 6)
  method = pelt.design("gelu", "sequential", ("attention_heads", "ffn"), "gated", size=4)
  params = moved(method.init(jax.random.key(1), base, pelt.sites(model, ids)))
  apply = jax.jit(pelt.bypass(model.apply))
  want = apply({"params": params}, ids)
  close(want[:, :4], apply({"params": params}, ids[:, :4]), 5e-6)
  looped = pelt.models.to_looped(params, model)
  close(pelt.bypass(model.clone(scan=False).apply)({"params": looped}, ids), want, 5e-6)


@LONG
def test_a_linear_row_on_a_projection_merges():
  model, base = built("llama", "encoder")
  ids = tokens(2, 6)
  method = pelt.design("linear", "parallel", ("ffn_in", "ffn_out"), "simple", size=2)
  params = method.init(jax.random.key(1), base, pelt.sites(model, ids))
  assert jax.tree.structure(pelt.merge(params)) == jax.tree.structure(base)
  lora = pelt.lora(2, targets=("ffn_in", "ffn_out")).init(
    jax.random.key(1), base, pelt.sites(model, ids)
  )
  jax.tree.map(np.testing.assert_array_equal, params, lora)


def test_keys_of_another_width():
  """A branch beside the keys of grouped attention reads the model's width and gives theirs."""
  model, base = built("llama", "encoder")
  method = pelt.design("relu", "parallel", ("key", "ffn"), "simple", size=2)
  sites = pelt.sites(model, tokens(2, 6))
  params = jax.eval_shape(lambda p: method.init(jax.random.key(1), p, sites), base)
  branch = params["layers"]["self_attn"]["k_proj"]["bypass"].branch
  assert branch.down.shape == (3, 32, 2) and branch.up.shape == (3, 2, 16)
  out = jax.eval_shape(lambda p: pelt.bypass(model.apply)({"params": p}, tokens(2, 6)), params)
  assert out.shape == (2, 6, 32)


@pytest.mark.parametrize(("row", "options", "match"), [
  (("softmax", "parallel", "ffn", "simple"), {}, "form must be one of attention, linear, relu"),
  (("relu", "beside", "ffn", "simple"), {}, "insertion must be one of sequential, parallel"),
  (("relu", "parallel", "ffn", "added"), {}, "composition must be one of simple, scaled, gated"),
  (("relu", "parallel", (), "simple"), {}, "representation is empty"),
  (("attention", "sequential", "attention_heads", "gated"), {}, "'insertion': 'sequential'"),
  (("attention", "parallel", "ffn", "gated"), {}, r"'representation': \('ffn',\)"),
  (("attention", "parallel", "attention_heads", "scaled"), {}, "'composition': 'scaled'"),
  (("relu", "parallel", "ffn", "simple"), {"scaling": 2.0}, "is for composition=\"scaled\""),
  (("linear", "parallel", "query", "scaled"), {"scaling": "learned"}, "of a LoRA is a number"),
  (("relu", "parallel", "ffn", "simple"), {"hidden": 3}, r"rests on adapter, .* \['hidden'\]"),
  (("linear", "parallel", "query", "simple"), {"tap": "input"}, "rests on lora"),
  (("attention", "parallel", "attention_heads", "gated"), {"norm": True}, "rests on prefix_tuning"),
  (("relu", "parallel", "ffn", "simple"), {"size": 0}, "size must be a whole number"),
])  # fmt: skip
def test_bad_designs(row, options, match):
  with pytest.raises(ValueError, match=match):
    pelt.design(*row, **({"size": 4} | options))
