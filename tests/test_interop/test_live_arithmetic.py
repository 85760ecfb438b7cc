"""Against torch PEFT itself: its weighted adapters, its conversions, and what we export of ours."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax._walk import update_at, walk
from pelt_jax.methods import _add_loras
from pelt_jax.methods._add_loras import HOWS
from tests import support
from tests.test_interop.harness import IDS, Case, base_params, flax_model
from tests.test_models import helpers

torch = support.require("torch")
hf_peft = support.require("peft")

from peft.utils import merge_utils  # noqa: E402

from tests.test_interop.make_values import outputs, torch_model  # noqa: E402

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:The density 1.0 is greater"),
  pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
  pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already"),
  pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TARGETS = {"target_modules": ["emb", "lin", "lin2"]}
WEIGHTS = {"x": 0.7, "y": -1.3, "z": 0.45}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
  """PEFT makes float32 tensors of weights and shares, and converts in float32."""
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
  with jax.enable_x64(True):
    yield
  torch.set_default_dtype(before)


def made(folder, conv=False, kind=hf_peft.LoraConfig, **options):
  """A torch model with adapters moved off zero, our model and base."""
  model = torch_model(Case({}, conv=conv))
  values = {f"base/{k}": v.numpy().copy() for k, v in model.state_dict().items()}
  values |= {"conv": np.array(True)} if conv else {}
  first, *others = (kind(**o) for o in options.values())
  name, *names = options
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    adapted = hf_peft.get_peft_model(model, first, adapter_name=name).double().eval()
    for other, config in zip(names, others, strict=True):
      adapted.add_adapter(other, config)
    adapted.double()
    torch.manual_seed(1)
    for parameter_name, parameter in adapted.named_parameters():
      if any(mark in parameter_name for mark in ("lora_", "hada_")):
        parameter.data += 0.4 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
  case = Case({}, conv=conv)
  return adapted, flax_model(case), base_params(values)


def adapters_of(folder, names, model, base):
  where = {n: folder if n == "default" else folder / n for n in names}
  return {n: pelt.interop.peft.load(where[n], model, base) for n in names}


def config(rank, alpha, **more):
  return dict(r=rank, lora_alpha=alpha, **(TARGETS | more))


EQUAL = {"x": config(3, 6), "y": config(3, 1.5), "z": config(3, 3, target_modules=["lin"])}
UNEQUAL = {"x": config(2, 6), "y": config(4, 1), "z": config(1, 3, target_modules=["lin"])}
PAIRS = [
  (how, majority)
  for how in HOWS
  for majority in (("total", "frequency") if "ties" in how else ("total",))
]


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(("how", "majority"), PAIRS)
def test_weighted_adapters(how, majority, conv, tmp_path, monkeypatch):
  """Every combination, with negative weights, on linear layers, Conv1D and a table.

  DARE draws in torch and here alike: what both drop is given by how often each was asked.
  """
  options = UNEQUAL if how in ("cat", "svd", "ties_svd") else EQUAL
  theirs, model, base = made(tmp_path, conv, **options)
  ours = adapters_of(tmp_path, WEIGHTS, model, base)
  given: dict = {}
  if how not in ("cat", "svd", "linear"):
    given |= {"density": 0.55}
  call = given | {"majority_sign_method": majority}
  if how.startswith("dare"):
    given["key"] = jax.random.key(0)
    by_size(monkeypatch)
  if how.endswith("svd"):
    given["rank"] = call["svd_rank"] = 4
  theirs.base_model.add_weighted_adapter(
    list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type=how, **call
  )
  theirs.set_adapter("sum")
  want = outputs(theirs.double())
  params = pelt.add_loras(ours, WEIGHTS, how=how, majority=majority, **given)
  got = pelt.bypass(model.apply)({"params": params}, IDS)
  helpers.close(got, want, 1e-9)
  assert np.abs(got - model.apply({"params": base}, IDS)).max() > 1e-2


def by_size(monkeypatch):
  """Both sides drop the same: entries whose digits past the sixth are small."""

  def theirs(tensor, density, rescale):
    mask = ((tensor.abs() * 1e6) % 1.0 < density).to(tensor.dtype)
    return tensor * mask / density

  def ours(x, where, rule):
    return jnp.where((jnp.abs(x) * 1e6) % 1.0 < rule.density, x / rule.density, 0)

  monkeypatch.setattr(merge_utils, "random_pruning", theirs)
  monkeypatch.setattr(_add_loras, "_thinned", ours)


@pytest.mark.parametrize("how", ["cat", "svd", "ties"])
def test_what_is_exported_computes_the_same_in_peft(how, tmp_path):
  options = EQUAL if how == "ties" else UNEQUAL
  _, model, base = made(tmp_path / "in", **options)
  ours = adapters_of(tmp_path / "in", WEIGHTS, model, base)
  given = {"density": 0.5} if how == "ties" else {}
  params = pelt.add_loras(ours, WEIGHTS, how=how, **given)
  want = pelt.bypass(model.apply)({"params": params}, IDS)
  pelt.interop.peft.export(tmp_path / "out", params, model)
  theirs = hf_peft.PeftModel.from_pretrained(
    torch_model(Case({})), str(tmp_path / "out"), autocast_adapter_dtype=False
  )
  helpers.close(outputs(theirs), want, 1e-9)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.9, 1.0])
def test_conversions(rank, conv, tmp_path):
  """As PEFT converts and as we do from merged weights: ranks, changes, exported.

  LoHas have no Conv1D, so that there it is a LoRA.
  """
  kind, alpha = (hf_peft.LoraConfig, "lora_alpha") if conv else (hf_peft.LoHaConfig, "alpha")
  options = {"r": 2 + conv, alpha: 3, "target_modules": ["lin", "lin2"]}
  theirs, model, base = made(tmp_path / "in", conv, kind, default=options)
  _, state = hf_peft.convert_to_lora(theirs, rank)
  values = {f"base/{k}": v.numpy() for k, v in theirs.merge_and_unload().state_dict().items()}
  merged = base_params(values | ({"conv": np.array(True)} if conv else {}))
  sites = pelt.sites(model, jnp.asarray(IDS))
  params, errors = pelt.to_lora(merged, rank, sites=sites, base=base)
  for name in ("lin", "lin2"):
    node = params[name]["kernel"]
    a, b = (state[f"base_model.model.{name}.lora_{side}.weight"].numpy() for side in "AB")
    assert node.a.shape[1] == len(a)
    np.testing.assert_allclose(node.a @ node.b, (b @ a).T, rtol=0, atol=1e-12)
  assert set(errors) == {"lin/kernel", "lin2/kernel"}
  pelt.interop.peft.export(tmp_path / "out", params, model)
  again = hf_peft.PeftModel.from_pretrained(
    torch_model(Case({}, conv=conv)), str(tmp_path / "out"), autocast_adapter_dtype=False
  )
  want = pelt.bypass(model.apply)({"params": params}, IDS)
  helpers.close(outputs(again), want, 1e-9)


def test_scanned_layers_of_other_ranks_are_exported(tmp_path):
  """A fully fine-tuned, scanned model: each layer's rank in PEFT's file, the head saved whole."""
  model, base = helpers.built("bert", "classification")
  ids = helpers.tokens(2, 6)
  rng = np.random.default_rng(0)
  move = lambda x, size: x + jnp.asarray(size * rng.normal(size=x.shape), x.dtype)
  after = dict(walk(base))
  for path, value in after.items():
    if "layer/" in path and path.endswith("kernel"):  # falling singular values, other each layer
      after[path] = move(value, 0.01) + 0.1 * jnp.cumsum(move(value, 1.0), 1)
    elif path.startswith("classifier"):
      after[path] = move(value, 0.1)
  sites = pelt.sites(model, ids)
  params, errors = pelt.to_lora(update_at({}, after), 0.9, sites=sites, base=base)
  assert all(e.shape == (3,) and e.max() <= 0.1**0.5 + 1e-6 for e in errors.values())
  pelt.interop.peft.export(tmp_path, params, model)
  written = json.loads((tmp_path / "adapter_config.json").read_text())
  assert len({written["r"], *written["rank_pattern"].values()}) > 2
  assert written["modules_to_save"] == ["classifier"]
  again = pelt.interop.peft.load(tmp_path, model, base)
  run = jax.jit(pelt.bypass(model.apply))
  helpers.close(run({"params": again}, ids), run({"params": params}, ids), 1e-5)
