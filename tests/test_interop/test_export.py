"""Folders that export writes, and what load makes of them; no torch."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import pelt_jax as pelt
from pelt_jax.interop._factors import factors
from pelt_jax.nodes import LoraWeight, Tuned
from tests.test_models import helpers

peft = pelt.interop.peft
IDS = jnp.array([[5, 7, 11, 13], [2, 3, 5, 8]])


@functools.cache
def build(name="llama", task="lm", scan=False, dtype=jnp.float32):
  model = helpers.build(name, task, scan=scan, dtype=dtype)
  return model, helpers.random_params(model)


@functools.cache
def sites_of(model):
  return pelt.sites(model, IDS)


def adapted(model, base, method, seed=1):
  """Params in which every trained leaf was moved, so that no factor is zero."""
  params = method.init(jax.random.key(seed), base, sites_of(model))
  trainable, frozen = pelt.partition(params)
  rng = np.random.default_rng(seed)
  move = lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype)
  return pelt.combine(jax.tree.map(move, trainable), frozen)


def run(model, params, **kwargs):
  return pelt.bypass(model.apply)({"params": params}, IDS, **kwargs)


def written(folder):
  config = json.loads((folder / "adapter_config.json").read_text())
  return config, load_file(folder / "adapter_model.safetensors")


def assert_same_trees(a, b):
  first, second = (jax.tree.leaves_with_path(x) for x in (a, b))
  for (path, x), (other, y) in zip(first, second, strict=True):
    assert path == other
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  ("name", "task"),
  [
    ("llama", "lm"),
    ("gpt2", "lm"),
    ("bert", "classification"),
    ("roberta", "tagging"),
    ("t5", "seq2seq"),
  ],
)
def test_round_trip_gives_every_array_back(name, task, scan, tmp_path):
  model, base = build(name, task, scan)
  method = pelt.lora(rank=3, alpha=7, targets=("query", "value"), dropout=0.1)
  if task in ("classification", "tagging"):
    method = pelt.chain(method, pelt.train("head"))
  params = adapted(model, base, method)
  peft.export(tmp_path, params, model)
  again = peft.load(tmp_path, model, base)
  assert_same_trees(params, again)
  assert jax.tree.structure(params) == jax.tree.structure(again)


def test_what_a_folder_holds(tmp_path):
  model, base = build("bert", "classification")
  method = pelt.chain(pelt.lora(rank=3, alpha=6), pelt.train("head"))
  params = adapted(model, base, method)
  peft.export(tmp_path, params, model, base_model_name="some/name")
  config, tensors = written(tmp_path)
  assert config["task_type"] == "SEQ_CLS"
  assert config["base_model_name_or_path"] == "some/name"
  assert config["target_modules"] == ["query", "value"]
  assert config["modules_to_save"] == ["classifier"]
  assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 6, "none")
  query = params["bert"]["encoder"]["layer"]["1"]["attention"]["self"]["query"]["kernel"]
  at = "base_model.model.bert.encoder.layer.1.attention.self.query."
  np.testing.assert_array_equal(tensors[at + "lora_A.weight"], query.a.T)
  np.testing.assert_array_equal(tensors[at + "lora_B.weight"], query.b.T)
  head = params["classifier"]["kernel"].value
  np.testing.assert_array_equal(tensors["base_model.model.classifier.weight"], head.T)
  assert len(tensors) == 3 * 2 * 2 + 2
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
  ]


def test_kernels_that_torch_keeps_in_our_order(tmp_path):
  """GPT-2's Conv1D: a module saved whole is no transpose, and the configuration says so."""
  model, base = build("gpt2")
  params = adapted(model, base, pelt.chain(pelt.lora(rank=3, targets="query"), pelt.train("c_fc")))
  peft.export(tmp_path, params, model)
  config, tensors = written(tmp_path)
  assert (config["fan_in_fan_out"], config["target_modules"]) == (True, ["c_attn"])
  block = params["transformer"]["h"]["1"]
  at = "base_model.model.transformer.h.1."
  np.testing.assert_array_equal(
    tensors[at + "attn.c_attn.lora_B.weight"], block["attn"]["c_attn"]["kernel"].b.T
  )
  np.testing.assert_array_equal(
    tensors[at + "mlp.c_fc.weight"], block["mlp"]["c_fc"]["kernel"].value
  )
  assert_same_trees(params, peft.load(tmp_path, model, base))


