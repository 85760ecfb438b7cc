"""Encoder-decoders in data, scores and the main job; answers to prompts."""

import importlib
import json
import math

import jax
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from tests.support import REPOSITORY, require
from tests.test_training import tiny

LONG = pytest.mark.parity
BYTES = training.ByteTokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  make = lambda config: tiny.save_seq2seq(tmp_path_factory.mktemp(config["model_type"]), config)
  return {"t5": make(tiny.T5), "bart": make(tiny.BART)}


@pytest.fixture
def finetune(monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
  return importlib.import_module("finetune")


def pairs(*rows):
  examples = (training.Example(i, prompt=p, completion=c) for i, (p, c) in enumerate(rows, 1))
  return training.Examples("file", tuple(examples))


def spelled(folder, text):
  """The ids of a text's bytes alone."""
  return training.load_tokenizer(folder).encode(text).ids


def test_rows_hold_source_and_target_with_their_special_ids(folders):
  data = pairs(("ab", "c"), ("d", "efg"))
  for name, before, after in (("t5", [], [1]), ("bart", [0], [2])):
    tokenizer, ids = (
      training.load_tokenizer(folders[name]),
      lambda t, n=name: spelled(folders[n], t),
    )
    rows = training.encode(data, tokenizer, "seq2seq", virtual=(300, 301), length=8)
    assert rows.rows[0]["input_ids"].tolist() == [300, 301, *before, *ids("ab"), *after]
    assert rows.rows[0]["labels"].tolist() == [*before, *ids("c"), *after]
    assert rows.rows[1]["labels"].tolist() == [*before, *ids("efg"), *after]
    assert (rows.bytes, rows.truncated) == (4, 0)
    rows = training.encode(data, tokenizer, "seq2seq", virtual=(300,), placement="end")
    assert rows.rows[0]["input_ids"].tolist() == [*before, *ids("ab"), 300, *after]


def test_a_cut_source_keeps_its_end_and_a_cut_target_has_none(folders):
  data = pairs(("abcdefgh", "xéyz"))
  rows = training.encode(
    data, training.load_tokenizer(folders["t5"]), "seq2seq", length=6, virtual=(300, 301)
  )
  ids = lambda text: spelled(folders["t5"], text)
  assert rows.rows[0]["input_ids"].tolist() == [300, 301, *ids("abc"), 1]
  assert rows.rows[0]["labels"].tolist() == [*ids("xéyz"), 1]  # 5 bytes and the end fit
  rows = training.encode(data, training.load_tokenizer(folders["t5"]), "seq2seq", length=4)
  assert rows.rows[0]["labels"].tolist() == ids("xéy")
  assert (rows.bytes, rows.truncated) == (4, 1)
  with pytest.raises(training.DataError, match="file:1: 9 tokens, but the model has 6 positions"):
    training.encode(data, training.load_tokenizer(folders["t5"]), "seq2seq", limit=6)


def test_targets_are_padded_to_a_length_of_their_own():
  rows = [("a" * n, "b" * m) for n, m in [(30, 3), (4, 20), (5, 5), (6, 6)]]
  data = training.encode(pairs(*rows), BYTES, "seq2seq")
  # Pooled lengths, targets with their end: 4 4 5 6 6 7 21 30
  assert training.buckets(data) == (8, 32)
  batch = training.collate(data, [0, 2], 3, (8, 32))
  assert batch["input_ids"].shape == (3, 32) and batch["labels"].shape == (3, 8)
  assert batch["labels"][0].tolist() == [101, 101, 101, 2, *[-100] * 4]
  assert (batch["labels"][2] == -100).all() and batch["attention_mask"][2].sum() == 1
  shapes = {(b["input_ids"].shape, b["labels"].shape) for _, b in training.batches(data, 1)}
  assert shapes == {((1, 32), (1, 8)), ((1, 8), (1, 32)), ((1, 8), (1, 8))}


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.jsonl", '{"prompt": "a"}', "a.jsonl:1: seq2seq needs `prompt` and `completion`"),
    ("a.csv", "prompt,label\na,b\n", "a.csv:1: .*does not name prompt,completion"),
    ("a.txt", "words\nwords\n", "a.txt:1: .*does not name prompt,completion"),
  ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(training.DataError, match=message):
    training.read(tmp_path / name, "seq2seq")


def test_tables_name_their_columns(tmp_path):
  (tmp_path / "a.csv").write_text('mr,ref\n"name[X], eat",X is good\n')
  file = training.read(tmp_path / "a.csv", "seq2seq", "prompt=mr,completion=ref")
  assert (file.examples[0].prompt, file.examples[0].completion) == ("name[X], eat", "X is good")


def test_the_task_belongs_to_encoder_decoders(folders):
  with pytest.raises(ValueError, match="task 'lm' .* for t5: seq2seq; .* task='seq2seq'"):
    models.from_pretrained(folders["t5"], task="lm")
  with pytest.raises(ValueError, match="task 'seq2seq' .* for llama: .* task='lm'"):
    models.from_config(tiny.LLAMA, task="seq2seq")


def test_scores_by_hand():
  # 3 of 4 words in the better reference, which has 3 words: precision 3/4, recall 1, F1 6/7.
  found = training.generation_scores(["the cat sat down"], [["a dog ran", "the cat sat"]])
  np.testing.assert_allclose(found["rouge_1"], 6 / 7)
  # Pairs: 2 of 3 against 2.
  np.testing.assert_allclose(found["rouge_2"], 2 * (2 / 3) / (2 / 3 + 1))
  np.testing.assert_allclose(found["rouge_l"], 6 / 7)
  # BLEU: 5/6 4/5 3/4 2/3 of one text and 1/1 of the other in unigrams, and so on; lengths agree.
  found = training.generation_scores(
    ["one two three four five six", "a b c d"],
    [["one two three four five seven"], ["x", "a b c d"]],
  )
  precisions = [(5 + 4) / 10, (4 + 3) / 8, (3 + 2) / 6, (2 + 1) / 4]
  np.testing.assert_allclose(found["bleu"], 100 * math.prod(precisions) ** 0.25, rtol=1e-6)
  with pytest.raises(ValueError, match="2 predictions and 1 lists of references"):
    training.generation_scores(["a", "b"], [["a"]])
  with pytest.raises(ValueError, match=r"references\[1\] must be a list"):
    training.generation_scores(["a", "b"], [["a"], []])


def test_questions_are_distinct_and_keep_all_references(tmp_path):
  file = pairs(("q", "a"), ("r", "b"), ("q", "c"), ("s", "d"), ("t", "e"))
  asked = training.questions(file, BYTES, "lm", virtual=(300,), placement="after_first")
  assert [q.prompt for q in asked] == ["q", "r", "s", "t"]
  assert asked[0] == training.Question("q", [1, 300, 116, 13], ("a", "c"))  # "q" and a line's end
  assert [q.prompt for q in training.questions(file, BYTES, "lm", most=2)] == ["q", "s"]
  with pytest.raises(training.DataError, match="file:3: running text has no prompt"):
    training.questions(training.Examples("file", (training.Example(3, text="abc"),)), BYTES, "lm")
  with pytest.raises(ValueError, match="task='tagging'"):
    training.questions(file, BYTES, "tagging")


def test_a_conversation_asks_for_its_last_turn(tmp_path):
  tokenizer = training.load_tokenizer(tiny.save_llama(tmp_path))
  say = lambda role, content: {"role": role, "content": content}
  talk = (say("user", "hi"), say("assistant", "yes"), say("user", "2+2"), say("assistant", "4"))
  file = training.Examples("file", (training.Example(1, messages=talk),))
  (asked,) = training.questions(file, tokenizer, "lm")
  assert asked.references == ("4",) and asked.prompt == "2+2"
  # What stands before the answer in training is what is asked.
  (row,) = training.encode(file, tokenizer, "lm").rows
  answer = len(tokenizer.encode("4<|im_end|>").ids)
  first = np.flatnonzero(row["labels"] != -100)[-answer]
  assert row["input_ids"][: first + 1].tolist() == asked.ids


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=LONG)])
def test_a_batch_of_answers_equals_single_ones(beams):
  model, params = tiny.llama(seed=3)
  params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)  # tokens that differ
  file = pairs(*[("p" * n, "x") for n in (3, 20, 1, 9, 2)])
  asked = training.questions(file, BYTES, "lm")
  write = lambda asked, size: training.Writer(
    model.apply, asked, BYTES, size=size, max_new_tokens=6, beams=beams
  )(params)
  together = write(asked, 2)
  assert together == [write([question], 1)[0] for question in asked]
  assert len(set(together)) > 1


