"""IA3, VeRA, LoHa, LoKr, MiSS and HiRA against torch PEFT itself, in float64."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import pelt_jax as pelt
from pelt_jax.methods._lokr import divisors
from tests import support
from tests.test_interop.harness import BOTH, COTANGENT, IDS, Case, base_params, flax_model
from tests.test_models import helpers

torch = support.require("torch")
hf_peft = support.require("peft")
transformers = support.require("transformers")

from tests.test_interop import make_values  # noqa: E402
from tests.test_interop.test_live import in_peft, with_method  # noqa: E402
from tests.test_interop.test_live import offline as offline  # noqa: E402
from tests.test_models.test_parity import lifted as lifted  # noqa: E402
from tests.test_models.test_parity import output, reference  # noqa: E402

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
  pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TENSORS = "adapter_model.safetensors"
# Beside `CASES`: name -> a case and how many entries it trains
SMALL = {
  "ia3 conv": (Case(dict(BOTH, feedforward_modules=["lin2"]), "IA3", conv=True), 20),
  "ia3 saved": (
    Case(dict(target_modules=["lin"], feedforward_modules=[], modules_to_save=["head"]), "IA3"),
    10 + 27,
  ),
  "vera conv": (Case(dict(BOTH, r=4), "VERA", conv=True), 26),
  "loha patterns": (
    Case(dict(BOTH, r=2, alpha=6, rank_pattern={"lin2": 3}, alpha_pattern={"lin": 5}), "LOHA"),
    2 * 2 * 16 + 2 * 3 * 18,
  ),
  "lokr 1": (Case(dict(BOTH, r=1, alpha=6), "LOKR"), 25),
  "lokr whole": (Case(dict(BOTH, r=64, alpha=6), "LOKR"), 43),
  "lokr both": (
    Case(
      dict(BOTH, r=1, alpha=3, decompose_both=True, decompose_factor=5, init_weights="lycoris"),
      "LOKR",
    ),
    # 6 = 2 * 3, 10 = 5 * 2 (10 as an input too), 8 = 2 * 4
    (2 + 5) + (3 + 2) + (5 + 2) + (2 + 4),
  ),
  "miss padded": (Case(dict(BOTH, r=4), "MISS"), 72),
  "miss mini": (Case(dict(BOTH, r=4, mini_r=2, init_weights="mini"), "MISS"), 16),
  "miss bat": (Case(dict(BOTH, r=2, init_weights="bat"), "MISS"), 36),
  "hira table": (Case(dict(target_modules=["lin", "lin2", "emb"], r=2), "HIRA"), 102),
  # PEFT 0.21 does not look at HiRA's rank_pattern
  "hira conv": (Case(dict(BOTH, r=2, rank_pattern={"lin2": 3}), "HIRA", conv=True), 68),
}


def exact(theirs, folder):
  """PEFT makes VeRA's pair in float32 and reads ours into that; here it is as in the file."""
  for name, value in load_file(folder / TENSORS).items():
    if name.startswith("base_model.vera_"):
      held = getattr(theirs.base_model, name.rpartition(".")[2])
      assert held["default"].shape == value.shape
      held["default"] = torch.from_numpy(value)
  return theirs


@pytest.mark.parametrize("name", SMALL)
def test_small_models_agree(name, tmp_path):
  """Outputs, gradients of every trained tensor, the merged model, and files both ways."""
  theirs_at, ours_at, grads_at = (tmp_path / n for n in ("theirs", "ours", "grads"))
  case, entries = SMALL[name]
  theirs, base, trained = make_values.adapted(case)
  assert sum(p.numel() for p in trained.values()) == entries
  theirs.save_pretrained(str(theirs_at))
  out = theirs(torch.from_numpy(IDS))
  (out * torch.from_numpy(COTANGENT)).sum().backward()
  want = out.detach().numpy()
  with jax.enable_x64(True):
    model, plain = flax_model(case), base_params(base)
    params = pelt.interop.peft.load(theirs_at, model, plain)
    apply = pelt.bypass(model.apply)
    np.testing.assert_allclose(apply({"params": params}, IDS), want, rtol=0, atol=1e-12)
    assert np.abs(want - model.apply({"params": plain}, IDS)).max() > 0.01
    merged = model.apply({"params": pelt.merge(params)}, IDS)
    np.testing.assert_allclose(merged, want, rtol=0, atol=1e-12)

    pelt.interop.peft.export(ours_at, params, model)
    trainable, frozen = pelt.partition(params)
    loss = lambda p: jnp.sum(apply({"params": p}, IDS) * COTANGENT)
    _, grads = pelt.value_and_grad(loss)(trainable, frozen)
    pelt.interop.peft.export(grads_at, pelt.combine(grads, frozen), model)
  written, read = (load_file(folder / TENSORS) for folder in (ours_at, theirs_at))
  read = {n: v for n, v in read.items() if ".base_layer." not in n}  # copies of frozen tables
  assert set(written) == set(read)
  for key, value in read.items():
    np.testing.assert_array_equal(written[key], value, err_msg=key)
  found = load_file(grads_at / TENSORS)
  top = max(p.grad.abs().max().item() for p in trained.values())
  for key, parameter in trained.items():
    key = key.replace(".modules_to_save.default", "").removesuffix(".default")
    error = np.abs(found[key] - parameter.grad.numpy()).max()
    assert error < 1e-12 * top, (key, error, top)
  read_back = exact(make_values.load_in_peft(case, ours_at), ours_at)
  np.testing.assert_allclose(make_values.outputs(read_back), want, rtol=0, atol=1e-12)
  np.testing.assert_allclose(
    make_values.outputs(theirs.merge_and_unload()), want, rtol=0, atol=1e-12
  )


