"""Encoder-decoders against torch transformers: logits, losses, saved folders, generation."""

import importlib
import json

import jax
import numpy as np
import pytest

from pelt_jax import models
from pelt_jax.models._t5 import bucket_table
from pelt_jax.training._beam import beam_search
from pelt_jax.training._generate import generate
from tests import support
from tests.test_models.helpers import PAD, SCALES, SEQ2SEQ, built, close, padded, tokens
from tests.test_models.lifting import Lifted

torch = support.require("torch")
transformers = support.require("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FAMILY = {"t5": "T5", "bart": "Bart"}
each = pytest.mark.parametrize("name", list(SEQ2SEQ))


@pytest.fixture
def lifted(monkeypatch):
  """Lifts the hard-coded float32 of T5's norms."""
  module = importlib.import_module("transformers.models.t5.modeling_t5")
  monkeypatch.setattr(module, "torch", Lifted(torch))


def reference(raw, dtype):
  """A random Hugging Face model in eval mode."""
  family = FAMILY[raw["model_type"]]
  config = getattr(transformers, family + "Config")(**raw)
  config._attn_implementation = "eager"
  torch.manual_seed(0)
  model = getattr(transformers, family + "ForConditionalGeneration")(config).to(dtype).eval()
  if raw.get("tie_word_embeddings") is False:  # transformers ties it all the same until one differs
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.normal_(0, 0.3 if p.ndim > 1 else 0.1)
      p.mul_(SCALES.get(name.split(".")[-2], 1.0))
      if p.ndim == 1 and name.endswith("weight"):  # a norm's scale
        p.add_(1)
    if family == "Bart":
      model.final_logits_bias.normal_(0, 0.1)
  return model


def long(x):
  return torch.tensor(np.asarray(x), dtype=torch.long)


def batch():
  """Sources padded on either side, targets with ignored ends."""
  both = [padded(tokens(3, 13), [13, 7, 2], side) for side in ("left", "right")]
  ids, mask = (np.concatenate(x) for x in zip(*both, strict=True))
  labels = np.array(tokens(6, 11, seed=1))
  labels[1, 6:] = -100
  return ids, mask, labels


def compare(name, tmp_path, dtype, tolerance):
  model = reference(SEQ2SEQ[name], getattr(torch, dtype))
  model.save_pretrained(tmp_path)
  ids, mask, labels = batch()
  with torch.no_grad():
    out = model(input_ids=long(ids), attention_mask=long(mask), labels=long(labels))
  with jax.enable_x64(dtype == "float64"):
    for scan in (False, True):
      ours, params = models.from_pretrained(tmp_path, task="seq2seq", dtype=dtype, scan=scan)
      run = jax.jit(ours.clone(loss_chunk=12).apply)
      inputs = np.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=5)
      inputs = np.where(inputs == -100, PAD, inputs)
      got = run({"params": params}, ids, mask, decoder_input_ids=inputs)
      close(got, out.logits.numpy(), tolerance)
      losses = run({"params": params}, ids, mask, labels=labels)
      mean = np.asarray(losses).sum() / (labels != -100).sum()
      close(mean, out.loss.numpy(), tolerance)


@each
def test_logits_and_losses_in_float64(name, tmp_path, lifted):
  # Both sides in float64 throughout: what is left is rounding, 1e-16 times a few hundred terms.
  compare(name, tmp_path, "float64", 1e-9)


@each
def test_logits_and_losses_in_float32(name, tmp_path):
  compare(name, tmp_path, "float32", 1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (8, 20), (64, 256), (16, 40)])
def test_buckets(sizes, bidirectional):
  module = importlib.import_module("transformers.models.t5.modeling_t5")
  relative = torch.arange(-600, 601)
  want = module.T5Attention._relative_position_bucket(relative, bidirectional, *sizes).numpy()
  np.testing.assert_array_equal(bucket_table(601, bidirectional, *sizes), want)


@each
def test_a_saved_folder_loads_in_torch(name, tmp_path):
  model, params = built(name, "seq2seq")
  models.save_pretrained(tmp_path, model, params)
  config = json.loads((tmp_path / "config.json").read_text())
  cls = getattr(transformers, config["architectures"][0])
  loaded, info = cls.from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  # Names of the shared embedding are listed as missing and then tied.
  left_over = {k: v for k, v in info.items() if v and k != "error_msgs"}
  assert not left_over, left_over
  ids, mask, labels = batch()
  targets = np.where(labels == -100, PAD, labels)
  with torch.no_grad():
    want = loaded.eval()(
      input_ids=long(ids), attention_mask=long(mask), decoder_input_ids=long(targets)
    ).logits.numpy()
  got = jax.jit(model.apply)({"params": params}, ids, mask, decoder_input_ids=targets)
  close(got, want, 1e-5)


@each
def test_greedy_generation_token_for_token(name, tmp_path):
  model = reference(SEQ2SEQ[name], torch.float32)
  model.save_pretrained(tmp_path)
  ids, mask = padded(tokens(4, 9), [9, 6, 9, 3], "right")
  want = model.generate(
    long(ids),
    attention_mask=long(mask),
    max_new_tokens=20,
    do_sample=False,
    num_beams=1,
    output_scores=True,
    return_dict_in_generate=True,
  )
  sequences = want.sequences[:, 1:].numpy()  # behind the start token
  best = torch.stack(want.scores).topk(2).values
  ties = ((best[..., 0] - best[..., 1]).numpy() < 1e-4).any(axis=1)
  until = ties.argmax() if ties.any() else sequences.shape[1]
  assert until > 5 and len(np.unique(sequences)) > 5, "ties or repetition test nothing"
  ours, params = models.from_pretrained(tmp_path, task="seq2seq", scan=True)
  out = generate(ours.apply, params, ids, mask, max_new_tokens=20, eos_token_id=2, pad_token_id=PAD)
  np.testing.assert_array_equal(np.asarray(out.tokens)[:, :until], sequences[:, :until])


@pytest.mark.parametrize("penalty", [1.0, 0.0])
@pytest.mark.parametrize("name", ["t5-gated", "bart"])
def test_beam_search(name, penalty, tmp_path):
  model = reference(SEQ2SEQ[name], torch.float32)
  model.save_pretrained(tmp_path)
  ids, mask = padded(tokens(6, 9), [9, 6, 9, 3, 1, 8], "right")
  stops = [2, *range(70, 97)]  # many, so that beams end early
  want = model.generate(
    long(ids),
    attention_mask=long(mask),
    max_new_tokens=12,
    do_sample=False,
    num_beams=4,
    length_penalty=penalty,
    eos_token_id=stops,
    output_scores=True,
    return_dict_in_generate=True,
  )
  ours, params = models.from_pretrained(tmp_path, task="seq2seq", scan=name == "bart")
  out = beam_search(
    ours.apply, params, ids, mask, beams=4, max_new_tokens=12, length_penalty=penalty,
    eos_token_id=stops, pad_token_id=PAD,
  )  # fmt: skip
  np.testing.assert_allclose(out.scores[:, 0], want.sequences_scores.numpy(), rtol=1e-5)
  sequences = want.sequences[:, 1:].numpy()
  got = np.asarray(out.tokens)[:, 0]
  np.testing.assert_array_equal(got[:, : sequences.shape[1]], sequences)
  assert (got[:, sequences.shape[1] :] == PAD).all()
