"""The main job, end to end on tiny models."""

import importlib
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax._walk import every_node
from tests import support
from tests.support import REPOSITORY
from tests.test_training import tiny

SENTIMENT = [("the film is very good .", "pos"), ("the plot is not good .", "neg")] * 8 + [
  ("a fine film", "pos"),
  ("a dull plot", "neg"),
]
ENTITIES = (
  "Ada\tB-person\nwent\tO\nto\tO\nOslo\tB-place\n\nthe\tO\nfilm\tO\nsees\tO\nAda\tB-person\n"
)
LONG = pytest.mark.parity
CHAT = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def finetune(monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
  return importlib.import_module("finetune")


def sentiment(folder, rows=SENTIMENT):
  path = folder / "data.csv"
  path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
  return path


def arguments(tmp_path, model, data, task, **options):
  options = {"steps": 4, "batch": 4, "out": tmp_path / "out", "train": data, "eval": data} | options
  flags = [f for n, v in options.items() if v is not True for f in (f"--{n}", str(v))]
  flags += [f"--{n}" for n, v in options.items() if v is True]
  return ["--quiet", "--model", str(model), "--task", task, *flags]


def check_report(report, out, metric, head):
  assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
  assert {path.name for path in out.iterdir()} == {
    *("adapter", "checkpoints", "report.json", "report.md", "loss.png"),
  }
  assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert set(report) >= {
    *("method", "model", "task", "seed", "steps", "metric", "forgetting", "parameters", "bytes"),
    *("flops", "time", "loss", "versions"),
  }
  assert set(report["metric"]) == {"name", "higher_is_better", "before", "after"}
  assert report["metric"]["name"] == metric
  assert [step for step, _ in report["loss"]] == list(range(1, report["steps"] + 1))
  assert all(math.isfinite(loss) for _, loss in report["loss"])
  counts = report["parameters"]
  assert set(counts) == {"trainable", "stored", "changed", "rank", "head", "total"}
  assert counts["head"] == head
  # Adam's two moments, and its counters.
  expected = 2 * 4 * (counts["trainable"] + (head or 0))
  assert expected <= report["bytes"]["optimizer"] < expected + 100
  assert report["flops"]["step"] > report["flops"]["forward"] > 0
  assert report["bytes"]["adapter"] > 4 * (counts["stored"] + (head or 0))
  assert report["time"]["total_s"] > report["time"]["compile_s"] > 0


@pytest.mark.parametrize(
  "method", [pytest.param(m, marks=LONG) for m in ("full", "bitfit")] + ["lora"]
)
def test_classification(finetune, bert, tmp_path, method):
  data = sentiment(tmp_path)
  argv = arguments(tmp_path, bert, data, "classification", method=method, steps=30, lr=0.02)
  report = finetune.main([*argv, "--best"])  # the last step of so tiny a model says little
  out = tmp_path / "out"
  counts = report["parameters"]
  check_report(report, out, "accuracy", counts["head"])
  assert counts["head"] == 16 * 2 + 2
  if method == "lora":  # rank 8, query and value of one layer of width 16
    assert counts["trainable"] == 2 * 8 * (16 + 16)
  # Features of random weights teach little; what matters is that the best evaluation was kept.
  accuracies = [scores["accuracy"] for _, scores in report["scores"]["during"]]
  assert report["metric"]["after"] == max(accuracies)
  assert json.loads((out / "adapter/labels.json").read_text()) == ["neg", "pos"]

  # What was saved is what was scored.
  model, base = models.from_pretrained(
    bert, task="classification", num_labels=2, key=jax.random.key(0)
  )
  params = pelt.load(out / "adapter", base)
  examples = training.read(data, "classification")
  rows = training.encode(
    examples, training.load_tokenizer(bert), "classification", labels=("neg", "pos")
  )
  scores = training.evaluate(pelt.bypass(model.apply), params, rows, 4)
  assert scores["accuracy"] == report["metric"]["after"]


@LONG
@pytest.mark.parametrize(("method", "settings", "trainable"), [
  # One layer of width 16; two adapters and three norms, one adapter.
  ("adapter", ("bottleneck=4",), 2 * (2 * 4 * 16 + 4 + 16) + 3 * 2 * 16),
  ("adapter", ("style=pfeiffer", "bottleneck=4"), 2 * 4 * 16 + 4 + 16),
  ("adapter", ("style=parallel", "bottleneck=4", "scaling=learned"), 2 * 4 * 16 + 4 + 16 + 1),
  ("mam", ("length=2", "bottleneck=4", "reparametrize=false"), 4 * 16 + 2 * 4 * 16 + 4 + 16),
  (
    "unipelt",
    ("length=2", "rank=1", "bottleneck=4", "reparametrize=false"),
    4 * 16 + 2 * 2 * 16 + 2 * 4 * 16 + 4 + 16 + 4 * 17,
  ),
  (
    "design",
    (
      *("form=relu", "insertion=parallel", "representation=ffn", "composition=gated", "size=4"),
      "dropout=0.1",
    ),
    2 * 4 * 16 + 4 + 16 + 17,
  ),
])  # fmt: skip
def test_adapters_and_their_mixtures(finetune, bert, tmp_path, method, settings, trainable):
  data = sentiment(tmp_path)
  argv = arguments(tmp_path, bert, data, "classification", method=method, steps=20, lr=0.02)
  report = finetune.main([*argv, *(part for s in settings for part in ("--set", s))])
  check_report(report, tmp_path / "out", "accuracy", 16 * 2 + 2)
  assert report["parameters"]["trainable"] == trainable
  losses = [loss for _, loss in report["loss"]]
  assert np.mean(losses[-5:]) < np.mean(losses[:5])


@LONG
def test_fusion_of_other_runs_adapters(finetune, bert, tmp_path):
  """Stage 1 on a classification and a tagging file, stage 2 on the first."""
  data, entities = sentiment(tmp_path), tmp_path / "words.conll"
  entities.write_text(ENTITIES)
  common = {"method": "adapter", "steps": 2, "lr": 0.01}
  settings = ["--set", "style=pfeiffer", "--set", "bottleneck=4"]
  for name, file, task in (("films", data, "classification"), ("names", entities, "tagging")):
    options = common | {"out": tmp_path / name}
    finetune.main([*arguments(tmp_path, bert, file, task, **options), *settings])
  folders = ",".join(f"{n}={tmp_path / n / 'adapter'}" for n in ("films", "names"))
  argv = arguments(
    tmp_path, bert, data, "classification", method="adapter_fusion", steps=12, lr=0.02
  )
  report = finetune.main([*argv, "--adapters", folders])
  check_report(report, tmp_path / "out", "accuracy", 16 * 2 + 2)
  assert report["parameters"]["trainable"] == 3 * 16 * 16 + 2 * 16
  assert np.mean([v for _, v in report["loss"][-4:]]) < np.mean([v for _, v in report["loss"][:4]])
  for wrong, match in (("films", "expected NAME=DIR"), (f"a={tmp_path}/none", "is no folder")):
    with pytest.raises(ValueError, match=match):
      finetune.main([*argv, "--overwrite", "--adapters", wrong])
  with pytest.raises(ValueError, match="go together"):
    finetune.main([*argv, "--overwrite"])


@LONG
@pytest.mark.parametrize("placement", ["start", "end"])
def test_prompt_tuning(finetune, bert, tmp_path, placement):
  data = sentiment(tmp_path)
  report = finetune.main(
    arguments(
      tmp_path,
      bert,
      data,
      "classification",
      method="prompt_tuning",
      set="length=3",
      placement=placement,
    )
  )
  out, counts = tmp_path / "out", report["parameters"]
  check_report(report, out, "accuracy", 16 * 2 + 2)
  assert counts["trainable"] == counts["stored"] == 3 * 16
  model, base = models.from_pretrained(
    bert, task="classification", num_labels=2, key=jax.random.key(0)
  )
  params = pelt.load(out / "adapter", base)
  rows = training.encode(
    training.read(data, "classification"),
    training.load_tokenizer(bert),
    "classification",
    labels=("neg", "pos"),
    virtual=pelt.virtual_tokens(params),
    placement=placement,
  )
  assert len(rows.rows[0]["input_ids"]) == 3 + 8  # six words between [CLS] and [SEP]
  scores = training.evaluate(pelt.bypass(model.apply), params, rows, 4)
  assert scores["loss"] == pytest.approx(report["scores"]["after"]["loss"], rel=1e-5)


@LONG
@pytest.mark.parametrize("joint", [False, True])
def test_p_tuning(finetune, bert, tmp_path, joint):
  data = sentiment(tmp_path)
  argv = arguments(tmp_path, bert, data, "classification", method="p_tuning", set="length=3")
  report = finetune.main([*argv, "--set", f"tune_backbone={joint}"])
  counts = report["parameters"]
  check_report(report, tmp_path / "out", "accuracy", 16 * 2 + 2)
  encoder = 3 * 16 + 4 * (4 * 8 * (16 + 8) + 8 * 8) + 2 * (16 * 16 + 16)
  backbone = counts["total"] - (16 * 2 + 2) if joint else 0
  assert counts["trainable"] == encoder + backbone
  assert counts["stored"] == 3 * 16 + backbone
  if joint:  # four steps of Adam, none longer than the backbone's own rate
    _, base = models.from_pretrained(bert, task="classification", num_labels=2)
    params = pelt.load(tmp_path / "out/adapter", base)
    before, after = base["bert"]["pooler"], params["bert"]["pooler"]
    moved = np.abs(after["dense"]["kernel"].value - before["dense"]["kernel"]).max()
    assert 1e-6 < moved < 4 * importlib.import_module("options").RATES["full"]["classification"]


@LONG
@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_trains_float32_additions(finetune, bert, tmp_path, method):
  data = sentiment(tmp_path)
  report = finetune.main(
    arguments(tmp_path, bert, data, "classification", method=method, dtype="bfloat16", steps=6)
  )
  check_report(report, tmp_path / "out", "accuracy", report["parameters"]["head"])
  _, base = models.from_pretrained(
    bert, task="classification", num_labels=2, dtype="bfloat16", key=jax.random.key(0)
  )
  params = pelt.load(tmp_path / "out/adapter", base)
  assert {str(x.dtype) for x in jax.tree.leaves(pelt.partition(params)[0])} == {"float32"}
  assert {str(x.dtype) for x in jax.tree.leaves(pelt.merge(params))} == {"bfloat16"}


def test_overwrite_deletes_nothing_before_all_is_in_order(finetune, bert, tmp_path):
  data = sentiment(tmp_path)
  finetune.main(arguments(tmp_path, bert, data, "classification", steps=1))
  before = sorted(p.name for p in (tmp_path / "out").iterdir())
  argv = arguments(
    tmp_path, bert, data, "classification", steps=1, overwrite=True, train=tmp_path / "none.csv"
  )
  with pytest.raises(training.DataError, match=r"none\.csv: no such file"):
    finetune.main(argv)
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


@LONG
def test_a_run_is_not_resumed_on_other_data(finetune, bert, tmp_path):
  data = sentiment(tmp_path)
  argv = arguments(tmp_path, bert, data, "classification", steps=4)
  finetune.main(argv)
  sentiment(tmp_path, SENTIMENT[:8])
  with pytest.raises(ValueError, match="contents of the files"):
    finetune.main([*argv, "--resume"])


def test_an_adapter_for_another_base_is_refused(finetune, bert, tmp_path):
  finetune.main(arguments(tmp_path, bert, sentiment(tmp_path), "classification", steps=1))
  (tmp_path / "other").mkdir()
  other = tiny.save_bert(tmp_path / "other", seed=1)
  _, base = models.from_pretrained(other, task="classification", num_labels=2)
  with pytest.raises(ValueError, match="embeddings"):
    pelt.load(tmp_path / "out/adapter", base)


def test_tagging(finetune, bert, tmp_path):
  data = tmp_path / "data.conll"
  data.write_text(ENTITIES * 4)
  report = finetune.main(
    arguments(tmp_path, bert, data, "tagging", steps=40, lr=0.02, set="targets=all-linear")
  )
  check_report(report, tmp_path / "out", "entity_f1", 16 * 3 + 3)
  assert report["metric"]["after"] > report["metric"]["before"]
  labels = json.loads((tmp_path / "out/adapter/labels.json").read_text())
  assert labels == ["B-person", "B-place", "O"]


@LONG
@pytest.mark.parametrize("scan", [False, True])
def test_plain_text(finetune, llama, tmp_path, scan):
  data = tmp_path / "data.txt"
  data.write_text("the cat sat on the mat. " * 20)
  general = tmp_path / "general.txt"
  general.write_text("ZYXW " * 30)
  options = {"length": 32, "steps": 20, "lr": 0.01, "general": general, "accumulate": 2}
  options |= {"scan": True, "remat": True} if scan else {}
  report = finetune.main(arguments(tmp_path, llama, data, "lm", **options))
  check_report(report, tmp_path / "out", "loss", 0)
  assert report["metric"]["after"] < report["metric"]["before"]
  assert report["forgetting"]["after"] != report["forgetting"]["before"] > 0
  scores = report["scores"]["after"]
  assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
  # One token a byte, and all but the first are predicted.
  assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / math.log(2))


