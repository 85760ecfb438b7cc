"""Prompts and prefixes against torch PEFT: logits in float64 from the same tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax._walk import update_at, walk
from tests import support
from tests.test_models import helpers

torch = support.require("torch")
peft = support.require("peft")
transformers = support.require("transformers")

from tests.test_models.test_parity import lifted as lifted  # noqa: E402
from tests.test_models.test_parity import reference  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
LENGTH = 4
AUTO = {
  "lm": (transformers.AutoModelForCausalLM, "CAUSAL_LM"),
  "classification": (transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pair(name, task, config, folder):
  """Our model and torch PEFT's over the same checkpoint."""
  reference(helpers.CONFIGS[name], task, torch.float64).save_pretrained(folder)
  model, base = pelt.models.from_pretrained(folder, task=task, dtype=jnp.float64)
  auto, kind = AUTO[task]
  theirs = auto.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
  theirs = peft.get_peft_model(theirs, config(task_type=kind), autocast_adapter_dtype=False)
  return model, base, theirs.double().eval()


def array(tensor):
  return jnp.asarray(tensor.detach().numpy())


def logits(model, ids):
  mask = torch.ones(len(ids), ids.shape[1], dtype=torch.long)
  with torch.no_grad():
    return model(input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=mask).logits.numpy()


@pytest.mark.parametrize(
  ("name", "task"),
  [("llama", "lm"), ("qwen2", "lm"), ("gpt2", "lm"), ("bert", "classification")],
)
def test_prompt_tuning(name, task, tmp_path, lifted):
  config = lambda **kw: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, **kw)
  ids = helpers.tokens(2, 7)
  with jax.enable_x64(True):
    model, base, theirs = pair(name, task, config, tmp_path)
    params = pelt.prompt_tuning(LENGTH).init(jax.random.key(0), base, pelt.sites(model, ids))
    weight = array(theirs.prompt_encoder["default"].embedding.weight)
    (path,) = (p for p, v in walk(params) if isinstance(v, pelt.nodes.ExtendedEmbedding))
    node = dict(walk(params))[path]
    params = update_at(params, {path: node.replace(prompt=weight)})
    virtual = np.tile(np.array(pelt.virtual_tokens(params), np.int32), (2, 1))
    got = pelt.bypass(model.apply)({"params": params}, np.concatenate([virtual, ids], axis=1))
    helpers.close(got, logits(theirs, ids), 1e-9)


def prefixed(theirs, base, sites, projection):
  """Our params with the prefix of torch PEFT's model."""
  encoder = theirs.prompt_encoder["default"]
  method = pelt.prefix_tuning(LENGTH, reparametrize=projection, hidden=8)
  params = method.init(jax.random.key(0), base, sites)
  if projection:
    (name,) = params["generators"]
    first, last = encoder.transform[0], encoder.transform[2]
    before = params["generators"][name]
    params["generators"][name] = before.replace(
      embedding=array(encoder.embedding.weight),
      w1=array(first.weight).T,
      b1=array(first.bias),
      w2=array(last.weight).T,
      b2=array(last.bias),
    )
    shapes = [(n.b1.shape, n.w2.shape, n.b2.shape) for n in (before, params["generators"][name])]
    assert shapes[0] == shapes[1]  # PEFT's embedding is as wide as a layer's keys
    return params
  prefixes = {p: v for p, v in walk(params) if isinstance(v, pelt.nodes.Prefix)}
  heads = next(iter(prefixes.values())).keys.shape[-2:]
  table = array(encoder.embedding.weight).reshape(LENGTH, -1, 2, *heads)
  changes = {}
  for path, node in prefixes.items():
    layer = next(int(p) for p in path.split("/") if p.isdigit())
    changes[path] = node.replace(keys=table[:, layer, 0], values=table[:, layer, 1])
  return update_at(params, changes)


@pytest.mark.parametrize("projection", [False, True])
# Under a sliding window PEFT's prefix slides out of sight, where the paper lets every query see it.
# Encoders take no keys and values from outside since transformers 5: BERT is in tests/test_foreign.
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_prefix_tuning(name, projection, tmp_path, lifted):
  config = lambda **kw: peft.PrefixTuningConfig(
    num_virtual_tokens=LENGTH, prefix_projection=projection, encoder_hidden_size=8, **kw
  )
  ids = helpers.tokens(2, 7)
  with jax.enable_x64(True):
    model, base, theirs = pair(name, "lm", config, tmp_path)
    params = prefixed(theirs, base, pelt.sites(model, ids), projection)
    got = pelt.bypass(model.apply)({"params": params}, ids)
    helpers.close(got, logits(theirs, ids), 1e-9)
