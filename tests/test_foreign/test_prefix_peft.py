"""Prefixes on BERT against torch PEFT, whose encoders need transformers 4.57."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests import support
from tests.test_models import helpers

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
support.require("flax_transformers")
torch = support.require("torch")
peft = support.require("peft")

from tests.test_interop import test_live_prompts as live  # noqa: E402
from tests.test_interop.test_live_prompts import lifted_decoders as lifted_decoders  # noqa: E402
from tests.test_interop.test_live_prompts import lifted_seq2seq as lifted_seq2seq  # noqa: E402
from tests.test_interop.test_live_prompts import prepared as prepared  # noqa: E402
from tests.test_methods import test_prompt_parity as parity  # noqa: E402


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_before_an_encoder(projection, tmp_path):
  config = lambda **kw: peft.PrefixTuningConfig(
    num_virtual_tokens=parity.LENGTH, prefix_projection=projection, encoder_hidden_size=8, **kw
  )
  ids = helpers.tokens(2, 7)
  with jax.enable_x64(True):
    model, base, theirs = parity.pair("bert", "classification", config, tmp_path)
    params = parity.prefixed(theirs, base, pelt.sites(model, ids), projection)
    got = pelt.bypass(model.apply)({"params": params}, ids)
    helpers.close(got, parity.logits(theirs, ids), 1e-9)
    alone = model.apply({"params": base}, ids)
  assert np.abs(got - alone).max() > 1e-3


@pytest.mark.parametrize(
  ("name", "task", "config"),
  [
    ("bert", "classification", live.FLAT),
    ("bert", "tagging", live.PROJECTED),
    ("roberta", "tagging", live.FLAT),
    ("gpt2", "classification", live.PROJECTED),
  ],
)
def test_folders_of_classifiers_go_both_ways(name, task, config, tmp_path):
  """The trained head goes with them."""
  base = live.base_folder(name, task, tmp_path / "base")
  theirs = live.made_in_peft(base, task, config, tmp_path / "theirs")
  ids = helpers.tokens(1, 7)
  want = live.logits(theirs, task, ids)
  with jax.enable_x64(True):
    model, plain = live.load_ours(base, task)
    params = pelt.interop.peft.load(tmp_path / "theirs", model, plain)
    helpers.close(live.ours(model, params, task, ids), want, 1e-9)
    moved = live.moved(params)
    got = live.ours(model, moved, task, ids)
    assert np.abs(got - want).max() > 1e-2 * np.abs(want).max()
    pelt.interop.peft.export(tmp_path / "ours", moved, model)
    head = [v for p, v in pelt.labels(params).items() if p in ("classifier", "score")]
    assert "trainable" in jax.tree.leaves(head)
    sites = pelt.sites(model, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    assert pelt.count(params, sites).head > 0
  helpers.close(live.logits(live.in_peft(base, task, tmp_path / "ours"), task, ids), got, 1e-9)