@LONG
def test_4_bits_under_a_paged_optimizer(finetune, llama, tmp_path, monkeypatch):
  """The same losses with the optimizer's state in the host's memory, and an adapter that serves."""
  data = tmp_path / "data.txt"
  data.write_text("the cat saw the dog . the dog saw the cat .\n" * 40)
  options = {"method": "qlora", "set": "rank=4", "length": 16}
  job = lambda out, **more: arguments(tmp_path, llama, data, "lm", out=out, **options, **more)
  plain = finetune.main(job(tmp_path / "plain"))
  found, paged = [], pelt.paged
  watched = lambda tx: found.append(tx) or paged(tx, min_size=64)
  monkeypatch.setattr(pelt, "paged", watched)
  report = finetune.main(job(tmp_path / "paged", paged=True))
  assert len(found) == 1
  assert report["loss"] == plain["loss"] and report["metric"] == plain["metric"]
  assert report["metric"]["after"] < report["metric"]["before"]
  _, base = models.from_pretrained(llama)
  tuned = pelt.load(tmp_path / "paged" / "adapter", base)
  assert pelt.count(tuned).trainable == report["parameters"]["trainable"]


@LONG
@pytest.mark.parametrize(
  ("method", "more"),
  [("adapter", {"quantize": "nf4"}), ("qlora", {"set": "rank=4", "scan": True})],
)
def test_any_method_over_4_bits(finetune, llama, tmp_path, method, more):
  """The model is quantized while it is read, and its adapter serves over the checkpoint."""
  data = tmp_path / "data.txt"
  data.write_text("the cat saw the dog . the dog saw the cat .\n" * 40)
  options = {"method": method, "length": 16, **more}
  aware = ["--set", "merge_aware=true"] * (method == "qlora")
  report = finetune.main([*arguments(tmp_path, llama, data, "lm", **options), *aware])
  assert report["metric"]["after"] < report["metric"]["before"]
  _, base = models.from_pretrained(llama, scan="scan" in more)
  tuned = pelt.load(tmp_path / "out" / "adapter", base)
  assert any(isinstance(n, pelt.quantization.NF4Weight) for n in every_node(tuned))
  if method == "qlora":
    _, losses = pelt.quantization.requantize(tuned)
    assert all(loss.update > 0 and loss.error < 1e-6 for loss in losses.values())