def run(finetune, folder, tmp_path, method="lora", **options):
  data = tmp_path / "data.jsonl"
  rows = [{"prompt": f"say {w}", "completion": w} for w in ("ab", "cd", "ef", "ab", "gh", "cd")]
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = [f for n, v in options.items() if v is not True for f in (f"--{n}", str(v))]
  flags += [f"--{n}" for n, v in options.items() if v is True]
  return finetune.main(
    [
      *("--quiet", "--model", str(folder), "--task", "seq2seq", "--method", method, "--batch", "3"),
      *("--train", str(data), "--eval", str(data), "--out", str(tmp_path / "out"), *flags),
    ]
  )


def check(report, folder, tmp_path, scan=False):
  before, after = report["scores"]["before"], report["scores"]["after"]
  assert report["metric"]["name"] == "loss" and after["loss"] < before["loss"]
  assert report["writing"]["prompts"] == 4
  assert set(report["writing"]["scores"]["after"]) == {"bleu", "rouge_1", "rouge_2", "rouge_l"}
  assert "Answers to held-out prompts" in (tmp_path / "out" / "report.md").read_text()
  # What was saved is what was scored.
  model, base = models.from_pretrained(folder, task="seq2seq", scan=scan)
  params = pelt.load(tmp_path / "out" / "adapter", base)
  file = training.read(tmp_path / "data.jsonl", "seq2seq")
  tokenizer = training.load_tokenizer(folder)
  rows = training.encode(file, tokenizer, "seq2seq", virtual=pelt.virtual_tokens(params))
  scores = training.evaluate(pelt.bypass(model.apply), params, rows, 3)
  np.testing.assert_allclose(scores["loss"], after["loss"], rtol=1e-5)


