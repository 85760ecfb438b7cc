"""NF4 under LoRA and every other method: as those over the dequantized model."""

import jax
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax._walk import every_node, walk
from pelt_jax.quantization import NF4Weight
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import SEQ2SEQ, built, close, tokens

LONG = pytest.mark.parity
IDS = tokens(2, 6)
SMALL = {"block": 32}  # the models' widths are multiples of 8, not of 64
METHODS = {
  "lora": lambda: pelt.lora(2, 4, targets="all-linear"),
  "houlsby": lambda: pelt.adapter("houlsby", bottleneck=3),
  "prefix": lambda: pelt.prefix_tuning(2, hidden=5),
  "bitfit": lambda: pelt.bitfit(),
  "prompt": lambda: pelt.prompt_tuning(2),
  "unipelt": lambda: pelt.unipelt(2, rank=2, bottleneck=3, hidden=5, gate_pool="token"),
}


def arguments(name):
  return (IDS,), ({"decoder_input_ids": tokens(2, 5)} if name in SEQ2SEQ else {})


def quantized(base, sites, **options):
  return pelt.nf4(**(SMALL | options)).init(jax.random.key(0), base, sites)


def plain(params):
  """Params whose quantized weights are replaced by what they stand for."""
  is_leaf = lambda x: isinstance(x, NF4Weight)
  return jax.tree.map(lambda x: x.materialize() if is_leaf(x) else x, params, is_leaf=is_leaf)


SHORT = {("llama", "lora"), ("bert", "houlsby")}
PAIRS = [
  pytest.param(name, method, marks=[] if (name, method) in SHORT else [LONG])
  for name in ("llama", "bert", "gpt2", "t5")
  for method in METHODS
  if (name, method) not in {("llama", "bitfit"), ("t5", "bitfit"), ("t5", "unipelt")}
]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_methods_run_over_codes_as_over_what_they_stand_for(name, method):
  model, base = built(name, "seq2seq" if name in SEQ2SEQ else "encoder")
  args, kwargs = arguments(name)
  with jax.enable_x64(True):
    model = model.clone(dtype="float64")
    base = jax.tree.map(lambda x: x.astype("float64"), base)
    sites = pelt.sites(model, *args, **kwargs)
    init = pelt.chain(pelt.nf4(double_quant=True, **SMALL), METHODS[method]()).init
    params = moved(init(jax.random.key(0), base, sites))
    assert any(isinstance(n, NF4Weight) for n in every_node(params))
    apply = pelt.bypass(model.apply)

    def loss(params):
      out = apply({"params": params}, *args, **kwargs)
      return (out**2).mean(), out

    runs = []
    for tree in (params, plain(params)):
      trainable, frozen = pelt.partition(tree)
      (_, out), grads = jax.jit(pelt.value_and_grad(loss, has_aux=True))(trainable, frozen)
      runs.append((out, *jax.tree.leaves(grads)))
    for one, other in zip(*runs, strict=True):
      if np.abs(other).max() > 1e-12:
        close(one, other, 1e-9)
    assert np.abs(runs[0][0] - model.apply({"params": base}, *args, **kwargs)).max() > 1e-2


@pytest.mark.parametrize("layout", ["rows", pytest.param("words", marks=LONG)])
def test_scanned_equals_looped_and_rematerialized(layout):
  model, scanned = built("llama", "encoder")
  method = pelt.qlora(rank=2, alpha=4, layout=layout, **SMALL)
  results = {}
  for name, options in {
    "scan": {"scan": True},
    "loop": {"scan": False},
    "remat": {"scan": True, "remat": True},
  }.items():
    one = model.clone(**options)
    base = scanned if options["scan"] else models.to_looped(scanned, model)
    params = method.init(jax.random.key(0), base, pelt.sites(one, IDS))
    results[name] = np.asarray(pelt.bypass(one.apply)({"params": params}, IDS))
  close(results["loop"], results["scan"], 1e-5)
  close(results["remat"], results["scan"], 1e-5)


def test_a_lora_of_nothing_is_the_dequantized_model():
  model, base = built("llama", "lm", scan=False)
  sites = pelt.sites(model, IDS)
  params = pelt.qlora(rank=2, **SMALL).init(jax.random.key(0), base, sites)
  got = pelt.bypass(model.apply)({"params": params}, IDS)
  bare = pelt.merge(quantized(base, sites, double_quant=True))
  np.testing.assert_array_equal(got, model.apply({"params": bare}, IDS))


def test_merging_adds_in_float32_what_the_codes_stand_for():
  model, base = built("llama", "lm")
  sites = pelt.sites(model, IDS)
  params = moved(pelt.qlora(rank=2, **SMALL).init(jax.random.key(0), base, sites))
  merged = pelt.merge(params)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  want = pelt.bypass(model.apply)({"params": params}, IDS)
  close(model.apply({"params": merged}, IDS), want, 1e-5)


