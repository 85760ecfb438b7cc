import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax.models._names import torch_name
from tests.test_models.helpers import PAIRS, SEQ2SEQ_PAIRS, build, built, random_params, tokens


def saved(folder, name="llama", task="lm"):
  model, params = built(name, task)
  models.save_pretrained(folder, model, params)
  return model, params


def change(folder, edit):
  """Rewrites a checkpoint with the reference library after `edit(dict of tensors)`."""
  file = folder / "model.safetensors"
  tensors = {k: v.copy() for k, v in safetensors.numpy.load_file(file).items()}
  edit(tensors)
  safetensors.numpy.save_file(tensors, file, {"format": "pt"})


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ("name", "task", "scan"),
  [  # layers are taken apart in the same way whatever stands on top of them
    pytest.param(n, t, scan, marks=[pytest.mark.parity] * (t not in ("classification", "seq2seq")))
    for n, t in PAIRS + SEQ2SEQ_PAIRS
    for scan in (True, False)
  ],
)
def test_what_is_saved_loads_bit_for_bit(name, task, scan, tmp_path):
  model, params = saved(tmp_path, name, task)
  loaded, got = models.from_pretrained(tmp_path, task=task, scan=scan)
  assert loaded == model.clone(scan=scan)
  same(got, params if scan else models.to_looped(params, model))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_file_is_what_other_readers_expect(tmp_path):
  _, params = saved(tmp_path)
  with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}
    names = set(file.keys())
    kernel = file.get_tensor("model.layers.2.mlp.up_proj.weight")
  np.testing.assert_array_equal(kernel, params["model"]["layers"]["mlp"]["up_proj"]["kernel"][2].T)
  assert {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"} < names
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_round_trip_and_widening(dtype, tmp_path):
  model = build("llama", "lm", dtype=dtype, scan=True)
  params = random_params(model)
  models.save_pretrained(tmp_path, model, params)
  same(models.from_pretrained(tmp_path, dtype=dtype, scan=True)[1], params)
  wide = models.from_pretrained(tmp_path, scan=True)[1]
  same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_sharded_checkpoints(tmp_path):
  _, params = saved(tmp_path)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  (tmp_path / "model.safetensors").unlink()
  where = {}
  for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
    file = f"model-{i + 1:05}-of-00002.safetensors"
    safetensors.numpy.save_file({n: tensors[n] for n in names}, tmp_path / file)
    where |= dict.fromkeys(names, file)
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": where}))
  same(models.from_pretrained(tmp_path, scan=True)[1], params)
  (tmp_path / file).unlink()
  with pytest.raises(FileNotFoundError, match=file):
    models.from_pretrained(tmp_path)


def test_every_problem_is_named_with_the_shape_expected(tmp_path):
  saved(tmp_path)

  def edit(tensors):
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)

  change(tmp_path, edit)
  with pytest.raises(ValueError) as error:
    models.from_pretrained(tmp_path)
  text = str(error.value)
  assert "model.layers.1.self_attn.k_proj.weight is missing, expected shape (16, 32)" in text
  assert "model.norm.weight has shape (31,), expected (32,)" in text
  assert "model.layers.0.self_attn.q_proj.bias (32,) is unexpected" in text
  assert str(tmp_path) in text and "LlamaForCausalLM" in text


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_files(keep, tmp_path):
  saved(tmp_path)
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match="truncated.*Download it again"):
    models.from_pretrained(tmp_path)


