"""LoRA files of GPT-2, whose kernels torch keeps the other way round, and of encoder-decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests import support
from tests.test_models import helpers

torch = support.require("torch")
hf_peft = support.require("peft")

from tests.test_interop import test_live_prompts as live  # noqa: E402
from tests.test_interop.test_live_prompts import (  # noqa: E402
  lifted_decoders as lifted_decoders,
)
from tests.test_interop.test_live_prompts import (  # noqa: E402
  lifted_seq2seq as lifted_seq2seq,
)
from tests.test_interop.test_live_prompts import prepared as prepared  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
QV = pelt.lora(rank=3, alpha=7, targets=("query", "value"))
LINEAR = pelt.lora(rank=2, alpha=3, targets="all-linear")
FUSED = pelt.lora(rank=2, alpha=6, targets="query", fused=((0, 2), 3))

FROM_US = [
  ("gpt2", "lm", QV, False),
  ("gpt2", "lm", FUSED, True),
  ("gpt2", "lm", pelt.chain(QV, pelt.lora(rank=2, alpha=6, targets="embedding")), False),
  ("gpt2", "lm", pelt.chain(QV, pelt.train("embedding")), True),
  ("gpt2-untied", "lm", pelt.chain(LINEAR, pelt.train("head")), False),
  ("gpt2", "classification", pelt.chain(QV, pelt.train("head")), True),
  ("gpt2", "lm", pelt.chain(QV, pelt.train("c_fc")), True),
  ("gpt2", "lm", pelt.chain(QV, pelt.bitfit()), False),
  ("t5", "seq2seq", QV, True),
  ("t5-gated", "seq2seq", LINEAR, False),
  ("bart", "seq2seq", LINEAR, True),
  ("bart-scaled", "seq2seq", pelt.chain(QV, pelt.bitfit()), False),
]


@pytest.mark.parametrize(("name", "task", "method", "scan"), FROM_US)
def test_adapters_made_here_compute_the_same_in_peft(name, task, method, scan, tmp_path):
  base = live.base_folder(name, task, tmp_path / "base")
  ids = helpers.tokens(2, 7)
  with jax.enable_x64(True):
    model, plain = live.load_ours(base, task, scan=scan)
    sites = pelt.sites(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    params = live.moved(method.init(jax.random.key(0), plain, sites), 0.1)
    pelt.interop.peft.export(tmp_path / "ours", params, model)
    got = live.ours(model, params, task, ids)
    again = pelt.interop.peft.load(tmp_path / "ours", model, plain)
    helpers.close(live.ours(model, again, task, ids), got, 1e-12)
    assert live.changes(live.ours(model, plain, task, ids), got)
  theirs = live.in_peft(base, task, tmp_path / "ours")
  helpers.close(live.logits(theirs, task, ids), got, 1e-9)


FROM_PEFT = [
  ("gpt2", "lm", dict(target_modules=["c_attn"], fan_in_fan_out=True), True),
  ("gpt2", "lm", dict(target_modules="all-linear"), False),
  ("gpt2", "tagging", dict(target_modules=["attn.c_proj", "c_fc"], bias="lora_only"), False),
  ("gpt2", "lm", dict(target_modules=["c_attn"], modules_to_save=["c_fc"]), False),
  ("t5", "seq2seq", dict(target_modules=["q", "v"]), True),
  ("t5", "seq2seq", dict(target_modules=["q"], bias="all"), False),
  ("t5-gated", "seq2seq", dict(target_modules="all-linear"), False),
  ("bart", "seq2seq", dict(target_modules="all-linear"), False),
  (
    "bart",
    "seq2seq",
    dict(
      target_modules=["q_proj", "fc1"],
      rank_pattern={r"decoder.*q_proj": 4},
      alpha_pattern={"encoder.layers.0.fc1": 5},
      bias="all",
    ),
    True,
  ),
]


@pytest.mark.parametrize(("name", "task", "options", "scan"), FROM_PEFT)
def test_adapters_made_by_peft_compute_the_same_here(name, task, options, scan, tmp_path):
  """And written again, PEFT computes the same."""
  base = live.base_folder(name, task, tmp_path / "base")
  config = lambda **kw: hf_peft.LoraConfig(r=3, lora_alpha=5, **options, **kw)
  theirs = live.made_in_peft(base, task, config, tmp_path / "theirs", 0.1)
  ids = helpers.tokens(2, 7)
  want = live.logits(theirs, task, ids)
  with jax.enable_x64(True):
    model, plain = live.load_ours(base, task, scan=scan)
    params = pelt.interop.peft.load(tmp_path / "theirs", model, plain)
    helpers.close(live.ours(model, params, task, ids), want, 1e-9)
    assert live.changes(live.ours(model, plain, task, ids), want)
    pelt.interop.peft.export(tmp_path / "again", params, model)
  helpers.close(live.logits(live.in_peft(base, task, tmp_path / "again"), task, ids), want, 1e-9)


def test_gradients_of_a_conv1d_are_those_of_peft(tmp_path):
  base = live.base_folder("gpt2", "lm", tmp_path / "base")
  config = lambda **kw: hf_peft.LoraConfig(
    r=3, target_modules=["c_attn"], fan_in_fan_out=True, **kw
  )
  theirs = live.made_in_peft(base, "lm", config, tmp_path / "theirs", 0.1)
  ids = helpers.tokens(2, 7)
  cotangent = np.random.default_rng(1).normal(size=(2, 7, helpers.VOCAB))
  with jax.enable_x64(True):
    model, plain = live.load_ours(base, "lm")
    params = pelt.interop.peft.load(tmp_path / "theirs", model, plain)
    apply = pelt.bypass(model.apply)
    loss = lambda p: jnp.sum(apply({"params": p}, ids) * cotangent)
    grads = jax.jit(pelt.value_and_grad(loss))(*pelt.partition(params))[1]
  out = theirs(torch.tensor(ids, dtype=torch.long)).logits
  (out * torch.tensor(cotangent)).sum().backward()
  for i in range(3):
    node = grads["transformer"]["h"][str(i)]["attn"]["c_attn"]["kernel"]
    module = theirs.base_model.model.transformer.h[i].attn.c_attn
    for side in "AB":
      want = getattr(module, f"lora_{side}")["default"].weight.grad.numpy()
      helpers.close(getattr(node, side.lower()).T, want, 1e-9)