@LONG
@pytest.mark.parametrize(
  ("method", "more"),
  [
    ("dora", {"quantize": "nf4", "set": "dropout=0.1"}),
    ("pissa", {"scan": True}),
    ("olora", {"dtype": "bfloat16"}),
    ("lora_fa", {}),
  ],
)
def test_loras_kin(finetune, llama, tmp_path, method, more):
  data = tmp_path / "data.txt"
  data.write_text("the cat saw the dog . the dog saw the cat .\n" * 40)
  options = {"method": method, "length": 16, "lr": 0.02, **more}
  report = finetune.main(arguments(tmp_path, llama, data, "lm", **options))
  assert report["metric"]["after"] < report["metric"]["before"]
  _, base = models.from_pretrained(llama, scan="scan" in more, dtype=more.get("dtype", "float32"))
  tuned = pelt.load(tmp_path / "out" / "adapter", base)
  counts = report["parameters"]
  assert pelt.count(tuned).trainable == counts["trainable"] > 0
  assert counts["rank"] == (8 if method != "dora" else 16)  # the model's width


@LONG
def test_b_learns_faster_by_the_ratio(finetune, bert, tmp_path):
  """The first step's rate is zero, so at the second both runs have the same moments."""
  nodes, data = [], sentiment(tmp_path)
  for i, ratio in enumerate(("ratio=1", "ratio=8")):
    out = tmp_path / str(i)
    argv = arguments(out, bert, data, "classification", set=ratio, lr=1e-3, steps=2, batch=4)
    assert ratio in finetune.main(argv)["settings"]["set"]
    _, base = models.from_pretrained(
      bert, task="classification", num_labels=2, key=jax.random.key(0)
    )
    tuned = pelt.load(out / "out" / "adapter", base)
    nodes.append(next(n for n in every_node(tuned) if isinstance(n, pelt.nodes.LoraWeight)))
  np.testing.assert_array_equal(nodes[1].a, nodes[0].a)
  np.testing.assert_allclose(nodes[1].b, 8 * nodes[0].b, rtol=1e-5)
  assert np.abs(nodes[0].b).max() > 0