@pytest.mark.parity
def test_the_main_job(finetune, folders, tmp_path):
  options = {"steps": 8, "lr": 0.03, "new-tokens": 4, "write": 4}
  report = run(finetune, folders["t5"], tmp_path, **options)
  check(report, folders["t5"], tmp_path)


@LONG
@pytest.mark.parametrize(
  ("name", "method", "scan"),
  [
    ("t5", "full", False),
    ("t5", "prefix_tuning", True),
    ("t5", "prompt_tuning", False),
    ("bart", "lora", True),
    ("bart", "prefix_tuning", False),
    ("bart", "prompt_tuning", True),
  ],
)
def test_every_method_learns(finetune, folders, tmp_path, name, method, scan):
  rate = 0.3 if method == "prompt_tuning" else 0.03
  options = {"steps": 30, "lr": rate, "new-tokens": 4, "beams": 2} | (
    {"scan": True} if scan else {}
  )
  if method != "full":
    options["set"] = {"lora": "targets=all-linear"}.get(method, "length=3")
  report = run(finetune, folders[name], tmp_path, method, **options)
  check(report, folders[name], tmp_path, scan)


def test_bad_options_are_named(finetune, folders, tmp_path):
  with pytest.raises(ValueError, match="--write: a model of --task tagging writes nothing"):
    finetune.main(
      ["--task", "tagging", "--write", "3", "--model", "x", "--train", "x", "--eval", "x"]
    )
  with pytest.raises(ValueError, match="--new-tokens 0: expected a positive number"):
    run(finetune, folders["t5"], tmp_path, **{"new-tokens": 0})


@LONG
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_losses_are_those_of_transformers(folders, name):
  require("torch")
  require("transformers")
  import torch
  from transformers import AutoModelForSeq2SeqLM

  rows = pairs(("abc", "de"), ("f", "ghij"))
  data = training.encode(rows, training.load_tokenizer(folders[name]), "seq2seq")
  batch = training.collate(data, [0, 1], 2, (8,))
  theirs = AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval()
  want = theirs(**{k: torch.tensor(v, dtype=torch.long) for k, v in batch.items()}).loss.item()
  model, params = models.from_pretrained(folders[name], task="seq2seq")
  got, aux = training.LOSSES["seq2seq"](model.apply, params, batch, None)
  assert int(aux["weight"]) == sum(len(row["labels"]) for row in data.rows)
  np.testing.assert_allclose(float(got), want, rtol=1e-5)  # float32, a few hundred terms