@pytest.mark.parametrize(
  ("name", "task", "kind"),
  [("gpt2", "encoder", "FEATURE_EXTRACTION"), ("bart", "seq2seq", "SEQ_2_SEQ_LM")],
)
def test_the_task_follows_the_model(name, task, kind, tmp_path):
  model, base = build(name, task, scan=True)
  peft.export(tmp_path, adapted(model, base, pelt.lora(rank=2, targets="ffn_in")), model)
  config, tensors = written(tmp_path)
  assert config["task_type"] == kind
  assert len(tensors) == 2 * (3 if name == "gpt2" else 2 + 3)  # every layer of every stack


def test_a_tied_head_that_peft_does_not_tie_is_one_module_more(tmp_path):
  model, base = build("gpt2")
  method = pelt.chain(pelt.lora(rank=3), pelt.lora(rank=2, alpha=6, targets="embedding"))
  params = adapted(model, base, method)
  peft.export(tmp_path, params, model)
  config, _ = written(tmp_path)
  assert config["target_modules"] == ["c_attn", "lm_head", "wte"]
  assert config["rank_pattern"] == {"^lm_head": 2, r"^transformer\.wte": 2}
  assert "ensure_weight_tying" not in config
  assert_same_trees(params, peft.load(tmp_path, model, base))
  edit(tmp_path, target_modules=["c_attn", "wte"], rank_pattern={"wte": 2}, alpha_pattern={})
  with pytest.raises(ValueError, match="wte is changed for lookups alone"):
    peft.load(tmp_path, model, base)
  edit(tmp_path, **config | {"alpha_pattern": {"lm_head": 5, "wte": 6}})  # of another scaling
  with pytest.raises(ValueError, match="wte is changed for lookups alone"):
    peft.load(tmp_path, model, base)

  params = adapted(model, base, pelt.chain(pelt.lora(rank=3), pelt.train("embedding")))
  peft.export(tmp_path, params, model)
  assert written(tmp_path)[0]["modules_to_save"] == ["lm_head", "transformer.wte"]
  assert_same_trees(params, peft.load(tmp_path, model, base))
  edit(tmp_path, modules_to_save=["transformer.wte"])
  with pytest.raises(ValueError, match="wte is changed for lookups alone"):
    peft.load(tmp_path, model, base)


def test_scanned_and_looped_models_write_the_same_folder(tmp_path):
  looped, base = build()
  params = adapted(looped, base, pelt.lora(rank=3, alpha=7))
  scanned, _ = build(scan=True)
  peft.export(tmp_path / "looped", params, looped)
  peft.export(tmp_path / "scanned", pelt.models.to_scanned(params), scanned)
  assert written(tmp_path / "looped")[0] == written(tmp_path / "scanned")[0]
  a, b = (written(tmp_path / n)[1] for n in ("looped", "scanned"))
  assert set(a) == set(b)
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def test_unequal_ranks_are_padded_under_a_scan_and_cut_again(tmp_path):
  looped, base = build()
  path = "model/layers/{}/self_attn/{}_proj"
  method = pelt.lora(
    rank=3,
    alpha=6,
    targets=(path.format(0, "q"), path.format(1, "q"), path.format(2, "v")),
    rank_pattern={path.format(1, "q"): 5},
    alpha_pattern={path.format(1, "q"): 4},
  )
  params = adapted(looped, base, method)
  peft.export(tmp_path / "a", params, looped)
  config, _ = written(tmp_path / "a")
  key = r"^model\.layers\.1\.self_attn\.q_proj"
  assert config["rank_pattern"] == {key: 5}
  assert config["alpha_pattern"] == {key: 4}
  assert len(config["target_modules"]) == 3

  scanned, _ = build(scan=True)
  stacked = peft.load(tmp_path / "a", scanned, pelt.models.to_scanned(base))
  node = stacked["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
  assert node.a.shape == (3, 32, 5)
  np.testing.assert_array_equal(node.a[0, :, 3:], 0)
  np.testing.assert_array_equal(node.b[2], 0)
  np.testing.assert_allclose(run(scanned, stacked), run(looped, params), atol=1e-4)

  def loss(params):
    return jnp.sum(run(scanned, params) ** 2)

  grads = jax.jit(pelt.value_and_grad(loss))(*pelt.partition(stacked))[1]
  node = grads["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
  np.testing.assert_array_equal(node.a[0, :, 3:], 0)  # padding never trains
  np.testing.assert_array_equal(node.b[0, 3:], 0)
  assert np.abs(node.b[0, :3]).max() > 0

  peft.export(tmp_path / "b", stacked, scanned)
  first, second = written(tmp_path / "a"), written(tmp_path / "b")
  assert first[0] == second[0]
  for name in first[1]:
    np.testing.assert_array_equal(first[1][name], second[1][name])


def test_an_untrained_adapter_keeps_its_rank_under_a_scan(tmp_path):
  model, base = build(scan=True)
  params = pelt.lora(rank=3).init(jax.random.key(0), base, sites_of(model))  # b is zero
  peft.export(tmp_path, params, model)
  assert written(tmp_path)[0]["r"] == 3
  assert_same_trees(params, peft.load(tmp_path, model, base))


def test_factors_follow_the_axes_of_the_node():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 2, 3), (2, 3, 4)))
  base = jnp.zeros((5, 2, 4))  # in, experts, out
  node = LoraWeight(base, a, b, jnp.asarray(2.0), axes="ieo:ier,ero")
  f = factors(node)
  assert f.experts
  np.testing.assert_allclose(
    2 * jnp.einsum("eir,ero->ieo", f.a, f.b), node.materialize(), rtol=1e-5
  )


