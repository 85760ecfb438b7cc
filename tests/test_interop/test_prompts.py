"""Folders of prompts and prefixes: what they hold, what load makes of them; no torch."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import pelt_jax as pelt
from pelt_jax._walk import get_at, update_at, walk
from pelt_jax.nodes import Prefix
from tests.test_interop.test_export import (
  adapted,
  assert_same_trees,
  build,
  edit,
  run,
  written,
)

peft = pelt.interop.peft
FLAT = pelt.prefix_tuning(4, reparametrize=False)
HEAD = pelt.train("head")


def assert_round_trip(params, model, base, folder):
  peft.export(folder, params, model)
  again = peft.load(folder, model, base)
  assert_same_trees(params, again)
  assert jax.tree.structure(params) == jax.tree.structure(again)
  return again


@pytest.mark.parametrize("scan", [False, True])
def test_a_prompt_comes_back_and_trains(scan, tmp_path):
  model, base = build("gpt2", scan=scan)
  params = adapted(model, base, pelt.prompt_tuning(4))
  again = assert_round_trip(params, model, base, tmp_path)
  config, tensors = written(tmp_path)
  prompt = params["transformer"]["wte"]["embedding"].prompt
  np.testing.assert_array_equal(tensors["prompt_embeddings"], prompt)
  assert len(tensors) == 1
  expected = dict(
    peft_type="PROMPT_TUNING",
    task_type="CAUSAL_LM",
    num_virtual_tokens=4,
    token_dim=32,
    num_transformer_submodules=1,
    num_layers=3,
    num_attention_heads=4,
    modules_to_save=None,
  )
  assert expected.items() <= config.items()
  assert len(jax.tree.leaves(pelt.partition(again)[0])) == 1


@pytest.mark.parametrize("scan", [False, True])
def test_a_prefix_comes_back_and_trains(scan, tmp_path):
  model, base = build(scan=scan)
  params = adapted(model, base, FLAT)
  again = assert_round_trip(params, model, base, tmp_path)
  assert len(jax.tree.leaves(pelt.partition(again)[0])) == (2 if scan else 6)
  config, tensors = written(tmp_path)
  # Two key-value heads of width 8 under four heads of queries.
  assert (config["num_attention_heads"], config["token_dim"], config["num_layers"]) == (2, 16, 3)
  assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 4)
  table = tensors["prompt_embeddings"].reshape(4, 3, 2, 2, 8)  # k0, v0, k1, v1, ...
  for i in range(3):
    at = "model/layers/self_attn/core" if scan else f"model/layers/{i}/self_attn/core"
    node = get_at(params, f"{at}/bypass")
    for j, value in enumerate((node.keys, node.values)):
      np.testing.assert_array_equal(table[:, i, j], value[i] if scan else value)


def test_an_mlp_is_written_as_what_it_makes(tmp_path):
  model, base = build(scan=True)
  params = adapted(model, base, pelt.prefix_tuning(4, hidden=8))
  peft.export(tmp_path, params, model)
  again = peft.load(tmp_path, model, base)
  assert "generators" not in again
  np.testing.assert_array_equal(run(model, again), run(model, params))


def test_a_head_beside_a_prefix_is_written_trained_or_not(tmp_path):
  model, base = build("bert", "classification")
  params = adapted(model, base, pelt.chain(FLAT, HEAD))
  assert_round_trip(params, model, base, tmp_path)
  config, tensors = written(tmp_path)
  assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
  head = params["classifier"]["kernel"].value
  np.testing.assert_array_equal(tensors["base_model.classifier.weight"], head.T)
  peft.export(tmp_path, adapted(model, base, FLAT), model)
  assert set(written(tmp_path)[1]) == set(tensors)
  edit(tmp_path, modules_to_save=["classifier", "score"])  # as PEFT writes it
  peft.load(tmp_path, model, base)


def test_dropout_of_a_prefix_is_left_out(tmp_path):
  model, base = build(scan=True)
  params = adapted(model, base, pelt.p_tuning_v2(4, dropout=0.5))
  peft.export(tmp_path, params, model)
  again = peft.load(tmp_path, model, base)
  np.testing.assert_array_equal(run(model, again), run(model, params))


def test_an_encoder_decoder_takes_the_first_half_of_twice_the_rows(tmp_path):
  model, base = build("bart-scaled", "seq2seq")
  params = adapted(model, base, pelt.prompt_tuning(4))
  prompt = params["model"]["shared"]["embedding"].prompt
  peft.export(tmp_path, params, model)
  table = written(tmp_path)[1]["prompt_embeddings"]
  np.testing.assert_allclose(table, prompt * 32**0.5, rtol=1e-6)  # PEFT's come after the scaling
  save_file(
    {"prompt_embeddings": np.concatenate([table, 0 * table])},
    tmp_path / "adapter_model.safetensors",
  )
  edit(tmp_path, num_transformer_submodules=2)
  again = peft.load(tmp_path, model, base)["model"]["shared"]["embedding"].prompt
  np.testing.assert_allclose(again, prompt, rtol=1e-6)


def test_folders_of_p_tuning_hold_a_prompt(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.prompt_tuning(4))
  peft.export(tmp_path, params, model)
  edit(tmp_path, peft_type="P_TUNING", encoder_reparameterization_type="LSTM", encoder_dropout=0.1)
  edit(tmp_path, encoder_num_layers=2, encoder_hidden_size=8)
  config, _ = written(tmp_path)
  del config["prompt_tuning_init"]
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  assert_same_trees(params, peft.load(tmp_path, model, base))


class Plain(nn.Module):
  @nn.compact
  def __call__(self, ids):
    return nn.Embed(11, 4, name="emb")(ids)


def test_what_a_folder_cannot_hold_is_refused_before_anything_is_written(tmp_path):
  folder = tmp_path / "new"
  model, base = build()
  lora, prompt = pelt.lora(rank=2), pelt.prompt_tuning(4)

  def refused(message, method, model=model, base=base):
    params = method if isinstance(method, dict) else adapted(model, base, method)
    with pytest.raises(ValueError, match=message):
      peft.export(folder, params, model)

  refused(
    r"one method.*LoRA \(.*\) and a prompt \(model/embed_tokens/embedding\)",
    pelt.chain(prompt, lora),
  )
  refused(r"one method.*LoRA.*a prefix", pelt.chain(FLAT, lora))
  refused(r"one method.*a prefix.*a prompt", pelt.chain(FLAT, prompt))
  refused(r"shifted by nothing", pelt.prefix_tuning(4, shift_positions=False))
  refused(r"none in layers \[1\]", pelt.prefix_tuning(4, reparametrize=False, layers=[0, 2]))
  refused(r"a Chain wraps a module's call", pelt.chain(FLAT, FLAT))
  both = [adapted(model, base, FLAT, seed=s) for s in (1, 2)]
  refused("core/bypass: a bank; export its members one by one", pelt.bank(both))
  both = [adapted(model, base, prompt, seed=s) for s in (1, 2)]
  refused("embedding: a bank; export its members one by one", pelt.bank(both))
  gated = adapted(model, base, FLAT)
  path, node = next((p, n) for p, n in walk(gated) if isinstance(n, Prefix))
  refused("a gated prefix", update_at(gated, {path: node.replace(gate=jnp.float32(0.5))}))
  gpt2 = build("gpt2")
  places = pelt.prompt_tuning(2, targets="wpe")
  refused("wpe/embedding: a prompt on a table that is not of tokens", places, *gpt2)
  refused("several tables hold prompts", pelt.chain(prompt, places), *gpt2)
  refused("a Tuned under the prompt", pelt.chain(pelt.train("embedding"), prompt))
  enc_dec = build("bart", "seq2seq")
  refused("self and cross attention.*one and the same prefix", FLAT, *enc_dec)
  refused("torch holds this table under several names", pelt.lora(targets="embedding"), *enc_dec)
  tied = build("qwen2")
  refused(
    "table that torch holds under several names", pelt.chain(FLAT, pelt.train("embedding")), *tied
  )
  other = Plain()
  table = other.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
  sites = pelt.sites(other, jnp.ones((1, 2), jnp.int32))
  unknown = pelt.prompt_tuning(2).init(jax.random.key(0), dict(table), sites)
  refused("by the model's task, which it lacks", unknown, other)
  assert not folder.exists()


@pytest.fixture(params=["prompt", "prefix"])
def saved(request, tmp_path):
  model, base = build(scan=True)
  method = FLAT if request.param == "prefix" else pelt.prompt_tuning(4)
  peft.export(tmp_path, adapted(model, base, method), model)
  return tmp_path, model, base


def test_broken_folders(saved):
  folder, model, base = saved
  config, tensors = written(folder)
  file = folder / "adapter_model.safetensors"

  def refused(message, **fields):
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
      peft.load(folder, model, base)

  refused(r"shape \(4, .*expected \(5, ", num_virtual_tokens=5)
  refused(
    "num_virtual_tokens must be a whole number of at least 1, got None", num_virtual_tokens=None
  )
  refused("unknown fields(.|\n)*brand_new", brand_new=3)
  with pytest.warns(UserWarning, match="brand_new"):
    peft.load(folder, model, base, strict=False)
  save_file(tensors | {"base_model.odd": np.zeros(1)}, file)
  refused(r"unexpected(.|\n)*base_model\.odd")
  refused(
    r"lacks(.|\n)*model\.norm\.weight(.|\n)*no module 'nowhere'",
    modules_to_save=["norm", "nowhere"],
  )
  save_file({"base_model.odd": np.zeros(1)}, file)
  refused("lacks the tensor 'prompt_embeddings'")


def test_a_prefix_of_an_encoder_decoder_cannot_be_read(tmp_path):
  model, base = build(scan=True)
  peft.export(tmp_path, adapted(model, base, FLAT), model)
  with pytest.raises(ValueError, match="one and the same prefix"):
    peft.load(tmp_path, *build("bart", "seq2seq"))
  edit(tmp_path, num_transformer_submodules=2)
  with pytest.raises(ValueError, match="one and the same prefix"):
    peft.load(tmp_path, model, base)


def test_sliding_windows_are_told(tmp_path):
  model, base = build("mistral", scan=True)
  params = adapted(model, base, FLAT)
  with pytest.warns(UserWarning, match="sliding window of 5 tokens"):
    peft.export(tmp_path, params, model)
  with pytest.warns(UserWarning, match="sliding window of 5 tokens"):
    peft.load(tmp_path, model, base)


class Scaled(nn.Module):
  """Not to be called with ids alone."""

  @nn.compact
  def __call__(self, ids, scale):
    return nn.Embed(11, 32, name="emb")(ids) * scale


def test_sites_serve_models_of_ones_own(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.prompt_tuning(4))
  peft.export(tmp_path, params, model)
  own, ids = Scaled(), jnp.array([[1, 12, 14]])
  table = own.init(jax.random.key(0), ids, 2.0)["params"]
  sites = pelt.sites(own, ids, 2.0, roles={"embedding": (pelt.Role("emb"),)})
  out = pelt.bypass(own.apply)({"params": peft.load(tmp_path, own, table, sites=sites)}, ids, 2.0)
  prompt = params["model"]["embed_tokens"]["embedding"].prompt
  np.testing.assert_array_equal(out[0, 1:], 2 * prompt[np.array([1, 3])])


def test_swapped_arguments_are_named(tmp_path):
  model, base = build()
  with pytest.raises(TypeError, match=r"export\(folder, params, model\).*are they swapped\?"):
    peft.export(tmp_path, model, base)
  with pytest.raises(TypeError, match=r"load\(folder, model, base\).*are they swapped\?"):
    peft.load(tmp_path, base, model)


def test_patterns_that_fit_nothing_raise_unless_lenient(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.lora(rank=2))
  peft.export(tmp_path, params, model)
  edit(tmp_path, rank_pattern={"o_proj": 4}, alpha_pattern={"v_proj": 2})
  with pytest.raises(ValueError, match=r"no adapted module fits(.|\n)*rank_pattern: 'o_proj'"):
    peft.load(tmp_path, model, base)
  with pytest.warns(UserWarning, match="rank_pattern: 'o_proj'"):
    again = peft.load(tmp_path, model, base, strict=False)
  kernel = lambda p: p["model"]["layers"]["0"]["self_attn"]["v_proj"]["kernel"]
  assert float(kernel(again).scaling) == 2 / 2
  np.testing.assert_array_equal(kernel(again).a, kernel(params).a)
