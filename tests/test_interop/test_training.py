"""Training here follows training in torch PEFT, step by step."""

import importlib.util

import jax
import numpy as np
import pytest

from tests import support

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_losses_of_minilm_on_trec_are_those_of_peft(
  method, shared_data, minilm, tmp_path, monkeypatch
):
  """Ten AdamW steps in float64; 50 of them are in experiments/results/parity_minilm_trec.json."""
  support.require("torch")
  support.require("transformers")
  support.require("peft")
  file = support.REPOSITORY / "experiments" / "parity_minilm_trec.py"
  monkeypatch.syspath_prepend(str(file.parent))
  spec = importlib.util.spec_from_file_location("parity_minilm_trec", file)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  trec = shared_data / "trec" / "TREC.train.all"
  with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
    here, there = script.compare(method, trec, 10, "float64", size=8, length=16)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-6)
    # It did train: without the nine steps before, the last batch has another loss.
    last = script.batches(minilm, trec, 10, 8, 16)[-1:]
    with jax.enable_x64(True):
      model, params, _ = script.start(method, minilm, tmp_path, "float64")
      untrained = script.train_here(model, params, script.placed(params, last))
  assert abs(untrained[0] - here[-1]) > 1e-3
