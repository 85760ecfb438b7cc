"""Against torch transformers: every family and task, real models, saved folders, generation."""

import importlib
import json

import jax
import numpy as np
import pytest

from pelt_jax import models
from pelt_jax.training._generate import generate
from tests import support
from tests.test_models.helpers import (
  CONFIGS,
  ENCODERS,
  PAIRS,
  built,
  close,
  padded,
  tokens,
)
from tests.test_models.lifting import Lifted

torch = support.require("torch")
transformers = support.require("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SUFFIX = {
  "lm": "ForCausalLM",
  "classification": "ForSequenceClassification",
  "tagging": "ForTokenClassification",
  "encoder": "Model",
  "mlm": "ForMaskedLM",
}
FAMILY = {
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
  "gpt2": "GPT2",
  "bert": "Bert",
  "roberta": "Roberta",
}


@pytest.fixture
def lifted(monkeypatch):
  """Lifts the hard-coded float32 of norms, rotary angles and softmax, which alone cost 1e-7."""
  names = [f"models.{family}.modeling_{family}" for family in FAMILY] + ["modeling_rope_utils"]
  for name in names:
    monkeypatch.setattr(importlib.import_module(f"transformers.{name}"), "torch", Lifted(torch))
  # Dynamic scaling divides an integer tensor, which gives the default dtype.
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  yield
  torch.set_default_dtype(before)


def reference(raw, task, dtype, seed=0):
  """A random Hugging Face model in eval mode."""
  kind = raw["model_type"]
  config = getattr(transformers, FAMILY[kind] + "Config")(**raw)
  config.num_labels = 5
  config._attn_implementation = "eager"
  torch.manual_seed(seed)
  suffix = "LMHeadModel" if (kind, task) == ("gpt2", "lm") else SUFFIX[task]
  model = getattr(transformers, FAMILY[kind] + suffix)(config).to(dtype).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.normal_(0, 0.3 if p.ndim > 1 else 0.1)
      if p.ndim == 1 and name.endswith("weight"):  # a norm's scale
        p.add_(1)
  return model


def output(model, ids, mask=None):
  with torch.no_grad():
    mask = None if mask is None else torch.tensor(mask)
    kwargs = {}
    if (
      mask is not None and model.config.model_type == "gpt2"
    ):  # it counts padding, save in generate
      kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(0)
    out = model(torch.tensor(ids, dtype=torch.long), attention_mask=mask, **kwargs)
  out = out.logits if hasattr(out, "logits") else out.last_hidden_state
  return out.numpy()


def ours(folder, task, ids, mask, dtype, **options):
  model, params = models.from_pretrained(folder, task=task, dtype=dtype, **options)
  return np.asarray(jax.jit(model.apply)({"params": params}, ids, mask))


def compare(raw, task, tmp_path, dtype, tolerance, sides=("left", "right")):
  torch_dtype = getattr(torch, dtype)
  model = reference(raw, task, torch_dtype)
  model.save_pretrained(tmp_path)
  ids, lengths = tokens(3, 11), [11, 7, 2]
  both = [padded(ids, lengths, side) for side in sides]
  batch, mask = (np.concatenate(x) for x in zip(*both, strict=True))
  where = None if task == "classification" else mask
  want = output(model, batch, mask)
  with jax.enable_x64(dtype == "float64"):
    for scan in (False, True):
      got = ours(tmp_path, task, batch, mask, dtype, scan=scan)
      close(got, want, tolerance, where)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_logits_in_float64(name, task, tmp_path, lifted):
  # Both sides in float64 throughout: what is left is rounding, 1e-16 times a few hundred terms.
  compare(CONFIGS[name], task, tmp_path, "float64", 1e-9)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert"])
def test_logits_of_the_unmodified_reference(name, tmp_path):
  # Its float32 casts alone move logits by 1e-7; and they turn its float64 mask into -inf, so that
  # padding on the left gives NaN.
  compare(CONFIGS[name], "tagging", tmp_path, "float64", 1e-6, sides=("right",))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_in_float32(name, tmp_path):
  compare(CONFIGS[name], "tagging", tmp_path, "float32", 1e-5)


ROPES = {
  "linear": {"factor": 3.0},
  # 11 tokens are past the trained length, so the base must grow.
  "dynamic": {"factor": 3.0},
  "llama3": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  },
  "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", list(ROPES))
def test_rope_scaling(kind, tmp_path, lifted):
  raw = CONFIGS["llama"] | {
    "head_dim": 16,
    "rope_parameters": {"rope_type": kind, "rope_theta": 100.0} | ROPES[kind],
    "max_position_embeddings": 8 if kind == "dynamic" else 64,
  }
  if kind == "yarn":
    raw["rope_parameters"] |= {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4.0}
  compare(raw, "lm", tmp_path, "float64", 1e-9)