def test_chat(finetune, llama, tmp_path):
  data = tmp_path / "chat.jsonl"
  data.write_text((json.dumps({"messages": CHAT}) + "\n") * 6)
  report = finetune.main(arguments(tmp_path, llama, data, "lm", steps=20, lr=0.01, length=64))
  assert report["metric"]["after"] < report["metric"]["before"]


@LONG
def test_a_stopped_run_goes_on_to_the_same_bits(finetune, bert, tmp_path, monkeypatch):
  data = sentiment(tmp_path)
  options = {"steps": 8, "set": "dropout=0.2", "batch": 9}  # two batches an epoch
  whole = finetune.main(
    arguments(tmp_path, bert, data, "classification", **options | {"out": tmp_path / "whole"})
  )
  argv = arguments(tmp_path, bert, data, "classification", **options)
  save, saves = training.Checkpoints.save, []

  def interrupted(self, step, *args):
    save(self, step, *args)
    saves.append(step)
    raise KeyboardInterrupt

  monkeypatch.setattr(training.Checkpoints, "save", interrupted)
  with pytest.raises(KeyboardInterrupt):
    finetune.main(argv)
  monkeypatch.undo()
  monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
  assert saves == [2]
  with pytest.raises(ValueError, match="not empty: pass --resume to go on, or --overwrite"):
    finetune.main(argv)
  with pytest.raises(training.CheckpointMismatch, match=r"option lr: saved 0\.002, now 0\.5"):
    finetune.main([*argv, "--resume", "--lr", "0.5"])
  resumed = finetune.main([*argv, "--resume"])
  assert resumed["loss"] == whole["loss"]
  files = [sorted((tmp_path / name / "adapter").glob("*.safetensors")) for name in ("whole", "out")]
  assert files[0][0].read_bytes() == files[1][0].read_bytes()


