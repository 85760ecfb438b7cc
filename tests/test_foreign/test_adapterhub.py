"""Against AdapterHub's `adapters`: outputs and gradients from the same arrays, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from tests.support import require
from tests.test_models.helpers import close, tokens

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = require("torch")
adapters = require("adapters")
require("flax_transformers")

from tests.test_foreign.adapterhub import CASES, FAMILY, lifted, read, theirs  # noqa: E402

assert lifted  # a fixture

# Their prefixes of T5 move its relative positions, a defect that is not followed.
PAIRS = [(f, m) for f in FAMILY for m in CASES if (f, m) not in {("t5", "mam"), ("t5", "unipelt")}]


def read_gradients(model, save, folder, module, base, sites):
  """Their gradients as a tree of ours, by way of a file of them."""
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.copy_(p.grad)
  return pelt.partition(read(save, folder, module, base, sites))[0]


def run_theirs(model, family, ids):
  """Logits of T5, hidden states of the others; T5's decoder reads the ids backwards."""
  given = {"input_ids": torch.tensor(ids).long()}
  if family != "t5":
    return model(**given).last_hidden_state
  return model(**given, decoder_input_ids=given["input_ids"].flip(1)).logits


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_outputs_and_gradients(family, method, tmp_path, lifted):
  make, config = CASES[method]

  def add(model):
    model.add_adapter("x", config=config())
    model.set_active_adapters("x")
    model.train_adapter("x")

  model = theirs(family, tmp_path / "base", add)
  ids = tokens(2, 7)
  cotangent = np.random.default_rng(0).normal(size=(2, 7, 97 if family == "t5" else 32))
  out = run_theirs(model, family, ids)
  out.backward(torch.tensor(cotangent))
  save = functools.partial(model.save_adapter, adapter_name="x")

  with jax.enable_x64(True):
    task = "seq2seq" if family == "t5" else "encoder"
    module, base = models.from_pretrained(tmp_path / "base", task=task, dtype="float64")
    kwargs = {"decoder_input_ids": jnp.asarray(ids)[:, ::-1]} if family == "t5" else {}
    sites = pelt.sites(module, ids, **kwargs)
    params = read(save, tmp_path / "x", module, base, sites)
    ours = make(family).init(jax.random.key(0), base, sites)
    assert jax.tree.structure(params) == jax.tree.structure(ours)
    trainable, frozen = pelt.partition(params)
    apply = pelt.bypass(module.apply)

    def loss(params):
      got = apply({"params": params}, ids, **kwargs)
      return jnp.sum(got * cotangent), got

    (_, got), grads = jax.jit(pelt.value_and_grad(loss, has_aux=True))(trainable, frozen)
    close(got, out.detach().numpy(), 1e-9)
    want = read_gradients(model, save, tmp_path / "grads", module, base, sites)
    ours, theirs_ = jax.tree.leaves(grads), jax.tree.leaves(want)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(ours) == len(theirs_) and sum(g.size for g in ours) == trained
    for a, b in zip(ours, theirs_, strict=True):
      assert np.abs(b).max() > 1e-8
      close(a, b, 1e-9)


@pytest.mark.parametrize("family", FAMILY)
def test_fusion(family, tmp_path, lifted):
  """Two adapters and the attention over them; Q, K and V train, the adapters do not."""
  names = ("one", "two")

  def add(model):
    for name in names:
      model.add_adapter(name, config=adapters.SeqBnConfig())
    model.train_adapter(adapters.Parallel(*names))  # so that they are drawn anew too
    fuse = adapters.Fuse(*names)
    model.add_adapter_fusion(fuse)
    model.set_active_adapters(fuse)

  model = theirs(family, tmp_path / "base", add)
  model.train_adapter_fusion(adapters.Fuse(*names))
  with torch.no_grad():
    for name, p in model.named_parameters():
      if "fusion" in name:  # small enough that no adapter takes all
        p.normal_(0, 0.3 if "value" in name else 0.01)
  model.eval()
  ids = tokens(2, 7)
  cotangent = np.random.default_rng(0).normal(size=(2, 7, 97 if family == "t5" else 32))
  out = run_theirs(model, family, ids)
  out.backward(torch.tensor(cotangent))
  found = dict(model.named_parameters())
  save = functools.partial(model.save_adapter_setup, adapter_setup=adapters.Fuse(*names))

  with jax.enable_x64(True):
    task = "seq2seq" if family == "t5" else "encoder"
    module, base = models.from_pretrained(tmp_path / "base", task=task, dtype="float64")
    kwargs = {"decoder_input_ids": jnp.asarray(ids)[:, ::-1]} if family == "t5" else {}
    sites = pelt.sites(module, ids, **kwargs)
    params = read(save, tmp_path / "setup", module, base, sites)
    trainable, frozen = pelt.partition(params)
    apply = pelt.bypass(module.apply)

    def loss(params):
      got = apply({"params": params}, ids, **kwargs)
      return jnp.sum(got * cotangent), got

    (_, got), grads = jax.jit(pelt.value_and_grad(loss, has_aux=True))(trainable, frozen)
    close(got, out.detach().numpy(), 1e-9)
    want = read_gradients(model, save, tmp_path / "grads", module, base, sites)
    ours, theirs_ = jax.tree.leaves(grads), jax.tree.leaves(want)
    assert sum(g.size for g in ours) == sum(p.numel() for p in found.values() if p.requires_grad)
    nothing = [np.abs(b).max() < 1e-12 for b in theirs_]
    # The key's bias adds the same to all scores of a token.
    assert sum(nothing) == sum("key.bias" in n for n, p in found.items() if p.requires_grad)
    for a, b, zero in zip(ours, theirs_, nothing, strict=True):
      close(a, b, 1e-9) if not zero else np.testing.assert_allclose(a, b, atol=1e-12)
