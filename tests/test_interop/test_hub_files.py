"""AdapterHub's folders that cannot be read or written say what, where, why and the remedy."""

import io
import json
import pickle
import shutil
import zipfile

import jax
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes
from pelt_jax._walk import walk
from pelt_jax.interop import _torch_file, adapterhub
from pelt_jax.interop._hub_config import BottleneckConfig
from pelt_jax.interop._hub_export import _factor
from pelt_jax.models._safetensors import write
from tests.test_interop import hub

BERT = hub.DATA / "bert"


@pytest.fixture(scope="module")
def bert():
  return models.from_pretrained(BERT / "base", task="classification", num_labels=3)


@pytest.fixture(scope="module")
def sites(bert):
  return pelt.sites(bert[0], hub.IDS)


@pytest.fixture(scope="module")
def gpt2():
  return models.from_pretrained(hub.DATA / "gpt2" / "base", task="encoder")


@pytest.fixture
def copy(tmp_path):
  def make(case, **changes):
    folder = tmp_path / "copy"
    shutil.copytree(BERT / case, folder)
    change(folder / "adapter_config.json", **changes)
    return folder

  return make


def change(file, **changes):
  """Sets fields of a configuration, those of AdapterHub's own fields by `file=`."""
  raw = json.loads(file.read_text())
  whole = changes.pop("whole", {})
  raw["config"] = {**raw["config"], **changes} if raw["config"] else raw["config"]
  file.write_text(json.dumps({**raw, **whole}))


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"original_ln_after": False}, r"original_ln_after=False: .* residual or norm is lost"),
    ({"residual_before_ln": False}, "residual_before_ln=False"),
    ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
    ({"original_ln_before": False, "residual_before_ln": "post_add"}, "needs original_ln_before"),
    ({"ln_after": True}, "ln_after=True"),
    ({"phm_layer": True}, "Compacter"),
    ({"inv_adapter": "nice"}, "invertible adapters"),
    ({"non_linearity": "leakyrelu"}, "non_linearity='leakyrelu': known are relu"),
    ({"scaling": "some"}, "scaling='some': expected a number"),
    ({"reduction_factor": 0}, "reduction_factor=0: expected positive"),
    ({"output_adapter": False}, "none of mh_adapter"),
    ({"dropout": 0.1}, r"dropout=0\.1: .*not its activations"),
    ({"stochastic_depth": 0.1}, r"stochastic_depth=0\.1"),
    ({"something": 1}, r"unknown fields .*\n  something"),
    ({"architecture": "reft"}, r"architecture='reft' cannot be read; those that can"),
    ({"leave_out": [5]}, r"leave_out=\[5\], but the base has layers 0 to 1"),
    ({"whole": {"model_type": "gpt2"}}, "made for a base of model_type 'gpt2', this one is 'bert'"),
    ({"whole": {"hidden_size": 768}}, "made for a base of width 768, this one has 16"),
    ({"reduction_factor": 4}, r"adapter_down\.0\.weight has shape \(2, 16\), expected \(4, 16\)"),
    ({"mh_adapter": True}, r"lacks the tensor bert\.encoder\.layer\.0\.attention\.output"),
    ({"leave_out": [0]}, r"unexpected tensors .*\n  bert\.encoder\.layer\.0\.output"),
    ({"use_gating": True}, r"lacks the tensor .*gate\.weight \(1, 16\)"),
    ({"ln_before": True}, r"lacks the tensor .*adapter_down\.1\.weight"),
  ],
)
def test_configurations_that_cannot_be_read(copy, bert, sites, changes, match):
  with pytest.raises(ValueError, match=match):
    adapterhub.load(copy("pfeiffer", **changes), *bert, sites=sites)