def test_overwrite_removes_what_the_job_wrote_and_nothing_else(finetune, bert, tmp_path):
  data, out = sentiment(tmp_path), tmp_path / "out"
  argv = arguments(tmp_path, bert, data, "classification", steps=1)
  (out / "adapter").mkdir(parents=True)
  (out / "adapter/adapter.json").write_text("old")
  (out / "notes.txt").write_text("mine")
  finetune.main([*argv, "--overwrite"])
  assert (out / "notes.txt").read_text() == "mine"
  assert "old" not in (out / "adapter/adapter.json").read_text()


BAD = [
  ({"method": "lorra"}, "--method lorra: unknown; known are full, bitfit, lora"),
  ({"set": "ranc=3"}, r"--set ranc: lora has no such option; it has rank=8, alpha=None"),
  ({"set": "rank=big"}, "--set rank=big: expected int"),
  ({"set": "rank=2.5"}, r"--set rank=2\.5: expected int"),
  ({"set": "rank"}, "--set rank: expected KEY=VALUE"),
  ({"set": "ratio=0.5"}, r"--set ratio=0\.5: expected a number of at least 1"),
  ({"set": "plus=true"}, "--set plus=true: say how much faster .* --set ratio=16"),
  ({"method": "bitfit", "set": "ratio=2"}, "--set ratio: bitfit has no such option"),
  ({"set": "rank=0"}, "rank must be .* got 0"),
  ({"set": "targets=nothing"}, "nothing"),
  ({"method": "full", "quantize": "nf4"}, "--quantize nf4: --method full trains every weight"),
  ({"method": "qlora", "quantize": "fp4"}, "--method qlora quantizes by itself: --set book=fp4"),
  ({"method": "design", "set": "size=4"}, "design: missing .*'form'; pass it as --set NAME=VALUE"),
  ({"method": "design", "set": "options=4"}, "design has no such option; it has form, insertion"),
  ({"steps": -1}, "--steps -1: expected a positive number"),
  ({"epochs": 2}, "--steps and --epochs exclude"),
  ({"length": 25}, "length=25: the model has 24 positions"),
  ({"accumulate": 3}, "--accumulate 3 does not divide --batch 4"),
  ({"mesh": "data=4096"}, r"--mesh 'data=4096' needs 4096 devices, \d+ found. Take smaller sizes"),
  ({"mesh": "dta=2"}, "--mesh 'dta=2': expected sizes of .* got 'dta=2'"),
  ({"moments": "data"}, "--moments needs --mesh, such as"),
  ({"distributed": True}, "--distributed needs --mesh, such as"),
  (
    {"mesh": "data=1", "moments": "data,dta"},
    "--moments data,dta: --mesh data=1 has no dta; take some of data",
  ),
  ({"general": "x.txt"}, "--general .*--task lm"),
  ({"train": "absent.csv"}, r"absent\.csv: no such file"),
  ({"model": "./absent"}, "absent"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_named_and_nothing_is_trained(finetune, bert, tmp_path, options, message):
  model, options = options.get("model", bert), {k: v for k, v in options.items() if k != "model"}
  argv = arguments(tmp_path, model, sentiment(tmp_path), "classification", **options)
  with pytest.raises((ValueError, OSError), match=message):
    finetune.main(argv)
  assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--batch 6", "--batch 6 does not divide .* 4 devices .* --mesh .*: take a multiple of 4"),
    ("--batch 8 --accumulate 4", "--batch 8 in --accumulate 4 parts .* take a multiple of 16"),
    ("--batch 8 --accumulate 2", None),
  ],
)
def test_a_batch_that_a_mesh_cannot_share_is_named(finetune, monkeypatch, flags, message):
  mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "model"))
  monkeypatch.setattr(training, "make_mesh", lambda text: mesh)
  options = importlib.import_module("options")
  args = options.parse([*flags.split(), "--mesh", "data=2,fsdp=2,model=2"], None)
  options.check_arguments(args, demo=True)
  if message is None:
    assert options.check_mesh(args) is mesh
  else:
    with pytest.raises(ValueError, match=message):
      options.check_mesh(args)


