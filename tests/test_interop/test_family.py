"""IA3, VeRA, LoHa, LoKr, MiSS and HiRA through PEFT's files, looped and scanned, without torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import pelt_jax as pelt
from pelt_jax import models

RAW = {
  "model_type": "bert",
  "hidden_size": 12,
  "intermediate_size": 20,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "vocab_size": 11,
  "max_position_embeddings": 8,
  "type_vocab_size": 2,
}
METHODS = {
  "IA3": pelt.ia3(),
  "VERA": pelt.vera(5, dropout=0.25, targets=("query", "ffn_out")),
  "LOHA": pelt.loha(2, 7, targets=("query", "ffn_in")),
  "LOKR": pelt.lokr(2, 6, targets=("value", "ffn_out"), factor=4),
  "MISS": pelt.miss(5, dropout=0.5),
  "MISS mini": pelt.miss(5, kind="mini", mini_rank=3),
  "MISS bat": pelt.miss(4, kind="bat"),
  "HIRA": pelt.hira(3, dropout=0.25, targets=("query", "embedding")),
}


@pytest.fixture(scope="module")
def made():
  """The looped and the scanned model with params of equal numbers, and the looped one's sites."""
  model, scanned = (models.from_config(RAW, task="encoder", scan=scan) for scan in (False, True))
  ids = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids))["params"]
  rng = np.random.default_rng(0)
  base = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  return model, base, scanned, models.to_scanned(base), pelt.sites(model, ids)


def moved(method, base, sites):
  trainable, frozen = pelt.partition(method.init(jax.random.key(1), base, sites))
  rng = np.random.default_rng(1)
  move = lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return pelt.combine(jax.tree.map(move, trainable), frozen)


@pytest.mark.parametrize("name", METHODS)
def test_round_trips(name, made, tmp_path):
  """Out and in again gives the same nodes, layer by layer or stacked, and the same files."""
  model, base, scanned, stacked, sites = made
  params = moved(METHODS[name], base, sites)
  one, two = tmp_path / "one", tmp_path / "two"
  pelt.interop.peft.export(one, params, model)
  again = pelt.interop.peft.load(one, model, base)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  both = pelt.interop.peft.load(one, scanned, stacked)
  want = models.to_scanned(again)
  assert both.keys() == want.keys()
  for got, value in zip(
    *(jax.tree.leaves(pelt.partition(p)[0]) for p in (both, want)), strict=True
  ):
    np.testing.assert_array_equal(got, value)
  pelt.interop.peft.export(two, both, scanned)
  files = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
  assert files[0].keys() == files[1].keys()
  for key, value in files[0].items():
    np.testing.assert_array_equal(value, files[1][key], err_msg=key)
  configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, two)]
  assert configs[0] == configs[1] and configs[0]["peft_type"] == name.split()[0]


def test_what_a_folder_cannot_hold_is_named(made, tmp_path):
  model, base, _, _, sites = made
  init = lambda *methods: pelt.chain(*methods).init(jax.random.key(0), base, sites)
  query, value = (dict(targets=role) for role in ("query", "value"))
  for params, match in (
    (init(pelt.vera(2, **query), pelt.vera(3, **value)), "ranks \\[2, 3\\]"),
    (init(pelt.vera(2, **query), pelt.vera(2, **value)), "several pairs"),
    (init(pelt.miss(2, **query), pelt.miss(2, kind="bat", **value)), "PEFT has one kind"),
    (init(pelt.miss(2, dropout=0.5, **query), pelt.miss(2, **value)), "dropouts \\[0.0, 0.5\\]"),
    (init(pelt.hira(2, **query), pelt.hira(2, **query)), "a HiraWeight under a HiraWeight"),
    (init(pelt.hira(2, **query), pelt.loha(2, **value)), "holds one method"),
    (init(pelt.hira(2, **query), pelt.bitfit("query")), "trained leaves beside"),
  ):
    with pytest.raises(ValueError, match=match):
      pelt.interop.peft.export(tmp_path / "none", params, model)
  assert not (tmp_path / "none").exists()


def test_differing_ranks_and_alphas_become_patterns(made, tmp_path):
  model, base, scanned, stacked, sites = made
  method = pelt.chain(pelt.loha(2, 3, targets="query"), pelt.loha(3, 5, targets=("0/*/*/value",)))
  params = method.init(jax.random.key(0), base, sites)
  pelt.interop.peft.export(tmp_path, params, model)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  (name,) = config["rank_pattern"]
  assert (config["r"], config["alpha"], config["rank_pattern"][name]) == (2, 3, 3)
  assert config["alpha_pattern"] == {name: 5}
  again = pelt.interop.peft.load(tmp_path, model, base)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  with pytest.raises(ValueError, match="changes layers \\[0\\] of 3"):
    pelt.interop.peft.load(tmp_path, scanned, stacked)