def test_rslora_is_written_as_its_scaling(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.lora(rank=4, alpha=6, rslora=True))
  peft.export(tmp_path, params, model)
  config, _ = written(tmp_path)
  assert config["use_rslora"] is False
  assert config["lora_alpha"] == 12  # 6 / sqrt(4) * 4
  assert_same_trees(params, peft.load(tmp_path, model, base))


def test_alpha_is_the_shortest_number_that_gives_the_scaling(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.lora(rank=3, alpha=0.7))
  peft.export(tmp_path, params, model)
  assert written(tmp_path)[0]["lora_alpha"] == 0.7
  assert_same_trees(params, peft.load(tmp_path, model, base))


def test_dtypes_are_kept(tmp_path):
  model, base = build(dtype=jnp.bfloat16)
  params = adapted(model, base, pelt.lora(rank=2))
  peft.export(tmp_path, params, model)
  again = peft.load(tmp_path, model, base)
  assert_same_trees(params, again)
  node = again["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
  assert node.a.dtype == jnp.bfloat16
  assert node.scaling.dtype == jnp.float32


def test_two_loras_on_one_leaf_become_one(tmp_path):
  model, base = build()
  first = pelt.lora(rank=2, alpha=6, targets="query")
  second = pelt.lora(rank=3, alpha=6, targets="query")
  params = adapted(model, base, pelt.chain(first, second))
  peft.export(tmp_path, params, model)
  again = peft.load(tmp_path, model, base)
  node = again["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
  assert node.a.shape == (32, 5)
  np.testing.assert_allclose(run(model, again), run(model, params), atol=1e-4)
  assert np.abs(run(model, params) - run(model, base)).max() > 0.1


class Fused(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(12, name="c_attn")(x)


def test_parts_of_a_fused_projection_are_written_in_block_form(tmp_path):
  model, x = Fused(), jnp.arange(10.0).reshape(2, 5)
  base = model.init(jax.random.key(0), x)["params"]
  method = pelt.lora(rank=2, alpha=6, targets="c_attn", fused=((0, 2), 3))
  params = method.init(jax.random.key(1), base, pelt.sites(model, x))
  node = params["c_attn"]["kernel"]
  node = node.replace(b=jax.random.normal(jax.random.key(2), node.b.shape))
  params["c_attn"]["kernel"] = node
  peft.export(tmp_path, params, model)
  config, tensors = written(tmp_path)
  assert (config["r"], config["lora_alpha"]) == (4, 12)
  assert np.all(tensors["base_model.model.c_attn.lora_B.weight"][4:8] == 0)
  again = peft.load(tmp_path, model, base)
  y, z = (pelt.bypass(model.apply)({"params": p}, x) for p in (params, again))
  np.testing.assert_allclose(y, z, rtol=1e-5)
  assert np.abs(y - model.apply({"params": base}, x)).max() > 1


def test_an_adapted_table_with_a_tied_head_is_marked(tmp_path):
  model, base = build("llama-tied-biased")
  params = adapted(model, base, pelt.lora(rank=2, targets=("query", "embedding")))
  peft.export(tmp_path, params, model)
  config, tensors = written(tmp_path)
  assert config["ensure_weight_tying"] is True
  assert config["target_modules"] == ["embed_tokens", "q_proj"]
  at = "base_model.model."
  a = tensors[at + "model.embed_tokens.lora_embedding_A"]
  assert a.shape == (2, 97)
  np.testing.assert_array_equal(tensors[at + "lm_head.lora_B.weight"], a.T)
  assert_same_trees(params, peft.load(tmp_path, model, base))
  edit(tmp_path, ensure_weight_tying=False)
  with pytest.raises(ValueError, match="ensure_weight_tying=True"):
    peft.load(tmp_path, model, base)


def test_trained_biases(tmp_path):
  model, base = build("bert", "classification")
  q = pelt.lora(rank=2, targets="query")
  params = adapted(model, base, pelt.chain(q, pelt.train("query/bias"), pelt.train("head")))
  peft.export(tmp_path, params, model)
  assert written(tmp_path)[0]["bias"] == "lora_only"
  assert_same_trees(params, peft.load(tmp_path, model, base))

  params = adapted(model, base, pelt.chain(q, pelt.bitfit(), pelt.train("head")))
  peft.export(tmp_path, params, model)
  assert written(tmp_path)[0]["bias"] == "all"
  again = peft.load(tmp_path, model, base)
  np.testing.assert_array_equal(run(model, again), run(model, params))


def test_a_classification_head_is_written_even_if_it_did_not_train(tmp_path):
  model, base = build("roberta", "classification")
  params = adapted(model, base, pelt.lora(rank=2))
  peft.export(tmp_path, params, model)
  other = pelt.interop.peft.load(tmp_path, model, jax.tree.map(jnp.zeros_like, base))
  head = base["classifier"]["out_proj"]["kernel"]
  np.testing.assert_array_equal(other["classifier"]["out_proj"]["kernel"].value, head)


def test_a_lora_on_the_head_gives_up_the_task(tmp_path):
  model, base = build("bert", "classification")
  params = adapted(model, base, pelt.lora(rank=2, targets=("query", "head")))
  peft.export(tmp_path, params, model)
  config, _ = written(tmp_path)
  assert config["task_type"] is None
  assert config["modules_to_save"] is None
  assert_same_trees(params, peft.load(tmp_path, model, base))


def test_saved_modules_other_than_the_head(tmp_path):
  model, base = build("bert", "tagging")
  method = pelt.chain(pelt.lora(rank=2), pelt.train("embeddings/LayerNorm"), pelt.train("head"))
  params = adapted(model, base, method)
  peft.export(tmp_path, params, model)
  assert written(tmp_path)[0]["modules_to_save"] == ["bert.embeddings.LayerNorm", "classifier"]
  assert_same_trees(params, peft.load(tmp_path, model, base))


def test_what_peft_cannot_hold_is_refused_before_anything_is_written(tmp_path):
  model, base = build()
  folder = tmp_path / "new"
  with pytest.raises(ValueError, match="no low-rank pair"):
    peft.export(folder, base, model)
  with pytest.raises(ValueError, match=r"biases alone"):
    biased, params = build("bert", "encoder")
    peft.export(folder, adapted(biased, params, pelt.bitfit()), biased)
  two = [adapted(model, base, pelt.lora(rank=2, targets="query"), seed=s) for s in (1, 5)]
  with pytest.raises(ValueError, match=r"self_attn/q_proj/kernel: a BankWeight"):
    peft.export(folder, pelt.bank(two), model)
  mixed = pelt.chain(
    pelt.lora(rank=2, targets="query", dropout=0.1), pelt.lora(rank=2, targets="value")
  )
  with pytest.raises(ValueError, match="one dropout"):
    peft.export(folder, adapted(model, base, mixed), model)
  assert not folder.exists()


def edit(folder, **changes):
  file = folder / "adapter_config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def saved(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.lora(rank=3, alpha=6))
  peft.export(tmp_path, params, model)
  return tmp_path, model, base


@pytest.mark.parametrize(
  "option",
  [
    dict(use_qalora=True),
    dict(lora_bias=True),
    dict(alora_invocation_tokens=[1, 2]),
    dict(arrow_config={"top_k": 3}),
    dict(kasa_config={"a": 1}),
    dict(monteclora_config={"a": 1}),
    dict(velora_config={"a": 1}),
    dict(use_bdlora={"nblocks": 2}),
    dict(layer_replication=[[0, 2]]),
    dict(trainable_token_indices=[1]),
    dict(init_lora_weights="pissa_niter_4"),
    dict(init_lora_weights="loftq"),
    dict(bias="some"),
  ],
  ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("strict", [True, False])
def test_options_that_change_the_function_are_refused(saved, option, strict):
  folder, model, base = saved
  edit(folder, **option)
  with pytest.raises(ValueError, match=next(iter(option))):
    peft.load(folder, model, base, strict=strict)


def test_unknown_fields_raise_unless_lenient(saved):
  folder, model, base = saved
  edit(folder, brand_new=3)
  with pytest.raises(ValueError, match="brand_new"):
    peft.load(folder, model, base)
  with pytest.warns(UserWarning, match="brand_new"):
    peft.load(folder, model, base, strict=False)


def test_missing_tensors_raise_unless_lenient(saved):
  folder, model, base = saved
  edit(folder, target_modules=["q_proj", "v_proj", "k_proj"])
  with pytest.raises(ValueError, match=r"lacks tensors(.|\n)*layers\.0\.self_attn\.k_proj\.lora_A"):
    peft.load(folder, model, base)
  with pytest.warns(UserWarning, match="k_proj"):
    params = peft.load(folder, model, base, strict=False)
  assert not isinstance(params["model"]["layers"]["0"]["self_attn"]["k_proj"]["kernel"], LoraWeight)


def test_unexpected_tensors_raise_unless_lenient(saved):
  folder, model, base = saved
  edit(folder, target_modules=["q_proj"])
  with pytest.raises(ValueError, match=r"unexpected(.|\n)*v_proj\.lora_A"):
    peft.load(folder, model, base)
  with pytest.warns(UserWarning, match="v_proj"):
    peft.load(folder, model, base, strict=False)


def test_targets_that_name_nothing_raise(saved):
  folder, model, base = saved
  edit(folder, target_modules=["nothing"])
  with pytest.raises(ValueError, match="names no module"):
    peft.load(folder, model, base, strict=False)


def test_other_shapes_are_named(saved):
  folder, model, base = saved
  edit(folder, r=4)
  with pytest.raises(ValueError, match=r"lora_A\.weight has shape \(3, 32\), expected \(4, 32\)"):
    peft.load(folder, model, base)


def test_layers_to_transform(saved, tmp_path):
  folder, model, base = saved
  edit(folder, layers_to_transform=[0, 2], layers_pattern="layers")
  with pytest.warns(UserWarning, match=r"layers\.1\."):
    params = peft.load(folder, model, base, strict=False)
  kernels = [params["model"]["layers"][i]["self_attn"]["q_proj"]["kernel"] for i in "012"]
  assert [isinstance(k, LoraWeight) for k in kernels] == [True, False, True]


def test_all_linear_leaves_the_head_out(tmp_path):
  model, base = build()
  params = adapted(model, base, pelt.lora(rank=2, targets="all-linear"))
  peft.export(tmp_path, params, model)
  edit(tmp_path, target_modules="all-linear")
  assert_same_trees(params, peft.load(tmp_path, model, base))


def test_broken_folders(saved):
  folder, model, base = saved
  tensors = folder / "adapter_model.safetensors"
  data = tensors.read_bytes()
  tensors.write_bytes(data[:-10])
  with pytest.raises(ValueError, match="truncated"):
    peft.load(folder, model, base)
  tensors.unlink()
  with pytest.raises(FileNotFoundError, match="adapter_model"):
    peft.load(folder, model, base)
  (folder / "adapter_config.json").write_text("{")
  with pytest.raises(ValueError, match="damaged"):
    peft.load(folder, model, base)
  for damaged in ("[1]", "{}", '{"peft_type": ["LORA"]}'):
    (folder / "adapter_config.json").write_text(damaged)
    with pytest.raises(ValueError, match="damaged"):
      peft.load(folder, model, base)
  (folder / "adapter_config.json").write_text('{"peft_type": "POLY"}')
  with pytest.raises(ValueError, match="POLY"):
    peft.load(folder, model, base)
  (folder / "adapter_config.json").unlink()
  with pytest.raises(FileNotFoundError, match="adapter_config"):
    peft.load(folder, model, base)


def test_a_crash_leaves_the_old_folder(saved, monkeypatch):
  folder, model, base = saved
  before = written(folder)
  params = adapted(model, base, pelt.lora(rank=2, alpha=5))

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr("pelt_jax.interop._peft_files.write", fail)
  with pytest.raises(OSError, match="disk full"):
    peft.export(folder, params, model)
  after = written(folder)
  assert before[0] == after[0]
  assert_same_trees(before[1], after[1])
  assert len(list(folder.iterdir())) == 2


def test_what_was_loaded_trains(saved):
  folder, model, base = saved
  params = peft.load(folder, model, base)
  trainable, frozen = pelt.partition(params)
  assert len(jax.tree.leaves(trainable)) == 3 * 2 * 2
  assert not any(isinstance(x, Tuned) for x in params.values())
  loss = lambda p: jnp.sum(run(model, p) ** 2)
  grads = jax.jit(pelt.value_and_grad(loss))(trainable, frozen)[1]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