def test_devices_that_a_mesh_leaves_idle_are_said(finetune, bert, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  argv = arguments(tmp_path, bert, tmp_path / "absent.csv", "classification", mesh="data=1")
  for quiet in (True, False):
    with pytest.raises((ValueError, OSError), match="no such file"):
      finetune.main(argv[not quiet :])
    assert ("--mesh data=1 uses 1 of 8 devices\n" in capsys.readouterr().out) is not quiet


def test_a_rank_too_large_names_its_flag(finetune, bert, tmp_path):
  argv = arguments(tmp_path, bert, sentiment(tmp_path), "classification", set="rank=99")
  with pytest.raises(ValueError, match="lower rank") as found:
    finetune.main(argv)
  with pytest.raises(
    SystemExit, match=r"rank 99 exceeds .*; lower rank \(--set rank=N\), or leave"
  ):
    finetune.fail(str(found.value))


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([("a film", "pos"), ("a plot", "other")], r"eval\.csv:3: label 'other' does not occur"),
    ([("very " * 30, "pos")], r"eval\.csv:2: 32 tokens.* 24 positions.*--length 24"),
    ([], r"eval\.csv: the file holds no examples"),
  ],
)
def test_bad_rows_are_named(finetune, bert, tmp_path, rows, message):
  data = sentiment(tmp_path)
  wrong = tmp_path / "eval.csv"
  wrong.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
  with pytest.raises(training.DataError, match=message):
    finetune.main(arguments(tmp_path, bert, data, "classification", eval=wrong))


def test_the_command_ends_with_one_line_about_the_error(tmp_path):
  command = [sys.executable, "experiments/finetune.py", "--model", str(tmp_path)]
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr == "error: --train is missing: training needs a --train and an --eval file\n"


