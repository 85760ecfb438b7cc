"""Folders that AdapterHub wrote compute here what it computed: stored values, no torch needed."""

import functools

import jax
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax.interop import adapterhub
from tests.test_interop import hub
from tests.test_models.helpers import close

# Two layers of sums of at most 24 products of numbers near 1, in float64.
TOLERANCE = 1e-12


@functools.cache
def base_of(family, scan=False):
  """Model, base and sites."""
  model, base = hub.read_base(family, hub.DATA / family / "base", scan=scan)
  kwargs = {"decoder_input_ids": hub.IDS} if family == "t5" else {}
  return model, base, pelt.sites(model, hub.IDS, **kwargs)


def some(*names):
  """All stored cases, those of BERT that are named in the fast suite."""
  fast = [("bert", name) for name in names]
  slow = (pytest.param(*pair, marks=pytest.mark.parity) for pair in hub.STORED if pair not in fast)
  return [*fast, *slow]


def same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for (path, a), b in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  ("family", "case"), some("pfeiffer", "houlsby", "mam", "unipelt", "fusion")
)
def test_logits_are_adapterhubs_and_what_is_written_again_is_the_same(family, case, tmp_path):
  folder = hub.DATA / family / case
  with jax.enable_x64(True):
    model, base, sites = base_of(family)
    params = adapterhub.load(folder, model, base, sites=sites)
    close(hub.logits(model, params), np.load(folder / "logits.npy"), TOLERANCE)
    adapterhub.export(tmp_path, params, model, name=case)
    same(params, adapterhub.load(tmp_path, model, base, sites=sites))


@pytest.mark.parametrize(("family", "case"), some("houlsby"))
def test_gradients_are_adapterhubs(family, case):
  folder = hub.DATA / family / case
  with jax.enable_x64(True):
    model, base, sites = base_of(family)
    params = adapterhub.load(folder, model, base, sites=sites)
    trainable, frozen = pelt.partition(params)

    def loss(params):
      out = hub.logits(model, params)
      return (out * hub.cotangent(out.shape)).sum()

    _, grads = jax.jit(pelt.value_and_grad(loss))(trainable, frozen)
    want = adapterhub.load(folder / "gradients", model, base, sites=sites)
    want = pelt.partition(want)[0]
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    for (path, one), other in zip(
      jax.tree.leaves_with_path(grads), jax.tree.leaves(want), strict=True
    ):
      if path[-1].name == "key_bias":  # it moves all scores alike, which the softmax takes away
        assert np.abs(one).max() < 1e-14 > np.abs(other).max()
      else:
        close(one, other, 1e-9)  # smaller ones are differences of larger terms


@pytest.mark.parametrize(("family", "case"), some("pfeiffer"))
def test_a_scanned_model_computes_the_same_and_writes_the_same_bytes(family, case, tmp_path):
  folder = hub.DATA / family / case
  with jax.enable_x64(True):
    for scan in (False, True):
      model, base, sites = base_of(family, scan)
      params = adapterhub.load(folder, model, base, sites=sites)
      adapterhub.export(tmp_path / str(scan), params, model, name=case)
    close(hub.logits(model, params), np.load(folder / "logits.npy"), TOLERANCE)
  files = [p.relative_to(tmp_path / "True") for p in (tmp_path / "True").rglob("*") if p.is_file()]
  assert files
  for file in files:
    assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes()


def test_what_was_loaded_trains():
  with jax.enable_x64(True):
    model, base, sites = base_of("bert")
    params = adapterhub.load(hub.DATA / "bert" / "unipelt", model, base, sites=sites)
    trainable, _ = pelt.partition(params)
    d, m, r, labels = 16, 2, 2, len(hub.LABELS)
    gates = 4 * (d + 1)
    layer = 2 * d * m + m + d + 2 * 2 * d * r + gates
    mlp = hub.LENGTH * d + (d + 1) * 5 + (5 + 1) * 2 * 2 * d
    head = d * d + d + (d + 1) * labels
    assert sum(x.size for x in jax.tree.leaves(trainable)) == 2 * layer + mlp + head


def test_labels():
  folder = hub.DATA / "bert" / "pfeiffer"
  assert adapterhub.labels(folder) == list(hub.LABELS)
  with pytest.raises(FileNotFoundError, match=r"head_config\.json is missing"):
    adapterhub.labels(hub.DATA / "t5" / "pfeiffer")


def test_without_its_head():
  with jax.enable_x64(True):
    model, base, sites = base_of("bert")
    folder = hub.DATA / "bert" / "pfeiffer"
    params = adapterhub.load(folder, model, base, head=False, sites=sites)
  assert params["classifier"] == base["classifier"]