@pytest.mark.parametrize("name", ENCODERS)
def test_token_types_and_pooler(name, tmp_path):
  raw = CONFIGS[name] | {"type_vocab_size": 2}
  model = reference(raw, "encoder", torch.float64)
  model.save_pretrained(tmp_path)
  ids = tokens(2, 9)
  types_ = (np.arange(9)[None] > 4).astype(np.int32).repeat(2, 0)
  with torch.no_grad():
    out = model(torch.tensor(ids).long(), token_type_ids=torch.tensor(types_).long())
  with jax.enable_x64(True):
    module, params = models.from_pretrained(tmp_path, task="encoder", dtype="float64")
    hidden, pooled = module.clone(pooler=True).apply({"params": params}, ids, token_type_ids=types_)
    close(hidden, out.last_hidden_state.numpy(), 1e-9)
    close(pooled, out.pooler_output.numpy(), 1e-9)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_saved_folder_loads_in_torch(name, task, tmp_path):
  model, params = built(name, task)
  models.save_pretrained(tmp_path, model, params)
  config = json.loads((tmp_path / "config.json").read_text())
  cls = getattr(transformers, config["architectures"][0])
  loaded, info = cls.from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  left_over = {k: v for k, v in info.items() if v and k != "error_msgs"}
  assert not left_over, left_over
  assert loaded.dtype == torch.float32
  ids, mask = padded(tokens(2, 9), [9, 6], "right")
  where = None if task == "classification" else mask
  got = np.asarray(jax.jit(model.apply)({"params": params}, ids, mask))
  close(output(loaded.eval(), ids, mask), got, 1e-5, where)


@pytest.mark.parametrize("scan", [False, True])
def test_stories(stories, scan):
  ids = np.random.default_rng(0).integers(3, 512, (2, 64))
  ids[:, 0] = 1
  model = transformers.AutoModelForCausalLM.from_pretrained(stories, attn_implementation="eager")
  close(ours(stories, "lm", ids, None, "float32", scan=scan), output(model, ids), 1e-5)


def test_stories_in_float64(stories, lifted):
  ids = np.random.default_rng(0).integers(3, 512, (2, 64))
  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(stories, dtype=torch.float64, attn_implementation="eager")
  with jax.enable_x64(True):
    close(ours(stories, "lm", ids, None, "float64"), output(model, ids), 1e-9)


@pytest.mark.parametrize("scan", [False, True])
def test_smollm2(smollm2, scan):
  ids = np.random.default_rng(0).integers(3, 40000, (1, 32))
  model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation="eager")
  close(ours(smollm2, "lm", ids, None, "float32", scan=scan), output(model, ids), 1e-5)


def test_smollm2_in_float64(smollm2, lifted):
  ids = np.random.default_rng(0).integers(3, 40000, (1, 16))
  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(smollm2, dtype=torch.float64, attn_implementation="eager")
  with jax.enable_x64(True):
    close(ours(smollm2, "lm", ids, None, "float64", scan=True), output(model, ids), 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_minilm(minilm, dtype):
  ids = np.random.default_rng(0).integers(1000, 30000, (2, 40))
  mask = np.ones_like(ids)
  mask[1, 17:] = 0
  load = transformers.AutoModel.from_pretrained
  model = load(minilm, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
  with jax.enable_x64(dtype == "float64"):
    for scan in (False, True):
      got = ours(minilm, "encoder", ids, mask, dtype, scan=scan)
      close(got, output(model, ids, mask), 1e-5 if dtype == "float32" else 1e-9, mask)


def agree(folder, prompts, mask, steps):
  """Greedy continuations equal torch's up to the first step that is a tie (scores within 1e-4)."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  want = model.generate(
    torch.tensor(prompts).long(),
    attention_mask=torch.tensor(mask),
    max_new_tokens=steps,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    output_scores=True,
    return_dict_in_generate=True,
  )
  module, params = models.from_pretrained(folder)
  got = np.asarray(generate(module.apply, params, prompts, mask, max_new_tokens=steps).tokens)
  for row in range(len(prompts)):
    tokens_ = want.sequences[row, prompts.shape[1] :].numpy()
    best = torch.stack(want.scores)[:, row].topk(2).values
    ties = np.flatnonzero((best[:, 0] - best[:, 1]).numpy() < 1e-4)
    until = ties[0] if len(ties) else steps
    assert until > steps // 4, "the prompt ties too early to test anything"
    np.testing.assert_array_equal(got[row, :until], tokens_[:until])


def test_greedy_generation_on_stories(stories):
  prompts = np.array([[1, 403, 407, 261], [0, 0, 1, 410]])  # the second one padded on the left
  agree(stories, prompts, np.array([[1, 1, 1, 1], [0, 0, 1, 1]]), 200)


def test_greedy_generation_on_smollm2(smollm2):
  tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(
    str(smollm2 / "tokenizer.json")
  )
  prompt = np.array([tokenizer.encode("The capital of Germany is").ids])
  agree(smollm2, prompt, np.ones_like(prompt), 100)


def test_a_bfloat16_file_is_read_exactly(tmp_path):
  reference(CONFIGS["llama"], "lm", torch.bfloat16).save_pretrained(tmp_path)
  # Loaded anew: `.float()` would keep rotary frequencies that were rounded to bfloat16.
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  ids = tokens(2, 9)
  close(ours(tmp_path, "lm", ids, None, "float32"), output(model, ids), 1e-5)