MESH = """
  import json, sys
  sys.path.insert(0, "experiments")
  import finetune
  common = ["--quiet", "--model", {model!r}, "--task", "lm"]
  common += ["--train", {data!r}, "--eval", {data!r}, "--steps", "3", "--batch", "4"]
  common += ["--length", "32", "--lr", "0.01", "--set", "targets=all-linear"]
  for name in ("data=2,model=2", "fsdp=4", None):
    flags = ["--mesh", name] if name else []
    flags += ["--moments", "fsdp"] if name == "fsdp=4" else []
    report = finetune.main([*common, *flags, "--out", {out!r} + "/" + str(name)])
    print(json.dumps([report["loss"], report["metric"]["after"]]))
"""


@LONG
def test_a_mesh_gives_the_losses_of_one_device(llama, tmp_path):
  data = tmp_path / "data.txt"
  data.write_text("the cat sat on the mat. " * 20)
  code = MESH.format(model=str(llama), data=str(data), out=str(tmp_path))
  *sharded, single = map(json.loads, support.on_devices(code, devices=4).splitlines())
  for loss, after in sharded:
    # float32 sums over 4 shards in another order, three steps deep
    np.testing.assert_allclose(loss, single[0], rtol=1e-5)
    np.testing.assert_allclose(after, single[1], rtol=1e-5)


def test_options_take_the_types_of_the_signature(finetune):
  options = importlib.import_module("options")
  read = lambda *settings: options.typed_options("lora", pelt.lora, list(settings))
  assert read("targets=query,value", "alpha=16", "rslora=true", "layers=3") == {
    "targets": ("query", "value"),
    "alpha": 16.0,
    "rslora": True,
    "layers": (3,),
  }
  assert read("targets=all-linear", "alpha=none", "layers=(0, 2)") == {
    "targets": "all-linear",
    "alpha": None,
    "layers": (0, 2),
  }
  assert read("rank_pattern={'query': 4}") == {"rank_pattern": {"query": 4}}
  assert isinstance(read("alpha=16")["alpha"], float)


@LONG
def test_the_demo(finetune, tmp_path, monkeypatch):
  """The demo's code paths; its model is made of a few steps here."""
  demo = importlib.import_module("demo")
  monkeypatch.setenv("PELT_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(demo, "STEPS", 3)
  monkeypatch.setattr(demo, "HELD_OUT", 2000)
  monkeypatch.setitem(demo.CONFIG, "num_hidden_layers", 1)
  monkeypatch.setitem(demo.CONFIG, "hidden_size", 16)
  argv = ["--quiet", "--out", str(tmp_path / "out"), "--steps", "3"]
  report = finetune.main(argv)
  assert report["forgetting"]["before"] > 0
  assert [text.startswith(finetune.PROMPT) for text in report["sample"]] == [True, True]
  (made,) = (tmp_path / "cache").iterdir()
  changed = (made / "model.safetensors").stat().st_mtime_ns
  assert demo.folder(progress=False) == made
  assert (made / "model.safetensors").stat().st_mtime_ns == changed


@LONG
def test_the_length_search_picks_the_best_mean(finetune, bert, tmp_path, monkeypatch):
  search = importlib.import_module("prompt_length")
  data = sentiment(tmp_path)
  job = arguments(tmp_path, bert, data, "classification", steps=2, length=12)
  job = [*job[: job.index("--out")], *job[job.index("--out") + 2 :], "--method", "prompt_tuning"]
  asked = ["--lengths", "2", "4", "--seeds", "2", "--out", str(tmp_path / "search")]
  found = search.main([*asked, *job])
  reports = {
    (n, s): json.loads((tmp_path / "search" / f"length-{n}-seed-{s}" / "report.json").read_text())
    for n in (2, 4)
    for s in (0, 1)
  }
  scores = {n: [reports[n, s]["metric"]["after"] for s in (0, 1)] for n in (2, 4)}
  assert found["scores"] == scores and found["best"] == max(scores, key=lambda n: sum(scores[n]))
  for (n, s), report in reports.items():
    assert report["settings"]["length"] == 12 + n and report["seed"] == s
    assert report["parameters"]["stored"] == n * 16
  assert (tmp_path / "search" / "lengths.png").read_bytes().startswith(b"\x89PNG")
  monkeypatch.setattr(finetune, "main", None)  # what is done is not run again
  assert search.main([*asked, *job]) == found
  with pytest.raises(ValueError, match="runs of another job"):
    search.main([*asked, *job, "--lr", "0.5"])
