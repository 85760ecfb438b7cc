"""DoRA, PiSSA, OLoRA and LoRA-FA in PEFT's folders; no torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pelt_jax as pelt
from pelt_jax import nodes
from tests.test_interop.test_export import (
  adapted,
  assert_same_trees,
  build,
  edit,
  peft,
  run,
  written,
)

DORA = pelt.dora(rank=2, alpha=6, targets=("query", "ffn_out"), dropout=0.25)
AT = "base_model.model.model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize("scan", [False, True])
def test_magnitudes_come_back_to_the_bit(scan, tmp_path):
  model, base = build(scan=scan)
  params = adapted(model, base, DORA)
  peft.export(tmp_path, params, model)
  config, tensors = written(tmp_path)
  assert config["use_dora"] is True and config["lora_dropout"] == 0.25
  assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (2, 6, True)
  layer = params["model"]["layers"] if scan else params["model"]["layers"]["1"]
  node = layer["self_attn"]["q_proj"]["kernel"]
  want = node.magnitude[1] if scan else node.magnitude
  np.testing.assert_array_equal(tensors[AT + "lora_magnitude_vector"], want)
  loaded = peft.load(tmp_path, model, base)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert_same_trees(loaded, params)


def test_files_must_have_the_magnitudes_that_they_say(tmp_path):
  model, base = build()
  peft.export(tmp_path, adapted(model, base, DORA), model)
  edit(tmp_path, use_dora=False)
  with pytest.raises(ValueError, match="(?s)unexpected tensors.*lora_magnitude_vector"):
    peft.load(tmp_path, model, base)
  edit(tmp_path, use_dora=True)
  file = tmp_path / "adapter_model.safetensors"
  tensors = load_file(file)
  tensors[AT + "lora_magnitude_vector"] = tensors[AT + "lora_magnitude_vector"][:-1].copy()
  save_file(tensors, file)
  with pytest.raises(ValueError, match="lora_magnitude_vector has shape"):
    peft.load(tmp_path, model, base)
  del tensors[AT + "lora_magnitude_vector"]
  save_file(tensors, file)
  with pytest.raises(ValueError, match=r"(?s)lacks tensors.*1\.self_attn\.q_proj\.lora_magnitude"):
    peft.load(tmp_path, model, base)


def test_layers_of_a_scan_all_have_magnitudes_or_none(tmp_path):
  model, base = build()
  method = pelt.dora(rank=2, targets="query", layers=[0, 2])
  peft.export(tmp_path, adapted(model, base, method), model)
  scanned, stacked = build(scan=True)
  with pytest.raises(ValueError, match=r"magnitudes of the layers \[0, 2\] alone"):
    peft.load(tmp_path, scanned, stacked)


def test_what_peft_cannot_hold(tmp_path):
  model, base = build()
  mixed = pelt.chain(pelt.dora(2, targets="query"), pelt.lora(2, targets="value"))
  over = pelt.chain(pelt.dora(2, targets="query"), pelt.lora(2, targets="query"))
  for method, message in ((mixed, "a LoRA beside DoRA"), (over, "a DoraWeight is no LoRA pair")):
    with pytest.raises(ValueError, match=message):
      peft.export(tmp_path / "no", adapted(model, base, method), model)
  tied, below = build("llama-tied-biased")
  with pytest.raises(ValueError, match="a tied head has magnitudes of its own"):
    peft.export(tmp_path / "no", adapted(tied, below, pelt.dora(2, targets="embedding")), tied)
  assert not (tmp_path / "no").exists()
  for method, message in ((pelt.dora(2), "a DoraWeight"), (pelt.pissa(2), "lacks its start")):
    with pytest.raises(ValueError, match=message):
      pelt.interop.adapterhub.export(tmp_path / "no", adapted(model, base, method), model)


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_start_becomes_half_of_a_lora_over_the_whole_base(name, scan, tmp_path):
  model, base = build(scan=scan)
  method = getattr(pelt, name)(rank=2, alpha=6, targets=("query", "ffn_out"), dropout=0.5)
  params = adapted(model, base, method)
  peft.export(tmp_path, params, model)
  config, tensors = written(tmp_path)
  fields = ("r", "lora_alpha", "init_lora_weights", "use_dora", "lora_dropout")
  assert [config[f] for f in fields] == [4, 12, True, False, 0.5]
  assert tensors[AT + "lora_A.weight"].shape[0] == 4
  loaded = peft.load(tmp_path, model, base)
  np.testing.assert_allclose(run(model, loaded), run(model, params), rtol=0, atol=1e-5)
  assert np.abs(run(model, params) - run(model, base)).max() > 1e-2


def test_a_magnitude_over_a_start_goes_too(tmp_path):
  """PEFT takes DoRA and PiSSA together; ours is a node over the other's."""
  model, base = build()
  started = adapted(model, base, pelt.pissa(rank=2, alpha=6, targets="query"))
  path = ("model", "layers", "1", "self_attn", "q_proj", "kernel")
  node = started
  for key in path:
    node = node[key]
  dora = nodes.DoraWeight(node)
  changes = {"/".join(path): dora.replace(magnitude=1.5 * dora.norm())}
  for layer in ("0", "2"):
    changes[f"model/layers/{layer}/self_attn/q_proj/kernel"] = base["model"]["layers"][layer][
      "self_attn"
    ]["q_proj"]["kernel"]
  params = pelt._walk.update_at(started, changes)
  peft.export(tmp_path, params, model)
  loaded = peft.load(tmp_path, model, base)
  np.testing.assert_allclose(run(model, loaded), run(model, params), rtol=0, atol=1e-5)


def test_a_frozen_a_is_a_loras(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.lora_fa(rank=2, alpha=6))
  peft.export(tmp_path, params, model)
  loaded = peft.load(tmp_path, model, base)
  np.testing.assert_array_equal(run(model, loaded), run(model, params))
  assert jnp.abs(run(model, loaded) - run(model, base)).max() > 1e-3
