"""Prompts and prefixes against torch PEFT: folders go both ways, logits agree in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests import support
from tests.test_models import helpers

torch = support.require("torch")
hf_peft = support.require("peft")
transformers = support.require("transformers")

from tests.test_models import test_parity, test_seq2seq_parity  # noqa: E402
from tests.test_models.test_parity import lifted as lifted_decoders  # noqa: E402, F401
from tests.test_models.test_seq2seq_parity import lifted as lifted_seq2seq  # noqa: E402, F401

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
LENGTH = 4
AUTO = {
  "lm": (transformers.AutoModelForCausalLM, "CAUSAL_LM"),
  "classification": (transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
  "tagging": (transformers.AutoModelForTokenClassification, "TOKEN_CLS"),
  "encoder": (transformers.AutoModel, "FEATURE_EXTRACTION"),
  "seq2seq": (transformers.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
}


@pytest.fixture(autouse=True)
def prepared(monkeypatch, lifted_decoders, lifted_seq2seq):  # noqa: F811
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def base_folder(name, task, folder):
  if task == "seq2seq":
    model = test_seq2seq_parity.reference(helpers.SEQ2SEQ[name], torch.float64)
  else:
    model = test_parity.reference(helpers.CONFIGS[name], task, torch.float64)
  model.save_pretrained(folder)
  return folder


def torch_base(folder, task):
  model = AUTO[task][0]
  return model.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def in_peft(base, task, folder):
  return hf_peft.PeftModel.from_pretrained(
    torch_base(base, task), str(folder), autocast_adapter_dtype=False
  ).eval()


def made_in_peft(base, task, config, folder, step=0.3):
  """An adapter that PEFT made, moved and saved; its model as it was in training."""
  torch.manual_seed(1)
  model = hf_peft.get_peft_model(torch_base(base, task), config(task_type=AUTO[task][1]))
  model = model.double().eval()
  for parameter in model.parameters():
    if parameter.requires_grad:
      parameter.data += step * torch.randn_like(parameter)
  model.save_pretrained(str(folder))
  return model


def logits(model, task, ids):
  ids = torch.tensor(ids, dtype=torch.long)
  targets = {"decoder_input_ids": ids[:, :3]} if task == "seq2seq" else {}
  with torch.no_grad():
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **targets)
  return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def ours(model, params, task, ids):
  targets = {"decoder_input_ids": ids[:, :3]} if task == "seq2seq" else {}
  front = np.array(pelt.virtual_tokens(params), np.int32)
  source = np.concatenate([np.tile(front, (len(ids), 1)), ids], axis=1)
  return np.asarray(jax.jit(pelt.bypass(model.apply))({"params": params}, source, **targets))


def moved(params, step=0.3):
  """Params in which every trained leaf was moved by N(0, step)."""
  trainable, frozen = pelt.partition(params)
  rng = np.random.default_rng(0)
  move = lambda x: x + jnp.asarray(step * rng.normal(size=x.shape), x.dtype)
  return pelt.combine(jax.tree.map(move, trainable), frozen)


def load_ours(base, task, **options):
  return pelt.models.from_pretrained(base, task=task, dtype=jnp.float64, **options)


PROMPT = lambda **kw: hf_peft.PromptTuningConfig(num_virtual_tokens=LENGTH, **kw)
P_TUNING = lambda **kw: hf_peft.PromptEncoderConfig(
  num_virtual_tokens=LENGTH, encoder_hidden_size=8, **kw
)
LSTM = lambda **kw: P_TUNING(encoder_reparameterization_type="LSTM", **kw)
FLAT = lambda **kw: hf_peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, **kw)
PROJECTED = lambda **kw: FLAT(prefix_projection=True, encoder_hidden_size=8, **kw)

# Under transformers 5 PEFT's prefixes work in causal language models and bare decoders alone;
# tests/test_foreign has an encoder's classifier.
FROM_PEFT = [
  ("llama", "lm", PROMPT, True),
  ("llama", "encoder", PROMPT, False),
  ("gpt2", "lm", PROMPT, False),
  ("bert", "classification", PROMPT, True),
  ("roberta", "tagging", PROMPT, False),
  ("t5", "seq2seq", PROMPT, True),
  ("bart-scaled", "seq2seq", PROMPT, False),
  ("bert", "classification", P_TUNING, False),
  ("gpt2", "lm", LSTM, True),
  ("t5", "seq2seq", LSTM, False),
  ("llama", "lm", FLAT, False),
  ("llama", "lm", PROJECTED, True),
  ("qwen3", "encoder", PROJECTED, False),
  ("gpt2", "lm", FLAT, True),
  ("gpt2", "lm", PROJECTED, False),
]


@pytest.mark.parametrize(("name", "task", "config", "scan"), FROM_PEFT)
def test_adapters_made_by_peft_compute_the_same_here(name, task, config, scan, tmp_path):
  """And written again, PEFT computes the same."""
  base = base_folder(name, task, tmp_path / "base")
  theirs = made_in_peft(base, task, config, tmp_path / "theirs")
  ids = helpers.tokens(1 if task == "classification" else 2, 7)
  want = logits(theirs, task, ids)
  with jax.enable_x64(True):
    model, plain = load_ours(base, task, scan=scan)
    params = pelt.interop.peft.load(tmp_path / "theirs", model, plain)
    helpers.close(ours(model, params, task, ids), want, 1e-9)
    assert changes(ours(model, plain, task, ids), want)
    pelt.interop.peft.export(tmp_path / "again", params, model)
  helpers.close(logits(in_peft(base, task, tmp_path / "again"), task, ids), want, 1e-9)


def changes(one, other):
  """Whether outputs differ visibly at the last token."""
  return np.abs(one[:, -1] - other[:, -1]).max() > 1e-2 * np.abs(other).max()


HEAD = pelt.train("head")
FROM_US = [
  ("llama", "lm", pelt.prompt_tuning(LENGTH), False),
  ("gpt2", "lm", pelt.prompt_tuning(LENGTH), True),
  ("bert", "classification", pelt.chain(pelt.prompt_tuning(LENGTH), HEAD), False),
  ("t5-gated", "seq2seq", pelt.prompt_tuning(LENGTH), False),
  ("bart-scaled", "seq2seq", pelt.prompt_tuning(LENGTH), True),
  ("llama", "lm", pelt.prefix_tuning(LENGTH, reparametrize=False), True),
  ("llama", "lm", pelt.prefix_tuning(LENGTH, hidden=8), False),
  ("llama", "encoder", pelt.p_tuning_v2(LENGTH), False),
  ("gpt2", "lm", pelt.prefix_tuning(LENGTH, reparametrize=False), False),
  ("gpt2", "lm", pelt.prefix_tuning(LENGTH, hidden=8), True),
]


@pytest.mark.parametrize(("name", "task", "method", "scan"), FROM_US)
def test_adapters_made_here_compute_the_same_in_peft(name, task, method, scan, tmp_path):
  base = base_folder(name, task, tmp_path / "base")
  ids = helpers.tokens(1 if task == "classification" else 2, 7)
  with jax.enable_x64(True):
    model, plain = load_ours(base, task, scan=scan)
    sites = pelt.sites(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    params = moved(method.init(jax.random.key(0), plain, sites))
    pelt.interop.peft.export(tmp_path / "ours", params, model)
    got = ours(model, params, task, ids)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for kind in (DeprecationWarning, FutureWarning):
      warnings.filterwarnings("ignore", category=kind)
    theirs = in_peft(base, task, tmp_path / "ours")
  helpers.close(logits(theirs, task, ids), got, 1e-9)
