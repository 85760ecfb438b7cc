"""Against torch PEFT: what PiSSA and OLoRA take out of the base, DoRA's dropout, LoRA+'s steps."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from tests import support
from tests.test_interop.harness import IDS, Case, base_params, flax_model
from tests.test_models import helpers

torch = support.require("torch")
hf_peft = support.require("peft")
transformers = support.require("transformers")

from tests.test_interop import make_values  # noqa: E402
from tests.test_models.test_parity import output, reference  # noqa: E402

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
  pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STARTS = {"pissa": pelt.pissa, "olora": pelt.olora}
# PEFT decomposes in float32 alone: sums of 10 products of order 1 by two LAPACK drivers.
SINGLE = dict(rtol=0, atol=5e-6)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def adapted(case, dtype=torch.float32):
  """The base's tensors, and the same model in PEFT."""
  model = make_values.torch_model(case).to(dtype)
  base = {f"base/{k}": v.numpy().copy() for k, v in model.state_dict().items()}
  base |= {"conv": np.array(True)} if case.conv else {}
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "fan_in_fan_out")
    warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern")
    theirs = hf_peft.get_peft_model(
      model, hf_peft.LoraConfig(**case.config), autocast_adapter_dtype=False
    )
  return base, theirs.to(dtype)


@pytest.mark.parametrize(
  ("kind", "conv", "rslora"),
  [("pissa", False, False), ("pissa", True, True), ("olora", False, True)],
)
def test_the_same_is_taken_out_of_the_base(kind, conv, rslora, tmp_path):
  config = dict(r=4, lora_alpha=6, target_modules=["lin", "lin2"], use_rslora=rslora)
  case = Case(config | dict(init_lora_weights=kind, rank_pattern={"lin2": 2}), conv=conv)
  tensors, theirs = adapted(case)
  model, base = flax_model(case, "float32"), base_params(tensors, "float32")
  sites = pelt.sites(model, IDS)
  method = STARTS[kind](
    4, 6, targets=("lin/kernel", "lin2/kernel"), rslora=rslora, rank_pattern={"lin2": 2}
  )
  params = method.init(jax.random.key(0), base, sites)
  for name in ("lin", "lin2"):
    node, layer = params[name]["kernel"], theirs.base_model.model.get_submodule(name)
    left = layer.base_layer.weight.detach().numpy()
    np.testing.assert_allclose(node.base.materialize(), left if conv else left.T, **SINGLE)
    product = (layer.lora_B.default.weight @ layer.lora_A.default.weight).detach().numpy().T
    np.testing.assert_allclose(node.a @ node.b, product, **SINGLE)
    assert float(node.scaling) == pytest.approx(layer.scaling["default"])
  # Trained in PEFT and saved as it is: PEFT takes the base apart again, and so do we.
  torch.manual_seed(1)
  for parameter in theirs.parameters():
    if parameter.requires_grad:
      parameter.data += 0.3 * torch.randn_like(parameter)
  want = make_values.outputs(theirs)
  theirs.save_pretrained(str(tmp_path / "theirs"))
  loaded = pelt.interop.peft.load(tmp_path / "theirs", model, base)
  assert isinstance(loaded["lin"]["kernel"].base, nodes.Residual)
  apply = pelt.bypass(model.apply)
  np.testing.assert_allclose(apply({"params": loaded}, IDS), want, **SINGLE)
  # As a plain LoRA of twice the rank it needs no decomposition any more.
  pelt.interop.peft.export(tmp_path / "ours", loaded, model)
  fresh = make_values.torch_model(case).float()
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "fan_in_fan_out")
    again = hf_peft.PeftModel.from_pretrained(fresh, str(tmp_path / "ours"))
  config = again.peft_config["default"]
  assert config.init_lora_weights is True and config.rank_pattern == {"^lin2": 4} and config.r == 8
  np.testing.assert_allclose(make_values.outputs(again), want, **SINGLE)
  # Untrained, nothing changes: to the bit, as one half takes what the other adds.
  pelt.interop.peft.export(tmp_path / "start", params, model)
  plain = pelt.interop.peft.load(tmp_path / "start", model, base)
  change = pelt.merge(plain)["lin"]["kernel"] - base["lin"]["kernel"]
  np.testing.assert_allclose(change, 0.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_scanned_layers_are_taken_apart_each(kind, tmp_path):
  base_folder, folder = tmp_path / "base", tmp_path / "adapter"
  reference(helpers.CONFIGS["llama"], "lm", torch.float32).save_pretrained(base_folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
  config = hf_peft.LoraConfig(
    init_lora_weights=kind,
    target_modules=["q_proj"],
    r=2,
    layers_to_transform=[0, 2],
    rank_pattern={"layers.2.self_attn.q_proj": 3},
  )
  theirs = hf_peft.get_peft_model(model, config).eval()
  torch.manual_seed(1)
  for parameter in theirs.parameters():
    if parameter.requires_grad:
      parameter.data += 0.1 * torch.randn_like(parameter)
  theirs.save_pretrained(str(folder))
  ids = helpers.tokens(2, 9)
  want = output(theirs, ids)
  for scan in (False, True):
    ours, base = pelt.models.from_pretrained(base_folder, scan=scan)
    params = pelt.interop.peft.load(folder, ours, base)
    helpers.close(pelt.bypass(ours.apply)({"params": params}, ids), want, 1e-5)
  with pytest.raises(ValueError, match="takes the plain weight apart, and it is a NF4Weight"):
    coded = pelt.nf4(block=32).init(jax.random.key(0), base, pelt.sites(ours, ids))
    pelt.interop.peft.load(folder, ours, coded)


def test_a_start_drawn_at_random_is_refused(tmp_path):
  config = dict(r=2, target_modules=["lin"], init_lora_weights="pissa_niter_4")
  case = Case(config)
  tensors, theirs = adapted(case)
  theirs.save_pretrained(str(tmp_path))
  with pytest.raises(ValueError, match="changes the base"):
    pelt.interop.peft.load(tmp_path, flax_model(case, "float32"), base_params(tensors, "float32"))


class Masked(torch.nn.Module):
  """Dropout by a mask that is given."""

  def __init__(self, mask):
    super().__init__()
    self.mask = mask

  def forward(self, x):
    return x * self.mask


def test_dropout_under_a_magnitude_is_pefts(monkeypatch):
  """In training, biased layers: PEFT and we with one mask, in float64."""
  case = Case(dict(r=2, lora_alpha=6, use_dora=True, lora_dropout=0.5, target_modules=["lin"]))
  tensors, theirs = adapted(case, torch.float64)
  rng = np.random.default_rng(0)
  mask, move = 2.0 * rng.integers(0, 2, 6), 0.5 * rng.normal(size=(2, 10))
  layer = theirs.base_model.model.lin
  layer.lora_B.default.weight.data += torch.from_numpy(move.T)
  layer.lora_magnitude_vector.default.weight.data += 1.5
  layer.lora_dropout["default"] = Masked(torch.from_numpy(mask))
  want = theirs.train()(torch.from_numpy(IDS)).detach().numpy()
  with jax.enable_x64(True):
    model, base = flax_model(case), base_params(tensors)
    params = pelt.dora(2, 6, targets="lin/kernel", dropout=0.5).init(
      jax.random.key(0), base, pelt.sites(model, IDS)
    )
    node = params["lin"]["kernel"]
    a = jnp.asarray(layer.lora_A.default.weight.detach().numpy().T)
    node = node.replace(
      base=node.base.replace(a=a, b=jnp.asarray(move)), magnitude=node.magnitude + 1.5
    )
    params["lin"]["kernel"] = node
    monkeypatch.setattr(nodes.Dropout, "__call__", lambda self, call, x: x * mask[None, None])
    got = pelt.bypass(model.apply)({"params": params}, IDS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    monkeypatch.undo()
    still = pelt.bypass(model.apply)({"params": params}, IDS)
    want = make_values.outputs(theirs)
    np.testing.assert_allclose(still, want, rtol=0, atol=1e-12)
    assert np.abs(got - still).max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_one_step_of_lora_plus_is_pefts(dora):
  """Adam with decay, all four groups: a table, kernels, magnitudes, a head with its bias."""
  from peft.optimizers import create_loraplus_optimizer

  config = dict(r=2, lora_alpha=6, target_modules=["emb", "lin", "lin2"], modules_to_save=["head"])
  case = Case(config | dict(use_dora=dora))
  tensors, theirs = adapted(case, torch.float64)
  torch.manual_seed(1)
  for parameter in theirs.parameters():
    if parameter.requires_grad:
      parameter.data += 0.3 * torch.randn_like(parameter)
  rates = dict(
    lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=5e-3
  )
  tx = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)
  named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
  with jax.enable_x64(True):
    model, base = flax_model(case), base_params(tensors)
    factory = pelt.dora if dora else pelt.lora
    method = pelt.chain(
      factory(2, 6, targets=("emb", "lin/kernel", "lin2/kernel"), plus=True), pelt.train("head")
    )
    params = method.init(jax.random.key(0), base, pelt.sites(model, IDS))
    trainable, _ = pelt.partition(params)
    take = lambda what: our_tree(trainable, {n: what(p).numpy() for n, p in named.items()})
    before = take(lambda p: p.detach().clone())
    theirs(torch.from_numpy(IDS)).square().sum().backward()
    grads = take(lambda p: p.grad.clone())
    tx.step()
    after = take(lambda p: p.detach())
    ours = pelt.lora_plus(optax.adamw, 1e-2, ratio=4.0, weight_decay=0.1, embedding_rate=5e-3)
    with jax.numpy_dtype_promotion("standard"):  # of optax
      updates, _ = ours.update(grads, ours.init(before), before)
    got = optax.apply_updates(before, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), got, after)
    assert len(jax.tree.leaves(got)) == (11 if dora else 8)


def our_tree(tree, named):
  """PEFT's tensors in the places of ours."""

  def find(path, leaf):
    keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
    module, leaf_name, *_, field = keys
    at = f"base_model.model.{module}."
    if field == "value":
      name = at + "modules_to_save." + ("weight" if leaf_name == "kernel" else "bias")
    elif field == "magnitude":
      name = at + "lora_magnitude_vector.weight"
    elif leaf_name == "embedding":
      name = f"{at}lora_embedding_{field.upper()}"
    else:
      name = f"{at}lora_{field.upper()}.weight"
    value = named[name]
    return jnp.asarray(value.T if value.ndim == 2 else value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(find, tree)
