"""AdapterHub's models with random numbers, and its methods beside ours."""

import importlib

import pytest

import pelt_jax as pelt
from tests.support import require
from tests.test_models.helpers import CONFIGS, SEQ2SEQ
from tests.test_models.lifting import Lifted

torch = require("torch")
adapters = require("adapters")
transformers = require("flax_transformers")

LENGTH, RANK, REDUCTION = 3, 2, 8
FAMILY = {"bert": "BertModel", "gpt2": "GPT2Model", "t5": "T5ForConditionalGeneration"}
PREFIX = {"prefix_length": LENGTH, "flat": True}


def unipelt(family):
  fused = {"fused": ((0, 2), 3)} if family == "gpt2" else {}
  return pelt.unipelt(
    LENGTH, rank=RANK, reduction=REDUCTION, reparametrize=False, gate_pool="mean_all", **fused
  )


# Ours by family, theirs.
CASES = {
  "houlsby": (
    lambda f: pelt.adapter("houlsby", reduction=16, activation="silu", train_norms=False),
    lambda: adapters.DoubleSeqBnConfig(),
  ),
  "pfeiffer": (lambda f: pelt.adapter("pfeiffer"), lambda: adapters.SeqBnConfig()),
  "parallel": (
    lambda f: pelt.adapter("scaled_parallel", tap="residual"),
    lambda: adapters.ParBnConfig(),
  ),
  "learned": (
    lambda f: pelt.adapter("scaled_parallel", tap="residual", scaling="learned"),
    lambda: adapters.ParBnConfig(scaling="learned"),
  ),
  "mam": (
    lambda f: pelt.chain(
      pelt.prefix_tuning(LENGTH, reparametrize=False, shift_positions=False),
      pelt.adapter("scaled_parallel", tap="residual"),
    ),
    lambda: adapters.ConfigUnion(adapters.PrefixTuningConfig(**PREFIX), adapters.ParBnConfig()),
  ),
  "unipelt": (
    unipelt,
    lambda: adapters.UniPELTConfig(
      adapters.PrefixTuningConfig(**PREFIX, use_gating=True),
      adapters.SeqBnConfig(reduction_factor=REDUCTION, use_gating=True),
      adapters.LoRAConfig(r=RANK, use_gating=True, dropout=0.0),
    ),
  ),
}


@pytest.fixture
def lifted(monkeypatch):
  monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
  for family in FAMILY:
    for module in (
      f"transformers.models.{family}.modeling_{family}",
      f"adapters.models.{family}.modeling_{family}",
    ):
      monkeypatch.setattr(importlib.import_module(module), "torch", Lifted(torch))


def theirs(family, folder, add):
  """Their model after `add(model)`, everything random; the base is saved before."""
  raw = dict((CONFIGS | SEQ2SEQ)[family])
  kind = getattr(transformers, FAMILY[family].partition("Model")[0].partition("For")[0] + "Config")
  torch.manual_seed(0)
  model = getattr(transformers, FAMILY[family])(kind(**raw, attn_implementation="eager")).double()
  with torch.no_grad():
    for p in model.parameters():
      p.normal_(0, 0.3 if p.ndim > 1 else 0.1)
      if p.ndim == 1:
        p.add_(1)
  model.save_pretrained(folder)
  adapters.init(model)
  add(model)
  model = model.double().eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.normal_(0, 0.3)
  return model


def read(save, folder, module, base, sites):
  """Params with what `save(folder)` writes."""
  save(str(folder))
  return pelt.interop.adapterhub.load(folder, module, base, head=False, sites=sites)
