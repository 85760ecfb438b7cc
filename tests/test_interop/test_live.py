"""Against torch PEFT itself: folders go both ways, outputs, gradients and merges agree."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests import support
from tests.test_interop.harness import (
  CASES,
  DATA,
  base_params,
  flax_model,
  our_gradients,
  read_values,
)
from tests.test_models import helpers

torch = support.require("torch")
hf_peft = support.require("peft")
transformers = support.require("transformers")

from tests.test_interop import make_values  # noqa: E402
from tests.test_models.test_parity import lifted as lifted  # noqa: E402
from tests.test_models.test_parity import output, reference  # noqa: E402

pytestmark = [
  pytest.mark.parity,
  # PEFT only looks at modules when it checks the keys of patterns, which also serve parameters.
  pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),
  pytest.mark.filterwarnings("ignore:The following alpha_pattern keys"),
  pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
  pytest.mark.filterwarnings("ignore::FutureWarning"),
]
AUTO = {
  "lm": transformers.AutoModelForCausalLM,
  "classification": transformers.AutoModelForSequenceClassification,
  "tagging": transformers.AutoModelForTokenClassification,
  "encoder": transformers.AutoModel,
}
ORDER = ("up", "down")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", CASES)
def test_stored_values_are_what_peft_computes_now(name, tmp_path):
  make_values.make(CASES[name], tmp_path)
  stored, now = read_values(DATA / name), read_values(tmp_path)
  assert set(stored) == set(now)
  for key, value in now.items():
    np.testing.assert_allclose(stored[key], value, atol=CASES[name].atol, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_small_models_written_here_compute_the_same_in_peft(name, tmp_path):
  case, values = CASES[name], read_values(DATA / name)
  with jax.enable_x64(True):
    model, base = flax_model(case), base_params(values)
    params = pelt.interop.peft.load(DATA / name, model, base, parameter_order=ORDER)
    pelt.interop.peft.export(tmp_path, params, model, parameter_order=ORDER)
  out = make_values.outputs(make_values.load_in_peft(case, tmp_path))
  np.testing.assert_allclose(out, values["out"], rtol=0, atol=case.atol)


QV = dict(targets=("query", "value"))
METHODS = {
  "query-value": pelt.lora(rank=3, alpha=7, **QV),
  "rslora": pelt.lora(rank=4, alpha=6, rslora=True, **QV),
  "all-linear": pelt.lora(rank=2, alpha=3, targets="all-linear"),
  "twice": pelt.chain(pelt.lora(rank=2, alpha=6, **QV), pelt.lora(rank=3, alpha=5, **QV)),
  "patterns": pelt.lora(
    rank=3,
    alpha=6,
    targets=("query", "value"),
    rank_pattern={"1/*/q_proj": 5, "1/*/*/query": 5},
    alpha_pattern={"2/*/v_proj": 4, "2/*/*/value": 4},
  ),
  "embedding": pelt.lora(rank=2, alpha=6, targets=("query", "embedding")),
  "biases": pelt.chain(pelt.lora(rank=2, alpha=6, **QV), pelt.bitfit()),
  "dora": pelt.dora(rank=2, alpha=6, targets=("query", "embedding", "ffn_out")),
  "pissa": pelt.pissa(rank=2, alpha=6, targets=("query", "ffn_out")),
  "olora": pelt.olora(rank=4, alpha=6, rslora=True, targets=("query", "ffn_out")),
  "lora_fa": pelt.lora_fa(rank=2, alpha=6, **QV),
}
MODELS = [
  ("llama", "lm", "query-value"),
  ("llama", "lm", "patterns"),
  ("llama", "lm", "all-linear"),
  ("llama", "lm", "embedding"),
  ("llama", "lm", "dora"),
  ("llama", "lm", "pissa"),
  ("llama", "lm", "olora"),
  ("llama", "lm", "lora_fa"),
  ("llama", "classification", "rslora"),
  ("llama", "encoder", "query-value"),
  ("llama-tied-biased", "lm", "embedding"),
  ("llama-tied-biased", "lm", "biases"),
  ("qwen2", "lm", "twice"),
  ("qwen3", "tagging", "query-value"),
  ("bert", "classification", "query-value"),
  ("bert", "classification", "patterns"),
  ("bert", "classification", "embedding"),
  ("bert", "classification", "biases"),
  ("bert", "classification", "dora"),
  ("bert", "tagging", "all-linear"),
  ("bert", "encoder", "query-value"),
  ("roberta", "classification", "rslora"),
]


def with_method(model, base, method, head):
  """Params in which every trained leaf was moved by N(0, 0.1)."""
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  method = pelt.chain(method, pelt.train("head")) if head else method
  params = method.init(jax.random.key(0), base, pelt.sites(model, ids))
  trainable, frozen = pelt.partition(params)
  rng = np.random.default_rng(0)
  move = lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
  return pelt.combine(jax.tree.map(move, trainable), frozen)


def in_peft(base, task, folder, dtype=torch.float64, **options):
  model = AUTO[task].from_pretrained(base, dtype=dtype, attn_implementation="eager", **options)
  return hf_peft.PeftModel.from_pretrained(
    model, str(folder), is_trainable=True, autocast_adapter_dtype=False
  ).eval()


@pytest.mark.parametrize(("name", "task", "kind"), MODELS)
def test_models_agree_in_float64(name, task, kind, tmp_path, lifted):
  """Ours to PEFT: logits, gradients of every A and B, merged logits, looped and scanned."""
  base_folder, folder = tmp_path / "base", tmp_path / "adapter"
  reference(helpers.CONFIGS[name], task, torch.float64).save_pretrained(base_folder)
  ids = helpers.tokens(2, 9)
  with jax.enable_x64(True):
    model, base = pelt.models.from_pretrained(base_folder, task=task, dtype=jnp.float64)
    head = task in ("classification", "tagging") and kind != "all-linear"
    params = with_method(model, base, METHODS[kind], head)
    pelt.interop.peft.export(folder, params, model)
    theirs = in_peft(base_folder, task, folder)
    want = output(theirs, ids)
    apply = jax.jit(pelt.bypass(model.apply))
    got = apply({"params": params}, ids)
    helpers.close(got, want, 1e-9)
    assert np.abs(got - apply({"params": base}, ids)).max() > 1e-2 * np.abs(want).max()
    helpers.close(model.apply({"params": pelt.merge(params)}, ids), want, 1e-9)

    scanned, stacked = pelt.models.from_pretrained(
      base_folder, task=task, dtype=jnp.float64, scan=True
    )
    stacked = pelt.interop.peft.load(folder, scanned, stacked)
    helpers.close(jax.jit(pelt.bypass(scanned.apply))({"params": stacked}, ids), want, 1e-9)

    # Gradients of what was read back: PEFT's own layout, two LoRAs already joined into one.
    params = pelt.interop.peft.load(folder, model, base)
    cotangent = np.random.default_rng(1).normal(size=want.shape)
    loss = lambda p: jnp.sum(apply({"params": p}, ids) * cotangent)
    grads = our_gradients(jax.jit(pelt.value_and_grad(loss))(*pelt.partition(params))[1])
  out = theirs(torch.tensor(ids, dtype=torch.long))
  out = out.logits if hasattr(out, "logits") else out.last_hidden_state
  (out * torch.tensor(cotangent)).sum().backward()
  seen = compare_gradients(grads, theirs, tied=name == "llama-tied-biased" and kind == "embedding")
  assert seen
  if name != "llama-tied-biased" or kind != "embedding":  # PEFT adds a tied change twice there
    helpers.close(output(theirs.merge_and_unload(), ids), want, 1e-9)


def compare_gradients(ours, theirs, tied):
  found = {}
  for name, parameter in theirs.named_parameters():
    if parameter.grad is not None and parameter.requires_grad:
      name = name.replace(".modules_to_save.default", "").replace(".default", "")
      name = name if "lora_" in name else name.replace(".base_layer", "")
      found[name] = parameter.grad.numpy()
  if tied:  # torch has the table's pair twice; the gradient of what is shared is the sum
    table, head = "base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head."
    for side, other in (("A", "lora_B.weight"), ("B", "lora_A.weight")):
      if head + other in found:
        found[table + side] = found[table + side] + found.pop(head + other).T
  top = max(np.abs(g).max() for g in found.values())
  assert set(ours) == set(found)
  for name, value in ours.items():
    np.testing.assert_allclose(value, found[name], rtol=0, atol=1e-9 * top, err_msg=name)
  return len(found)


CONFIGURATIONS = [
  ("llama", "lm", dict(r=3, lora_alpha=5, target_modules="all-linear")),
  ("llama", "lm", dict(r=3, target_modules=r".*layers\.[02]\..*\.(q|o)_proj", use_rslora=True)),
  (
    "llama",
    "lm",
    dict(
      r=2,
      lora_alpha=6,
      target_modules=["q_proj", "v_proj", "down_proj"],
      layers_to_transform=[0, 2],
      rank_pattern={"q_proj": 4, r"layers\.2\.self_attn\.v_.*": 3},
      alpha_pattern={"^model.layers.0.mlp.down_proj": 9},
    ),
  ),
  ("llama", "lm", dict(r=2, target_modules=["embed_tokens", "lm_head", "k_proj"])),
  ("llama", "lm", dict(r=2, target_modules=["k_proj"], modules_to_save=["norm", "lm_head"])),
  ("llama", "lm", dict(r=2, target_modules=["embed_tokens", "o_proj"], use_dora=True)),
  ("qwen2", "lm", dict(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)),
  ("qwen2", "lm", dict(r=2, target_modules=["q_proj"], bias="all")),
  ("bert", "classification", dict(r=3, target_modules=["query"], bias="lora_only")),
  ("bert", "classification", dict(r=3, target_modules=["dense"], exclude_modules=["pooler.dense"])),
  ("bert", "classification", dict(r=3, target_modules=["query"], bias="all")),
  ("roberta", "tagging", dict(r=3, target_modules=["dense", "query"])),
]
TASK_TYPES = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS", "tagging": "TOKEN_CLS"}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("name", "task", "options"), CONFIGURATIONS)
def test_adapters_made_by_peft_compute_the_same_here(name, task, options, tmp_path, lifted):
  base_folder, folder = tmp_path / "base", tmp_path / "adapter"
  reference(helpers.CONFIGS[name], task, torch.float64).save_pretrained(base_folder)
  model = AUTO[task].from_pretrained(base_folder, dtype=torch.float64, attn_implementation="eager")
  config = hf_peft.LoraConfig(task_type=TASK_TYPES[task], **options)
  adapted = hf_peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
  torch.manual_seed(1)
  for parameter in adapted.parameters():
    if parameter.requires_grad:
      parameter.data += 0.1 * torch.randn_like(parameter)
  adapted.save_pretrained(str(folder))
  ids = helpers.tokens(2, 9)
  want = output(adapted, ids)
  with jax.enable_x64(True):
    for scan in (False, True):
      ours, base = pelt.models.from_pretrained(base_folder, task=task, dtype=jnp.float64, scan=scan)
      params = pelt.interop.peft.load(folder, ours, base)
      helpers.close(jax.jit(pelt.bypass(ours.apply))({"params": params}, ids), want, 1e-9)
      # And back again: PEFT reads what we write of it.
      again = tmp_path / f"again-{scan}"
      pelt.interop.peft.export(again, params, ours)
      helpers.close(output(in_peft(base_folder, task, again), ids), want, 1e-9)


def test_a_tied_table_adapted_for_lookups_alone_is_refused(tmp_path):
  base_folder, folder = tmp_path / "base", tmp_path / "adapter"
  reference(helpers.CONFIGS["qwen2"], "lm", torch.float32).save_pretrained(base_folder)
  model = AUTO["lm"].from_pretrained(base_folder)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    hf_peft.get_peft_model(
      model, hf_peft.LoraConfig(target_modules=["embed_tokens"])
    ).save_pretrained(str(folder))
  ours, base = pelt.models.from_pretrained(base_folder)
  with pytest.raises(ValueError, match="lookups alone"):
    pelt.interop.peft.load(folder, ours, base)


@pytest.mark.parametrize(("source", "task"), [("minilm", "classification"), ("smollm2", "lm")])
def test_real_models_both_ways(source, task, tmp_path):
  """float32, a real checkpoint: adapters of size 0.1 in up to 30 layers, rounded on both sides."""
  folder = support.require(source)
  labels = {"num_labels": 6} if task == "classification" else {}
  model, base = pelt.models.from_pretrained(folder, task=task, **labels)
  params = with_method(model, base, pelt.lora(rank=8, alpha=16, **QV), head=bool(labels))
  pelt.interop.peft.export(tmp_path / "ours", params, model, base_model_name=str(folder))
  config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
  assert config["r"] == 8
  theirs = in_peft(folder, task, tmp_path / "ours", torch.float32, **labels)
  ids = np.random.default_rng(0).integers(1000, 20000, (2, 24)).astype(np.int32)
  want = output(theirs, ids)
  apply = jax.jit(pelt.bypass(model.apply))
  helpers.close(apply({"params": params}, ids), want, 3e-5)
  theirs.save_pretrained(str(tmp_path / "theirs"))
  again = pelt.interop.peft.load(tmp_path / "theirs", model, base)
  helpers.close(apply({"params": again}, ids), want, 3e-5)
