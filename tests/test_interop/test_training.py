"""Training here follows training in torch PEFT, step by step."""

import importlib.util

import numpy as np
import pytest

from tests import support

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def test_losses_of_minilm_on_trec_are_those_of_peft(shared_data, minilm):
  """Ten AdamW steps in float64; 50 of them are in experiments/results/parity_minilm_trec.json."""
  support.require("torch")
  support.require("transformers")
  support.require("peft")
  file = support.REPOSITORY / "experiments" / "parity_minilm_trec.py"
  spec = importlib.util.spec_from_file_location("parity_minilm_trec", file)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  trec = shared_data / "trec" / "TREC.train.all"
  here, there = script.compare(trec, 10, "float64", size=8, length=16)
  np.testing.assert_allclose(here, there, rtol=0, atol=1e-6)
  assert here[-1] < here[0] - 0.05  # it did train