@pytest.mark.parametrize(
  ("part", "changes", "match"),
  [
    (0, {"non_linearity": "relu"}, "non_linearity='relu': the MLP here has tanh"),
    (0, {"shared_gating": False}, "shared_gating=False: keys and values have gates"),
    (0, {"prefix_length": 0}, "prefix_length=0: expected a whole number"),
    (0, {"dropout": 1.0}, r"dropout=1\.0: expected a share"),
    (2, {"use_dora": True}, "DoRA"),
    (2, {"composition_mode": "scale"}, "composition_mode='scale'"),
    (2, {"vera_d": 0.1}, "VeRA"),
    (2, {"attn_matrices": ["q", "o"]}, r"\['o'\] have no counterpart"),
    (2, {"alpha": -1}, "alpha=-1: expected a positive number"),
    (2, {"selfattn_lora": False}, "no matrix carries a LoRA"),
  ],
)
def test_parts_of_unions_that_cannot_be_read(copy, bert, sites, part, changes, match):
  folder = copy("unipelt")
  file = folder / "adapter_config.json"
  raw = json.loads(file.read_text())
  raw["config"]["configs"][part].update(changes)
  file.write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=match):
    adapterhub.load(folder, *bert, sites=sites)


def test_lenient(copy, bert, sites):
  """What acts in training alone, unknown fields and tensors are passed over on demand."""
  folder = copy("pfeiffer", dropout=0.1, something=1)
  with pytest.warns(UserWarning) as caught:
    params = adapterhub.load(folder, *bert, sites=sites, strict=False)
  assert {"dropout" in str(w.message) for w in caught} == {True, False}
  branch = params["bert"]["encoder"]["layer"]["0"]["output"]["LayerNorm"]["bypass"].branch
  assert branch.dropout is None


def test_files_of_old_versions(copy, bert, sites):
  """Without a version "gelu" is the tanh form, and text adapters name what they never used."""
  folder = copy("pfeiffer", non_linearity="gelu", inv_adapter="nice")
  file = folder / "adapter_config.json"
  raw = json.loads(file.read_text())
  del raw["version"]
  file.write_text(json.dumps(raw | {"type": "text_task"}))
  params = adapterhub.load(folder, *bert, sites=sites)
  branch = params["bert"]["encoder"]["layer"]["1"]["output"]["LayerNorm"]["bypass"].branch
  assert branch.activation == "gelu_tanh"
  change(file, non_linearity="gelu_orig")
  params = adapterhub.load(folder, *bert, sites=sites)
  branch = params["bert"]["encoder"]["layer"]["1"]["output"]["LayerNorm"]["bypass"].branch
  assert branch.activation == "gelu"


