"""Folders of 4-bit models: out, in, and as transformers and bitsandbytes write and read them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax.models._safetensors import read_header, write
from tests.support import require

IDS = jnp.arange(12, dtype=jnp.int32)[None] % 60
CONFIG = dict(
  model_type="llama",
  vocab_size=96,
  hidden_size=64,
  intermediate_size=192,  # a multiple of the block: theirs mistakes others on CPU
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  initializer_range=0.1,
)


def made(scan=False, **options):
  """A model in 4 bits."""
  model = models.from_config(CONFIG, scan=scan)
  base = model.init(jax.random.key(0), IDS)["params"]
  sites = pelt.sites(model, IDS)
  return model, pelt.nf4(**options).init(jax.random.key(1), base, sites)


def tensors(folder):
  return {n: np.array(e.read()) for n, e in read_header(folder / "model.safetensors").items()}


@pytest.mark.parametrize(
  ("scan", "options"),
  [
    (False, {"double_quant": True}),
    (True, {"book": "fp4", "block": 32, "layout": "words"}),
    pytest.param(True, {"double_quant": True, "layout": "flat"}, marks=pytest.mark.parity),
  ],
)
def test_what_is_saved_comes_back(tmp_path, scan, options):
  model, params = made(scan, **options)
  models.save_pretrained(tmp_path / "a", model, params)
  again, found = models.from_pretrained(tmp_path / "a", scan=scan)
  run = lambda model, params: pelt.bypass(model.apply)({"params": params}, IDS)
  # Another layout adds up in another order.
  np.testing.assert_allclose(run(again, found), run(model, params), rtol=0, atol=1e-5)
  models.save_pretrained(tmp_path / "b", again, found)
  before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
  assert before.keys() == after.keys()
  assert all(np.array_equal(before[n], after[n]) for n in before)
  how = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
  assert how["load_in_4bit"] and how["llm_int8_skip_modules"] == ["lm_head"]
  assert how["bnb_4bit_use_double_quant"] == options.get("double_quant", False)
  # In a layer of 64 x 192: half a byte each, and a scale for every block.
  name = "model.layers.1.mlp.up_proj.weight"
  block = options.get("block", 64)
  assert before[name].shape == (64 * 192 // 2, 1) and before[name].dtype == np.uint8
  assert before[f"{name}.absmax"].shape == (64 * 192 // block,)


def test_methods_go_on_top_and_merge(tmp_path):
  """LoRA over the loaded model; its adapter serves over another load, and merges to floats."""
  model, params = made()
  models.save_pretrained(tmp_path / "four", model, params)
  model, base = models.from_pretrained(tmp_path / "four")
  sites = pelt.sites(model, IDS)
  tuned = pelt.lora(rank=2, targets="all-linear").init(jax.random.key(1), base, sites)
  trainable, frozen = pelt.partition(tuned)
  tuned = pelt.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
  pelt.save(tmp_path / "adapter", tuned)
  loaded = pelt.load(tmp_path / "adapter", models.from_pretrained(tmp_path / "four")[1])
  q = lambda tree: tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
  np.testing.assert_array_equal(q(loaded).a, q(tuned).a)
  models.save_pretrained(tmp_path / "merged", model, pelt.merge(tuned))
  assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
  plain = models.from_pretrained(tmp_path / "merged")[1]
  want = q(tuned).base.materialize() + q(tuned).scaling * q(tuned).a @ q(tuned).b
  np.testing.assert_allclose(q(plain), want, rtol=1e-6, atol=1e-6)


def test_what_bitsandbytes_cannot_hold_is_refused_before_anything_is_written(tmp_path):
  model, params = made(book="int4")
  with pytest.raises(ValueError, match="q_proj/kernel.*nf4 or fp4.*in int4.*pelt.merge"):
    models.save_pretrained(tmp_path / "out", model, params)
  assert not (tmp_path / "out").exists()


def changed(folder, change):
  found = tensors(folder)
  change(found)
  shapes = {name: (x.shape, x.dtype) for name, x in found.items()}
  write(folder / "model.safetensors", shapes, found.__getitem__, {})


def test_bad_checkpoints_are_named(tmp_path):
  model, params = made(double_quant=True)
  name = "model.layers.0.mlp.up_proj.weight"
  for number, (change, message) in enumerate(
    [
      (lambda t: t.pop(f"{name}.nested_absmax"), rf"{name}: .* lacks .*nested_absmax"),
      (lambda t: t[f"{name}.quant_map"].__setitem__(3, 9), f"{name}: quant_map of nf4 holds other"),
      (lambda t: t.pop(f"{name}.quant_state.bitsandbytes__nf4"), f"{name} has shape .*expected"),
    ]
  ):
    folder = tmp_path / str(number)
    models.save_pretrained(folder, model, params)
    changed(folder, change)
    with pytest.raises(ValueError, match=message):
      models.from_pretrained(folder)
  models.save_pretrained(tmp_path / "whole", model, params)
  with pytest.raises(ValueError, match="is quantized already"):
    models.from_pretrained(tmp_path / "whole", transform=pelt.nf4())
  config = json.loads((tmp_path / "whole" / "config.json").read_text())
  (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
  with pytest.raises(ValueError, match=r"in 4 bits, expected \("):
    models.from_pretrained(tmp_path / "whole")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("double", "book"), [(True, "nf4"), (False, "fp4")])
def test_transformers_writes_and_reads_the_same_bytes(tmp_path, double, book):
  torch, transformers, bnb = map(require, ("torch", "transformers", "bitsandbytes"))
  config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
  transformers.LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "plain")
  how = transformers.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type=book,
    bnb_4bit_use_double_quant=double,
    bnb_4bit_compute_dtype=torch.float32,
  )
  load = transformers.AutoModelForCausalLM.from_pretrained
  with torch.compiler.set_stance("force_eager"):
    theirs = load(
      tmp_path / "plain", quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = models.from_pretrained(tmp_path / "theirs")
    models.save_pretrained(tmp_path / "ours", model, params)
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[n], after[n]) for n in before)
    ids = torch.tensor(np.asarray(IDS), dtype=torch.long)
    read = load(tmp_path / "ours", device_map="cpu")
    assert torch.equal(read(ids).logits, theirs(ids).logits)
    # Their product on CPU rounds to 16 bits in between: compare with their values in a plain model.
    plain = load(tmp_path / "plain", dtype=torch.float32).eval()
    for name, module in theirs.named_modules():
      if isinstance(module, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain.get_submodule(name).weight.data = weight
    wanted = plain(ids).logits.detach().numpy()
  found = pelt.bypass(model.apply)({"params": params}, IDS)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