def test_head_and_embedding_stay():
  model, base = built("llama", "lm")
  params = quantized(base, pelt.sites(model, IDS))
  kept = {path for path, value in walk(params) if not isinstance(value, NF4Weight)}
  assert {"lm_head/kernel", "model/embed_tokens/embedding"} <= kept
  assert not any(path.endswith("proj/kernel") for path in kept)
  counts = pelt.count(pelt.lora(2).init(jax.random.key(0), params, pelt.sites(model, IDS)))
  assert counts.total == sum(x.size for x in jax.tree.leaves(base))


def test_tables_by_name_lie_as_torch_has_them():
  model, base = built("bert", "encoder")
  params = quantized(base, pelt.sites(model, IDS), targets="embeddings/word_embeddings")
  node = params["embeddings"]["word_embeddings"]["embedding"]
  assert node.plan.matrix == node.shape
  got = pelt.bypass(model.apply)({"params": params}, IDS)
  close(got, model.apply({"params": pelt.merge(params)}, IDS), 1e-6)


def test_saved_over_the_plain_base_or_a_quantized_one(tmp_path):
  model, base = built("llama", "lm")
  sites = pelt.sites(model, IDS)
  params = moved(pelt.qlora(rank=2, **SMALL).init(jax.random.key(0), base, sites))
  pelt.save(tmp_path, params)
  small = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
  assert small < 4 * pelt.count(params).trainable + 10_000  # no codes in it
  for below in (base, quantized(base, sites, double_quant=True)):
    loaded = pelt.load(tmp_path, below)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
  with pytest.raises(ValueError, match="it is quantized as .*double=False"):
    pelt.load(tmp_path, quantized(base, sites))
  other = jax.tree.map(lambda x: x * 1.5, base)
  keep = lambda tree: {**tree, "lm_head": base["lm_head"]}
  for below in (keep(other), keep(quantized(other, sites, double_quant=True))):
    with pytest.raises(ValueError, match="saved for another base"):
      pelt.load(tmp_path, below)
  half = jax.tree.map(lambda x: x.astype("bfloat16"), base)
  with pytest.warns(UserWarning), pytest.raises(ValueError, match="float32 when it was quantized"):
    pelt.load(tmp_path, half)


def test_an_adapter_of_a_plain_base_is_not_put_over_codes(tmp_path):
  model, base = built("llama", "lm")
  sites = pelt.sites(model, IDS)
  pelt.save(tmp_path, pelt.lora(2).init(jax.random.key(0), base, sites))
  with pytest.raises(ValueError, match="plain .*which is a NF4Weight here"):
    pelt.load(tmp_path, quantized(base, sites))


def test_a_quantized_load_is_quantizing_what_was_loaded(tmp_path):
  model, base = built("llama", "lm", scan=False)
  models.save_pretrained(tmp_path, model, base)
  for scan in (False, True):
    method = pelt.qlora(rank=2, **SMALL)
    one, params = models.from_pretrained(
      tmp_path, scan=scan, transform=method, key=jax.random.key(0)
    )
    loaded = models.to_scanned(base, model) if scan else base
    want = method.init(jax.random.key(0), loaded, pelt.sites(one, IDS))
    codes = lambda tree: [n for n in every_node(tree) if isinstance(n, NF4Weight)]
    assert len(codes(params)) == len(codes(want))
    for a, b in zip(codes(params), codes(want), strict=True):
      assert a.plan == b.plan
      jax.tree.map(np.testing.assert_array_equal, a, b)


@LONG
def test_two_tasks_share_one_quantized_model():
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, IDS)
  small = quantized(base, sites)
  tasks = [
    moved(pelt.lora(2, targets="all-linear").init(jax.random.key(i), small, sites), 0.1 * (i + 1))
    for i in range(2)
  ]
  apply = pelt.bypass(model.apply)
  got = apply({"params": pelt.bank(tasks)}, IDS, rows=np.array([1, 0]))
  for row, task in enumerate((1, 0)):
    close(got[row], apply({"params": tasks[task]}, IDS)[row], 1e-5)


def test_order_and_targets_are_checked():
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, IDS)
  with pytest.raises(ValueError, match="put nf4 first"):
    pelt.chain(pelt.lora(2), pelt.nf4(**SMALL)).init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="put nf4 first"):
    pelt.chain(pelt.nf4(**SMALL), pelt.nf4(**SMALL)).init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="matches no leaf"):
    quantized(base, sites, targets="nothing")
  with pytest.raises(ValueError, match="needs matrices"):
    quantized(base, sites, targets="norm")
  with pytest.raises(ValueError, match="block must be"):
    pelt.nf4(block=60)


def test_what_is_quantized_does_not_train():
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, IDS)
  with pytest.raises(ValueError, match="nothing in params trains"):
    pelt.partition(quantized(base, sites))
  params = pelt.qlora(rank=2, **SMALL).init(jax.random.key(0), base, sites)
  trainable, _ = pelt.partition(params)
  assert {str(x.dtype) for x in jax.tree.leaves(trainable)} == {"float32"}
  half = jax.tree.map(lambda x: x.astype("bfloat16"), base)
  params = pelt.qlora(rank=2, dtype="float32", **SMALL).init(jax.random.key(0), half, sites)
  trainable, _ = pelt.partition(params)
  assert {str(x.dtype) for x in jax.tree.leaves(trainable)} == {"float32"}
