"""Prefixes on BERT against torch PEFT, whose encoders need transformers 4.57."""

import jax
import numpy as np
import pytest

import pelt_jax as pelt
from tests import support
from tests.test_models import helpers

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
support.require("flax_transformers")
torch = support.require("torch")
peft = support.require("peft")

from tests.test_methods import test_prompt_parity as parity  # noqa: E402
from tests.test_methods.test_prompt_parity import offline as offline  # noqa: E402


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