@pytest.mark.parametrize(("version", "scaling"), [("1.3.0", 2.0), ("1.1.0", 2.0), ("1.0.1", 1.0)])
def test_loras_of_before_1_1_have_no_scaling(bert, sites, tmp_path, version, scaling):
  model, base = bert
  method = pelt.lora(rank=2, alpha=4)
  params = method.init(jax.random.key(0), base, sites)
  adapterhub.export(tmp_path, params, model)
  change(tmp_path / "adapter_config.json", whole={"version": f"adapters.{version}"})
  again = adapterhub.load(tmp_path, model, base, sites=sites)
  query = again["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]
  assert float(query.scaling) == scaling


def test_missing_and_damaged_files(copy, bert, sites, tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
    adapterhub.load("nowhere", *bert, sites=sites)
  with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
    adapterhub.load(tmp_path, *bert, sites=sites)
  folder = copy("pfeiffer")
  whole = (folder / "pytorch_adapter.bin").read_bytes()
  (folder / "pytorch_adapter.bin").unlink()
  with pytest.raises(FileNotFoundError, match=r"neither adapter\.safetensors nor pytorch_adapter"):
    adapterhub.load(folder, *bert, sites=sites)
  (folder / "pytorch_adapter.bin").write_bytes(whole[:-200])
  with pytest.raises(ValueError, match=r"pytorch_adapter\.bin is (cut short|damaged)"):
    adapterhub.load(folder, *bert, sites=sites)
  (folder / "adapter.safetensors").write_bytes(b"12345678abc")
  with pytest.raises(ValueError, match=r"adapter\.safetensors is truncated"):
    adapterhub.load(folder, *bert, sites=sites)
  (folder / "adapter_config.json").write_text("{")
  with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
    adapterhub.load(folder, *bert, sites=sites)
  (folder / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"damaged: it lacks the fields"):
    adapterhub.load(folder, *bert, sites=sites)
  (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
  with pytest.raises(ValueError, match=r"is of PEFT: use pelt\.interop\.peft\.load"):
    adapterhub.load(folder, *bert, sites=sites)
  with pytest.raises(ValueError, match=r"is of AdapterHub: use pelt\.interop\.adapterhub\.load"):
    pelt.interop.peft.load(BERT / "houlsby", *bert)


def test_params_that_are_no_single_adapter_over_a_base(bert, sites, tmp_path):
  model, base = bert
  init = lambda method: method.init(jax.random.key(0), base, sites)
  one = init(pelt.adapter("pfeiffer"))
  with pytest.raises(ValueError, match="base holds nodes of a method at"):
    adapterhub.load(BERT / "pfeiffer", model, one, sites=sites)
  gated = init(pelt.chain(pelt.unipelt(2, gate_pool="mean_all"), pelt.close_gates()))
  for params, match in (
    (pelt.bank([one, one]), "params hold a bank; export its members one by one"),
    (gated, "its gate can be closed; use pelt.prune_gates first"),
  ):
    with pytest.raises(ValueError, match=match):
      adapterhub.export(tmp_path / "out", params, model)


def test_the_head_must_fit(copy, bert, sites):
  model, base = models.from_pretrained(BERT / "base", task="classification", num_labels=2)
  with pytest.raises(ValueError, match="the head has 3 labels, the model 2; .*num_labels=3"):
    adapterhub.load(BERT / "pfeiffer", model, base)
  encoder = models.from_pretrained(BERT / "base", task="encoder")
  with pytest.raises(ValueError, match=r"task='classification', num_labels=3; head=False"):
    adapterhub.load(BERT / "pfeiffer", *encoder)
  assert "classifier" not in adapterhub.load(BERT / "pfeiffer", *encoder, head=False)
  folder = copy("pfeiffer")
  file = folder / "head_config.json"
  before = file.read_text()
  for changes, match in (
    ({"activation_function": "gelu"}, "activation_function='gelu'.* tanh and the classifier"),
    ({"layers": 3}, "layers=3"),
    ({"bias": False}, "bias=False, but the last layer"),
    ({"use_pooler": True}, "use_pooler=True"),
    ({"head_type": "question_answering"}, "head_type='question_answering' has no counterpart"),
    ({"dropout_prob": 0.3}, r"training alone; the model has 0\.1"),
    ({"more": 1}, "unknown fields"),
    ({"layers": 1, "use_pooler": True}, r"unexpected tensors|lacks the tensor|has shape"),
  ):
    file.write_text(before)
    change(file, **changes)
    with pytest.raises(ValueError, match=match):
      adapterhub.load(folder, *bert, sites=sites)
  file.write_text(json.dumps(json.loads(before) | {"config": None, "model_class": "BertForX"}))
  with pytest.raises(ValueError, match=r"a head of BertForX with \['heads"):
    adapterhub.load(folder, *bert, sites=sites)


def test_fusions_need_their_adapters(bert, sites, tmp_path):
  with pytest.raises(ValueError, match="adapters are what a fusion reads"):
    adapterhub.load(BERT / "pfeiffer", *bert, sites=sites, adapters={"one": "x"})
  shutil.copytree(BERT / "fusion", tmp_path / "setup")
  fusion = tmp_path / "setup" / "one,two"
  fusion.rename(tmp_path / "alone")
  with pytest.raises(FileNotFoundError, match=r"fuses the adapter 'one'.*pass adapters="):
    adapterhub.load(tmp_path / "alone", *bert, sites=sites)
  with pytest.raises(ValueError, match=r"fuses the adapters \['one', 'two'\]; adapters names"):
    adapterhub.load(tmp_path / "alone", *bert, sites=sites, adapters={"one": tmp_path})
  folders = {n: tmp_path / "setup" / n for n in ("one", "two")}
  params = adapterhub.load(tmp_path / "alone", *bert, sites=sites, adapters=folders)
  assert any(isinstance(getattr(n, "branch", None), nodes.Fusion) for _, n in walk(params))
  for changes, match in (
    ({"temperature": True}, "temperature=True: a temperature that falls"),
    ({"query_before_ln": True}, "query_before_ln=True"),
    ({"key": False}, "key=False"),
    ({"dropout_prob": 0.1}, r"dropout_prob=0\.1: it drops scores"),
  ):
    file = tmp_path / "alone" / "adapter_fusion_config.json"
    before = file.read_text()
    change(file, **changes)
    with pytest.raises(ValueError, match=match):
      adapterhub.load(tmp_path / "alone", *bert, sites=sites, adapters=folders)
    file.write_text(before)
  for changes, match in (
    ({"is_parallel": True}, "whose residual AdapterHub's fusion counts twice"),
    ({"use_gating": True}, "whose gate"),
  ):
    file = folders["one"] / "adapter_config.json"
    before = file.read_text()
    change(file, **changes)
    with pytest.raises(ValueError, match=match):
      adapterhub.load(tmp_path / "alone", *bert, sites=sites, adapters=folders)
    file.write_text(before)
  file = tmp_path / "setup" / "adapter_setup.json"
  raw = json.loads(file.read_text())
  raw["adapter_setup"]["type"] = "Stack"
  file.write_text(json.dumps(raw))
  with pytest.raises(ValueError, match="a Stack of .* load its adapters one by one"):
    adapterhub.load(tmp_path / "setup", *bert, sites=sites)


def test_a_pruned_fusion_is_not_written(bert, sites, tmp_path):
  params = adapterhub.load(BERT / "fusion", *bert, sites=sites)
  fused = lambda node: isinstance(getattr(node, "branch", None), nodes.Fusion)
  place = next(path.rpartition("/")[0] for path, node in walk(params) if fused(node))
  params = pelt.prune_fusion(params, {place: [0.2, 0.8]}, keep=1)
  with pytest.raises(ValueError, match="some of its adapters were pruned"):
    adapterhub.export(tmp_path / "out", params, bert[0])
  assert not (tmp_path / "out").exists()


def test_swapped_arguments_and_other_families(bert, tmp_path):
  model, base = bert
  with pytest.raises(TypeError, match="are they swapped"):
    adapterhub.load(BERT / "pfeiffer", base, model)
  with pytest.raises(TypeError, match="are they swapped"):
    adapterhub.export(tmp_path, model, base)
  raw = dict(model_type="qwen2", vocab_size=9, hidden_size=8, intermediate_size=8)
  raw |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
  other = models.from_config(raw)
  with pytest.raises(ValueError, match=r"model_type 'qwen2' cannot .*those that can are bert"):
    adapterhub.load(BERT / "pfeiffer", other, {})


def made(bert, sites, method):
  return method.init(jax.random.key(0), bert[1], sites)


@pytest.mark.parametrize(
  ("method", "match"),
  [
    (pelt.bitfit(), "a trained leaf of the model"),
    (pelt.adapter("houlsby"), r"LayerNorm/(scale|bias): a trained leaf.*train_norms=False"),
    (pelt.adapter("pfeiffer", bottleneck={0: 2, 1: 3}, dropout=0.1), "what the adapter gives"),
    (pelt.unipelt(2, rank=2), "mean over real tokens, AdapterHub's over padding"),
    (pelt.unipelt(2, rank=2, gate_pool="token"), "no mean over the row"),
    (pelt.prefix_tuning(2), "positions are shifted, which AdapterHub never does"),
    (pelt.lora(2, targets=("query", "attention_out")), "AdapterHub puts no LoRA there"),
    (pelt.lora(2, rank_pattern={"value": 3}), "one rank, alpha and dropout for all"),
    (pelt.prompt_tuning(2), "a ExtendedEmbedding"),
    (pelt.adapter("parallel", targets="attention_heads"), "a Before"),
    (pelt.train("head"), "there is no adapter"),
  ],
)
def test_params_that_cannot_be_written(bert, sites, tmp_path, method, match):
  with pytest.raises(ValueError, match=match):
    adapterhub.export(tmp_path / "new", made(bert, sites, method), bert[0])
  assert not (tmp_path / "new").exists()


@pytest.mark.parity
def test_the_tap_of_parallel_adapters(gpt2, tmp_path):
  """Where a norm stands between, AdapterHub reads the stream; in BERT both are one."""
  gpt2_sites = pelt.sites(gpt2[0], hub.IDS)
  params = made(gpt2, gpt2_sites, pelt.adapter("parallel", bottleneck=2))
  with pytest.raises(ValueError, match=r"normalized input.*\(tap='residual'\)"):
    adapterhub.export(tmp_path, params, gpt2[0])
  adapterhub.export(
    tmp_path, made(gpt2, gpt2_sites, pelt.adapter("parallel", tap="residual")), gpt2[0]
  )


def test_padding_only_differences_are_warned_of_on_demand(bert, sites, tmp_path):
  params = made(bert, sites, pelt.unipelt(2, rank=2))
  with pytest.warns(UserWarning, match="over padding"):
    adapterhub.export(tmp_path, params, bert[0], strict=False)


def test_every_bottleneck_has_a_factor():
  """AdapterHub has width // factor, rounded down in floating point."""
  for width in (16, 30, 128, 768):
    for m in range(1, width + 3):
      factor = json.loads(json.dumps(_factor(width, m)))
      assert BottleneckConfig((), "pfeiffer", reduction=factor).bottleneck(width, 0) == m
  assert _factor(768, 48) == 16


@pytest.mark.parity
def test_widths_by_layer_and_layers_left_out(bert, sites, tmp_path):
  model, base = bert
  params = made(bert, sites, pelt.adapter("pfeiffer", bottleneck={0: 5, 1: 3}))
  adapterhub.export(tmp_path / "a", params, model)
  raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert set(raw["config"]["reduction_factor"]) == {"0", "1"}
  again = adapterhub.load(tmp_path / "a", model, base, sites=sites)
  layers = again["bert"]["encoder"]["layer"]
  assert [layers[i]["output"]["LayerNorm"]["bypass"].branch.up.shape for i in "01"] == [
    (5, 16),
    (3, 16),
  ]
  method = pelt.adapter("houlsby", layers=[1], train_norms=False)
  params = made(bert, sites, method)
  adapterhub.export(tmp_path / "b", params, model)
  raw = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
  assert raw["config"]["leave_out"] == [0] and raw["config"]["mh_adapter"]
  again = adapterhub.load(tmp_path / "b", model, base, sites=sites)
  places = lambda tree: {p for p, _ in walk(tree) if p.endswith("bypass")}
  assert places(again) == places(params)
  scanned = models.from_pretrained(BERT / "base", task="classification", num_labels=3, scan=True)
  with pytest.raises(ValueError, match=r"leave_out=\[0\] chooses among layers that a scan stacks"):
    adapterhub.load(tmp_path / "b", *scanned)
  with pytest.raises(ValueError, match=r"layers have other shapes.*load the model with scan=False"):
    adapterhub.load(tmp_path / "a", *scanned)


def test_nothing_old_stays_beside_the_new(bert, sites, tmp_path):
  params = made(bert, sites, pelt.adapter("pfeiffer"))
  shutil.copy(BERT / "pfeiffer" / "pytorch_adapter.bin", tmp_path)
  with pytest.raises(FileExistsError, match=r"pytorch_adapter\.bin.* of an earlier adapter"):
    adapterhub.export(tmp_path, params, bert[0])
  (tmp_path / "pytorch_adapter.bin").unlink()
  adapterhub.export(tmp_path, params, bert[0], labels=["a", "b", "c"])
  adapterhub.export(tmp_path, params, bert[0])  # over its own files
  assert adapterhub.labels(tmp_path) == ["LABEL_0", "LABEL_1", "LABEL_2"]
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "adapter.safetensors",
    "adapter_config.json",
    "head_config.json",
    "model_head.safetensors",
  ]
  with pytest.raises(ValueError, match="labels has 2 names, the head 3 rows"):
    adapterhub.export(tmp_path, params, bert[0], labels=["a", "b"])
  for name in ("", "a.b", "a,b", "../x"):
    with pytest.raises(ValueError, match="name must have no"):
      adapterhub.export(tmp_path, params, bert[0], name=name)


def test_a_failed_write_leaves_no_file(bert, sites, tmp_path, monkeypatch):
  def fail(*args):
    raise OSError("disk full")

  monkeypatch.setattr("pelt_jax.interop._hub_files.os.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    adapterhub.export(tmp_path, made(bert, sites, pelt.adapter("pfeiffer")), bert[0])
  assert list(tmp_path.iterdir()) == []


class Evil:
  def __reduce__(self):
    return print, ("it ran",)


def zipped(data, **files):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    archive.writestr("x/data.pkl", data)
    for name, value in files.items():
      archive.writestr(f"x/{name}", value)
  return out.getvalue()


def test_pickles_run_nothing(tmp_path, capsys):
  file = tmp_path / "x.bin"
  for data, match in (
    (pickle.dumps({"a": Evil()}), r"names builtins\.print"),
    (pickle.dumps({"a": 1}), "expected names and their tensors"),
    (pickle.dumps([1]), "holds a list"),
    (b"", "damaged"),
    (b"\x80\x02garbage", "damaged"),
  ):
    file.write_bytes(zipped(data))
    with pytest.raises(ValueError, match=match):
      _torch_file.read_torch_file(file)
  assert capsys.readouterr().out == ""


def test_files_of_old_torch_need_torch(tmp_path, monkeypatch):
  file = tmp_path / "x.bin"
  file.write_bytes(b"no archive")
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  with pytest.raises(ValueError, match="before torch 1.6, which only torch reads. Install torch"):
    _torch_file.read_torch_file(file)


def test_copies_of_one_tensor_must_agree(bert, sites, tmp_path):
  """A prefix lies in the file once for every layer and once for all."""
  folder = tmp_path / "prefix"
  shutil.copytree(BERT / "prefix", folder)
  values = _torch_file.read_torch_file(folder / "pytorch_adapter.bin")
  (folder / "pytorch_adapter.bin").unlink()
  name = next(k for k in values if ".layer.1." in k and "wte" in k)

  def save():
    shapes = {k: (v.shape, v.dtype) for k, v in values.items()}
    write(folder / "adapter.safetensors", shapes, values.__getitem__, {})

  save()
  adapterhub.load(folder, *bert, sites=sites)
  values[name] = values[name] + 1
  save()
  with pytest.raises(ValueError, match="is damaged: .*one tensor, differ"):
    adapterhub.load(folder, *bert, sites=sites)


@pytest.mark.parity
def test_t5_has_no_prefixes(tmp_path):
  model, base = models.from_pretrained(hub.DATA / "t5" / "base", task="seq2seq")
  params = pelt.prefix_tuning(2, reparametrize=False).init(
    jax.random.key(0), base, pelt.sites(model, hub.IDS, decoder_input_ids=hub.IDS)
  )
  with pytest.raises(ValueError, match="move the distances that its attention is biased by"):
    adapterhub.export(tmp_path, params, model)