def test_files_that_are_no_checkpoints(tmp_path):
  saved(tmp_path)
  (tmp_path / "model.safetensors").write_bytes((3).to_bytes(8, "little") + b"abc" + b"0" * 50)
  with pytest.raises(ValueError, match="header is not JSON"):
    models.from_pretrained(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not valid JSON"):
    models.from_pretrained(tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="no Hugging Face model folder"):
    models.from_pretrained(tmp_path)
  with pytest.raises(FileNotFoundError, match="there is no folder"):
    models.from_pretrained(tmp_path / "nowhere")


def test_a_missing_head_is_drawn_from_the_key(tmp_path, caplog):
  _, trunk = saved(tmp_path, "bert", "encoder")  # a bare model: no "bert." prefix, no classifier
  load = lambda seed: models.from_pretrained(
    tmp_path, task="classification", num_labels=6, scan=True, key=jax.random.key(seed)
  )
  (model, a), (_, b), (_, c) = load(0), load(0), load(1)
  assert "lacks classifier.bias, classifier.weight: initialised afresh" in caplog.text
  same(a["bert"], trunk)
  same(a, b)
  kernel = np.asarray(a["classifier"]["kernel"])
  assert kernel.shape == (32, 6) and not a["classifier"]["bias"].any()
  assert (kernel != c["classifier"]["kernel"]).all()
  assert 0.7 < kernel.std() / model.config.initializer_range < 1.3


def test_trunks_are_found_with_and_without_prefix(tmp_path):
  _, params = saved(tmp_path, "roberta", "classification")
  same(models.from_pretrained(tmp_path, task="encoder", scan=True)[1], params["roberta"])
  _, params = saved(tmp_path, "llama", "encoder")
  _, got = models.from_pretrained(tmp_path, task="tagging", num_labels=3, scan=True)
  same(got["model"], params)


def test_a_language_model_head_is_never_invented(tmp_path):
  saved(tmp_path, "llama", "encoder")
  with pytest.raises(ValueError, match=r"lm_head.weight is missing, expected shape \(97, 32\)"):
    models.from_pretrained(tmp_path)


def test_a_head_for_other_labels_is_refused(tmp_path):
  saved(tmp_path, "bert", "classification")
  with pytest.raises(ValueError, match=r"classifier.weight has shape .*expected.*see num_labels"):
    models.from_pretrained(tmp_path, task="classification", num_labels=4)
  model, _ = models.from_pretrained(tmp_path, task="classification")
  assert model.config.num_labels == 5  # kept in config.json


def test_buffers_of_old_files_and_tied_heads_are_left_alone(tmp_path):
  _, params = saved(tmp_path, "llama-tied-biased", "lm")

  def edit(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

  change(tmp_path, edit)
  same(models.from_pretrained(tmp_path, scan=True)[1], params)


def test_old_names_of_norms(tmp_path):
  _, params = saved(tmp_path, "bert", "tagging")

  def edit(tensors):
    for name in list(tensors):
      old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
      tensors[old] = tensors.pop(name)

  change(tmp_path, edit)
  same(models.from_pretrained(tmp_path, task="tagging", scan=True)[1], params)


def test_tokenizer_files_come_along(tmp_path):
  source, target = tmp_path / "a", tmp_path / "b"
  saved(source)
  (source / "tokenizer.json").write_text("{}")
  (source / "notes.txt").write_text("private")
  models.save_pretrained(target, *models.from_pretrained(source))
  assert sorted(p.name for p in target.iterdir()) == [
    "config.json", "model.safetensors", "tokenizer.json",
  ]  # fmt: skip
  models.save_pretrained(source, *models.from_pretrained(source))  # over itself
  shutil.rmtree(target)


def test_nothing_is_written_when_the_tree_does_not_fit(tmp_path):
  model, params = built("llama", "lm")
  method = pelt.lora(rank=2, targets="query")
  nodes = method.init(jax.random.key(0), params, pelt.sites(model, tokens(1, 4)))
  missing = {"model": params["model"]}
  wrong = params | {"lm_head": {"kernel": jnp.zeros((32, 96))}}
  extra = params | {"score": {"kernel": jnp.zeros((2, 2))}}
  for tree, message in [
    (nodes, r"q_proj/kernel' holds a LoraWeight.*pelt.merge\(params\)"),
    (missing, r"lm_head/kernel is missing, expected shape \(32, 97\)"),
    (wrong, r"lm_head/kernel has shape \(32, 96\), expected \(32, 97\)"),
    (extra, r"score/kernel \(2, 2\) is unexpected"),
  ]:
    with pytest.raises(ValueError, match=message):
      models.save_pretrained(tmp_path / "out", model, tree)
  assert not (tmp_path / "out").exists()


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
  model, params = saved(tmp_path)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  calls = []

  def fail(*args, **kwargs):
    calls.append(args)
    if len(calls) > 5:
      raise OSError("disk full")
    return original(*args, **kwargs)

  original = np.ascontiguousarray
  monkeypatch.setattr(np, "ascontiguousarray", fail)
  with pytest.raises(OSError, match="disk full"):
    models.save_pretrained(tmp_path, model, jax.tree.map(lambda x: x + 1, params))
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_names():
  assert torch_name("model/embed_tokens/embedding") == "model.embed_tokens.weight"
  assert torch_name("bert/embeddings/LayerNorm/scale") == "bert.embeddings.LayerNorm.weight"
  assert torch_name("score/bias") == "score.bias"


def test_stories_load_and_know_their_language(stories):
  model, params = models.from_pretrained(stories)
  text = np.array([[1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395]])
  loss = jax.jit(model.apply)({"params": params}, text[:, :-1], labels=None)
  loss = models.token_losses(loss, jnp.asarray(text[:, 1:])).mean()
  assert float(loss) < 2.5  # a model read with transposed or permuted weights is above ln 512 = 6.2


@pytest.mark.parametrize(("name", "head"), [("bert", "cls.predictions"), ("roberta", "lm_head")])
def test_a_masked_language_models_head_is_its_embedding(name, head, tmp_path):
  _, params = saved(tmp_path, name, "mlm")
  table = f"{name}.embeddings.word_embeddings.weight"

  def copies(tensors):
    tensors[f"{head}.decoder.weight"] = tensors[table]
    tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]

  change(tmp_path, copies)
  same(models.from_pretrained(tmp_path, task="mlm", scan=True)[1], params)
  change(tmp_path, lambda t: t.update({f"{head}.decoder.weight": t[table] + 1}))
  with pytest.raises(ValueError, match=f"{head}.decoder.weight differs from {table}"):
    models.from_pretrained(tmp_path, task="cloze")
  change(tmp_path, lambda t: [t.pop(n) for n in list(t) if n.startswith(head)])
  with pytest.raises(ValueError, match=f"{head}.bias is missing"):
    models.from_pretrained(tmp_path, task="mlm")
  models.from_pretrained(tmp_path, task="encoder")
