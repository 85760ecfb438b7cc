"""Folders of AdapterHub's `adapters` go both ways: logits agree in float64."""

import importlib

import jax
import numpy as np
import pytest

import pelt_jax as pelt
from tests import support
from tests.test_interop import hub
from tests.test_models.helpers import close
from tests.test_models.lifting import Lifted

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = support.require("torch")
adapters = support.require("adapters")
transformers = support.require("flax_transformers")

from tests.test_interop import make_hub_values as theirs  # noqa: E402

EVERY = (*theirs.CASES, "fusion")
T5 = ("pfeiffer", "houlsby", "parallel", "learned", "channel", "fusion")
PAIRS = [
  *(("bert", case) for case in EVERY),
  *(("gpt2", case) for case in EVERY),
  *(("llama", case) for case in EVERY),
  *(("t5", case) for case in T5),
  *(("roberta", case) for case in ("houlsby", "unipelt")),
]


@pytest.fixture(autouse=True)
def lifted(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
  for kind in theirs.MODELS:
    for at in ("transformers", "adapters"):
      module = importlib.import_module(f"{at}.models.{kind}.modeling_{kind}")
      monkeypatch.setattr(module, "torch", Lifted(torch))


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_there_and_back(family, case, tmp_path):
  base_folder, folder, written = tmp_path / "base", tmp_path / "theirs", tmp_path / "ours"
  theirs.make_base(family, base_folder)
  model = theirs.read_base(family, base_folder)
  theirs.add(model, family, case)
  theirs.save(model, case, folder)
  want = theirs.logits(model)
  with jax.enable_x64(True):
    module, base = hub.read_base(family, base_folder)
    params = pelt.interop.adapterhub.load(folder, module, base)
    close(hub.logits(module, params), want, 1e-9)
    assert np.abs(hub.logits(module, base) - want).max() > 1e-3 * np.abs(want).max()
    labels = None if family == "t5" else hub.LABELS
    pelt.interop.adapterhub.export(written, params, module, name=case, labels=labels)
  again = theirs.read_base(family, base_folder)
  theirs.load(again, case, written)
  close(theirs.logits(again), want, 1e-9)
  if labels:
    assert again.get_labels(case) == list(labels)
    assert pelt.interop.adapterhub.labels(written / case if case == "fusion" else written) == list(
      labels
    )


@pytest.mark.parametrize(
  ("family", "case"), [("bert", "unipelt"), ("gpt2", "mam"), ("t5", "houlsby")]
)
def test_made_here(family, case, tmp_path):
  """A method's params, trained a bit, compute the same there; so does a scanned model's file."""
  theirs.make_base(family, tmp_path / "base")
  fused = {"fused": ((0, 2), 3)} if family == "gpt2" else {}
  method = {
    "unipelt": lambda: pelt.unipelt(3, rank=2, hidden=5, gate_pool="mean_all", **fused),
    "mam": lambda: pelt.chain(
      pelt.prefix_tuning(3, reparametrize=False, shift_positions=False),
      pelt.adapter("scaled_parallel", bottleneck=3, tap="residual"),
    ),
    "houlsby": lambda: pelt.adapter("houlsby", bottleneck=3, train_norms=False),
  }[case]()
  head = () if family == "t5" else (pelt.train("head"),)
  with jax.enable_x64(True):
    module, base = hub.read_base(family, tmp_path / "base", scan=True)
    kwargs = {"decoder_input_ids": hub.IDS} if family == "t5" else {}
    sites = pelt.sites(module, hub.IDS, **kwargs)
    params = pelt.chain(method, *head).init(jax.random.key(1), base, sites)
    trainable, frozen = pelt.partition(params)
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
      x + 0.2 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)
    ]
    params = pelt.combine(jax.tree.unflatten(tree, moved), frozen)
    want = hub.logits(module, params)
    pelt.interop.adapterhub.export(tmp_path / "ours", params, module, name=case)
  model = theirs.read_base(family, tmp_path / "base")
  theirs.load(model, case, tmp_path / "ours")
  close(theirs.logits(model), want, 1e-9)


@pytest.mark.parametrize(
  ("family", "cls", "task"),
  [
    ("bert", "BertForSequenceClassification", "classification"),
    ("roberta", "RobertaForSequenceClassification", "classification"),
    ("gpt2", "GPT2ForSequenceClassification", "classification"),
    ("bert", "BertForTokenClassification", "tagging"),
    ("gpt2", "GPT2LMHeadModel", "lm"),
    ("llama", "LlamaForCausalLM", "lm"),
    ("bert", "BertForMaskedLM", "mlm"),
    ("bert", "BertModel", "encoder"),
  ],
)
def test_models_of_transformers_with_their_own_heads(family, cls, task, tmp_path):
  raw = dict(hub.CONFIGS[family])
  config = transformers.AutoConfig.for_model(
    raw.pop("model_type"), **raw, num_labels=3, attn_implementation="eager"
  )
  torch.manual_seed(0)
  model = getattr(transformers, cls)(config).double()
  model.save_pretrained(tmp_path / "base")
  adapters.init(model)
  model.add_adapter("x", config=theirs.CASES["pfeiffer"]())
  model.set_active_adapters("x")
  model.double().eval()
  heads = ("classifier", "score") if task in ("classification", "tagging") else ()
  theirs.draw(
    (n, p) for n, p in model.named_parameters() if ".adapters." in n or n.startswith(heads)
  )
  model.save_adapter(str(tmp_path / "theirs"), "x")
  ids, mask = torch.tensor(hub.IDS[:2]), torch.tensor(hub.MASK[:2])
  with torch.no_grad():
    want = model(input_ids=ids, attention_mask=mask)[0].numpy()
  with jax.enable_x64(True):
    labels = {"num_labels": 3} if heads else {}
    module, base = pelt.models.from_pretrained(
      tmp_path / "base", task=task, dtype="float64", **labels
    )
    params = pelt.interop.adapterhub.load(tmp_path / "theirs", module, base)
    close(hub.logits(module, params, ids=hub.IDS[:2], mask=hub.MASK[:2]), want, 1e-9)


def test_stored_folders_are_what_adapterhub_writes_and_reads_now():
  for family, case in hub.STORED:
    folder = hub.DATA / family
    model = theirs.read_base(family, folder / "base")
    theirs.add(model, family, case)
    np.testing.assert_allclose(theirs.logits(model), np.load(folder / case / "logits.npy"), 1e-12)