QV = dict(targets=("query", "value"))
MODELS = [
  ("llama", "lm", pelt.ia3()),
  ("gpt2", "lm", pelt.ia3()),
  ("bert", "classification", pelt.ia3()),
  ("bert", "classification", pelt.vera(8, dropout=0.25, targets=("query", "ffn_out"))),
  ("llama", "lm", pelt.loha(3, 7, targets=("query", "ffn_in"))),
  ("qwen2", "lm", pelt.lokr(2, 6, targets=("value", "ffn_out"), factor=4)),
  ("roberta", "classification", pelt.miss(5, dropout=0.5, **QV)),
  ("llama", "encoder", pelt.miss(4, kind="bat", **QV)),
  ("llama", "lm", pelt.hira(3, targets=("query", "embedding"), dropout=0.25)),
  ("llama", "lm", pelt.adalora(10, 3, 2, 7, dropout=0.25, targets=("query", "ffn_in"))),
]


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_models_agree(number, tmp_path, lifted):
  """Ours to PEFT and back, looped and scanned."""
  name, task, method = MODELS[number]
  base_folder, folder = tmp_path / "base", tmp_path / "adapter"
  reference(helpers.CONFIGS[name], task, torch.float64).save_pretrained(base_folder)
  ids = helpers.tokens(2, 9)
  with jax.enable_x64(True):
    model, base = pelt.models.from_pretrained(base_folder, task=task, dtype=jnp.float64)
    params = with_method(model, base, method, task == "classification")
    pelt.interop.peft.export(folder, params, model)
    config = json.loads((folder / "adapter_config.json").read_text())
    theirs = exact(in_peft(base_folder, task, folder).double(), folder)
    want = output(theirs, ids)
    apply = jax.jit(pelt.bypass(model.apply))
    got = apply({"params": params}, ids)
    helpers.close(got, want, 1e-9)
    assert np.abs(got - apply({"params": base}, ids)).max() > 1e-3 * np.abs(want).max()
    helpers.close(model.apply({"params": pelt.merge(params)}, ids), want, 1e-9)

    read = pelt.interop.peft.load(folder, model, base)
    jax.tree.map(np.testing.assert_array_equal, pelt.partition(read)[0], pelt.partition(params)[0])
    scanned, stacked = pelt.models.from_pretrained(
      base_folder, task=task, dtype=jnp.float64, scan=True
    )
    stacked = pelt.interop.peft.load(folder, scanned, stacked)
    helpers.close(jax.jit(pelt.bypass(scanned.apply))({"params": stacked}, ids), got, 1e-9)
    pelt.interop.peft.export(tmp_path / "scanned", stacked, scanned)
  one, two = (load_file(f / TENSORS) for f in (folder, tmp_path / "scanned"))
  assert one.keys() == two.keys()
  for key, value in one.items():
    np.testing.assert_array_equal(value, two[key], err_msg=key)
  assert json.loads((tmp_path / "scanned/adapter_config.json").read_text()) == config


def test_divisors_are_peft_s():
  from peft.tuners.lokr.layer import factorization

  for size in (*range(1, 200), 768, 1024, 2304, 3072, 4096, 11008):
    for factor in (-1, 1, 2, 3, 4, 7, 8, 10, 16, 1024):
      assert divisors(size, factor) == factorization(size, factor), (size, factor)


def test_unscaled_biases_and_lone_options_are_refused(tmp_path):
  case, _ = SMALL["vera conv"]
  theirs, base, _ = make_values.adapted(case)
  theirs.save_pretrained(str(tmp_path))
  with jax.enable_x64(True):
    model, plain = flax_model(case), base_params(base)
    file = tmp_path / "adapter_config.json"
    raw = json.loads(file.read_text())
    load = lambda **changes: (
      file.write_text(json.dumps({**raw, **changes})),
      pelt.interop.peft.load(tmp_path, model, plain),
    )
    with pytest.raises(ValueError, match="bias='all'"):
      load(bias="all")
    with pytest.raises(ValueError, match="unknown fields"):
      load(use_magic=True)
    with pytest.raises(ValueError, match=r"vera_lambda_d has shape \(4,\), expected \(5,\)"):
      load(r=5)
    with pytest.raises(ValueError, match="changes no table"):
      load(target_modules=["emb"])
    with pytest.raises(ValueError, match="names no module"):
      load(target_modules=["nothing"])
    with pytest.raises(ValueError, match="lacks tensors"):
      load(target_modules=["lin", "lin2", "head"])
    with pytest.raises(ValueError, match="unexpected tensors"):
      load(target_modules=["lin"])
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      tensors = load_file(tmp_path / TENSORS)
    from safetensors.numpy import save_file

    save_file({n: v for n, v in tensors.items() if "vera_A" not in n}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="save_projection=True"):
      load()
