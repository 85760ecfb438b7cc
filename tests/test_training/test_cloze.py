"""Templates, verbalizers, and classification by filling a blank."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from tests import support
from tests.test_training import tiny
from tests.test_training.test_encode import BYTES, bert, ids, texts  # noqa: F401

Template = training.Template


def fill(source, text, tokenizer, **options):
  template = Template(source)
  virtual = range(900, 900 + template.virtual)
  return template.fill(text, tokenizer, virtual, **options)


@pytest.mark.parametrize(("source", "want", "at"), [
  ("{text}", [2, 6, 7, 3], None),
  ("{p:2} {text} {p} [MASK] {p:1}.", [2, 900, 901, 6, 7, 902, 4, 903, 9, 3], 5 + 1),
  ("[MASK]{p:1}: {text}", [2, 4, 900, 1, 6, 7, 3], 1),
  ("a {text}{text_like}", None, None),
])  # fmt: skip
def test_a_template_puts_everything_in_its_place(bert, source, want, at):  # noqa: F811
  if want is None:
    with pytest.raises(ValueError, match="{text_like} means nothing"):
      Template(source)
    return
  assert fill(source, "bad word", bert, mask=4) == (want, at, False)


def test_white_space_is_a_sentences(tmp_path):
  tiny.save_llama(tmp_path)
  tokenizer = training.load_tokenizer(tmp_path)
  text = lambda source: tokenizer.decode(fill(source, "so so", tokenizer).ids)
  assert text("{p:3}  {text} It was{p} [MASK]") == "so so It was"
  assert text("{text}. [MASK]") == "so so."
  # Slots leave no trace: what is left reads on.
  with_slots, plain = Template("{p:2} {text} {p:2} was [MASK]"), Template("{text} was [MASK]")
  assert with_slots.plain.fill("a", tokenizer).ids == plain.fill("a", tokenizer).ids
  ids = with_slots.fill("a", tokenizer, range(900, 904)).ids
  assert [i for i in ids if i < 900] == plain.fill("a", tokenizer).ids


def test_the_text_is_cut_and_nothing_else(bert):  # noqa: F811
  source = "{p:2} {text} {p:1} [MASK] ."
  whole = fill(source, "a bad word a bad word", bert, mask=4, room=14)
  assert whole == ([2, 900, 901, 5, 6, 7, 5, 6, 7, 902, 4, 9, 3], 10, False)
  cut = fill(source, "a bad word a bad word", bert, mask=4, room=11)
  assert cut == ([2, 900, 901, 5, 6, 7, 5, 902, 4, 9, 3], 8, True)
  with pytest.raises(ValueError, match="takes 7 tokens .* leaves 3 of 10 .* raise length"):
    fill(source, "a", bert, mask=4, room=10)


@pytest.mark.parametrize(("source", "match"), [
  ("no place", "{text} is missing"),
  ("{text} {text}", "comes more than once"),
  ("{text} [MASK] [MASK]", "comes more than once"),
  ("{p:0} {text}", "{p:0} means nothing"),
  ("{text} [mask]", r"the blank is written \[MASK\]"),
  ("{{p}} {text}", "braces hold text or p:N alone"),
])  # fmt: skip
def test_bad_templates(source, match):
  with pytest.raises(ValueError, match=match):
    Template(source)


def test_slots_and_tokens_agree(bert):  # noqa: F811
  with pytest.raises(ValueError, match="slots for 3 virtual tokens, and the prompt has 2"):
    Template("{p:3} {text}").fill("a", bert, range(2))
  with pytest.raises(ValueError, match="a decoder is asked for the next token"):
    Template("[MASK] {text}").fill("a", BYTES)


def test_a_blank_of_a_decoder_is_its_next_token():
  filled = fill("{p:1} {text} was [MASK]", "it", BYTES)
  assert filled.ids == [1, 900, *ids("it was")] and filled.at == len(filled.ids) - 1
  words = {"neg": "n", "pos": ("p", "P")}
  # The blank's space is part of the word, which of bytes is a token too many.
  with pytest.raises(ValueError, match="'n' is 2 tokens in the blank"):
    training.verbalizer(words, ("neg", "pos"), BYTES, Template("{text} [MASK]"))
  assert training.verbalizer(words, ("pos", "neg"), BYTES, Template("{text}=[MASK]")) == (
    (ord("p") + 3, ord("P") + 3),
    (ord("n") + 3,),
  )


@pytest.mark.parametrize(("words", "match"), [
  ({"0": "a"}, r"no word for the classes \['1'\]"),
  ({"0": "a", "1": "bad", "2": "."}, r"\['2'\] are no classes"),
  ({"0": "a", "1": "a"}, "'a' of the class '1' is the same token as 'a' of the class '0'"),
  ({"0": "a", "1": []}, "for the class '1'"),
  ({"0": "a", "1": ["bad", " "]}, "or an empty one, for the class '1'"),
  ({"0": "a", "1": "badly"}, "'badly' is 2 tokens in the blank"),
])  # fmt: skip
def test_bad_verbalizers(bert, words, match):  # noqa: F811
  with pytest.raises(ValueError, match=match):
    training.verbalizer(words, ("0", "1"), bert, Template("{text} [MASK]"))
  with pytest.raises(ValueError, match=r"has no \[MASK\]"):
    training.verbalizer({"0": "a", "1": "bad"}, ("0", "1"), bert, Template("{text}"))


def labelled(*rows):
  examples = (
    training.Example(i, text=text, label=label) for i, (text, label) in enumerate(rows, 1)
  )
  return training.Examples("file", tuple(examples))


def test_rows_carry_the_blank(bert):  # noqa: F811
  file = labelled(("a bad word", "0"), ("word", "1"))
  encode = lambda **options: training.encode(
    file, bert, "classification", labels=("0", "1"), **options
  )
  data = encode(template=Template("{text} {p:1} [MASK]"), virtual=[900], mask=4)
  assert [row["at"].item() for row in data.rows] == [5, 3]
  ((_, batch),) = training.batches(data, 3)
  assert batch["at"].tolist() == [3, 5, 0] and batch["labels"].tolist() == [1, 0, IGNORE]
  assert batch["input_ids"][1, batch["at"][1]] == 4
  cut = encode(template=Template("{text} [MASK]"), mask=4, length=8)
  assert cut.truncated == 0
  long = labelled(("a bad word a bad word a bad word", "0"), ("word", "1"))
  with pytest.raises(training.DataError, match="file:1: in its template .*`--length 9`"):
    training.encode(
      long, bert, "classification", labels=("0", "1"), template=Template("{text}"), limit=9
    )
  with pytest.raises(ValueError, match="is for classification, the task is 'lm'"):
    training.encode(texts("a"), BYTES, "lm", template=Template("{text}"))


IGNORE = -100


def test_scores_are_the_words_mean_logits():
  """score(c) = mean of the logits of c's words at the blank, against numpy; gradients too."""
  model, params = tiny.llama()
  batch = {"input_ids": jnp.array([[1, 70, 80, 0], [1, 90, 0, 0]]), "at": jnp.array([2, 1])}
  batch["attention_mask"] = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
  batch["labels"] = jnp.array([1, 0])
  apply = pelt.bypass(model.apply)
  words = ((10, 20), (30,), (40, 50, 60))
  classify = training.cloze(apply, words)
  logits = np.asarray(apply({"params": params}, batch["input_ids"], batch["attention_mask"]))
  asked = logits[[0, 1], [2, 1]]
  want = np.stack([asked[:, list(w)].mean(1) for w in words], 1)
  inputs = {k: batch[k] for k in ("at", "attention_mask")}
  np.testing.assert_allclose(
    classify({"params": params}, batch["input_ids"], **inputs), want, atol=1e-6
  )
  loss, aux = training.cross_entropy(classify, params, batch)
  chances = np.exp(want) / np.exp(want).sum(1, keepdims=True)
  np.testing.assert_allclose(loss, -np.log(chances[[0, 1], [1, 0]]).mean(), atol=1e-6)
  assert aux["predictions"].tolist() == want.argmax(1).tolist()
  with pytest.raises(ValueError, match="at least two classes"):
    training.cloze(apply, ((1, 2),))


def test_a_hard_template_equals_virtual_tokens_with_its_words_rows(bert):  # noqa: F811
  """P-Tuning whose encoder is left out and whose tokens are words: the discrete template."""
  model = models.from_config(tiny.BERT, task="cloze")
  assert isinstance(model, models.BertForMaskedLM)
  ids_ = jnp.zeros((1, 4), jnp.int32)
  base = model.init(jax.random.key(0), ids_)["params"]
  method = pelt.prompt_tuning(3, init="text", tokens=[5, 6, 9])
  params = method.init(jax.random.key(1), base, pelt.sites(model, ids_))
  virtual = pelt.virtual_tokens(params)
  soft = Template("{p:2} {text} {p:1} [MASK]").fill("word", bert, virtual, 4)
  hard = Template("a bad {text} . [MASK]").fill("word", bert, (), 4)
  assert soft.at == hard.at
  apply = pelt.bypass(model.apply)
  run = lambda params, filled: apply({"params": params}, jnp.array([filled.ids]))
  np.testing.assert_array_equal(run(params, soft), run(base, hard))


@pytest.fixture
def options(monkeypatch):
  monkeypatch.syspath_prepend(str(support.REPOSITORY / "experiments"))
  return importlib.import_module("options")


@pytest.fixture
def finetune(options):
  return importlib.import_module("finetune")


FILMS = [("the film is very good .", "pos"), ("the plot is not good .", "neg")] * 8


def arguments(tmp_path, folder, *more, steps=8):
  data = tmp_path / "data.csv"
  data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in FILMS))
  return [
    *("--quiet", "--model", str(folder), "--task", "classification", "--train", str(data)),
    *("--eval", str(data), "--steps", str(steps), "--batch", "4", "--out", str(tmp_path / "out")),
    *more,
  ]


@pytest.mark.parity
def test_the_main_job_fills_blanks(finetune, tmp_path):
  folder = tiny.save_bert(tmp_path / "bert", task="mlm", spread=0.5)
  report = finetune.main(
    arguments(
      tmp_path,
      folder,
      *("--method", "p_tuning", "--lr", "0.05", "--verbalizer", "pos=good|fine,neg=bad"),
      *("--template", "{p:2} {text} {p:1} [MASK]"),
      steps=4,
    )
  )
  assert report["metric"]["name"] == "accuracy"
  assert report["parameters"]["stored"] == 3 * 16 and report["parameters"]["head"] in (None, 0)
  assert json.loads((tmp_path / "out" / "adapter" / "template.json").read_text()) == {
    "template": "{p:2} {text} {p:1} [MASK]",
    "verbalizer": {"pos": ["good", "fine"], "neg": ["bad"]},
  }
  # The report's figure, from the files alone.
  model, base = models.from_pretrained(folder, task="cloze")
  params = pelt.load(tmp_path / "out" / "adapter", base)
  tokenizer, template = training.load_tokenizer(folder), Template("{p:2} {text} {p:1} [MASK]")
  labels = tuple(json.loads((tmp_path / "out" / "adapter" / "labels.json").read_text()))
  words = training.verbalizer({"pos": ["good", "fine"], "neg": "bad"}, labels, tokenizer, template)
  classify = training.cloze(pelt.bypass(model.apply), words)
  for when, tree, written in (("before", base, template.plain), ("after", params, template)):
    rows = training.encode(
      labelled(*FILMS),
      tokenizer,
      "classification",
      labels=labels,
      template=written,
      virtual=pelt.virtual_tokens(tree),
      mask=tokenizer.mask,
    )
    scores = training.evaluate(classify, tree, rows, 4)
    np.testing.assert_allclose(scores["loss"], report["scores"][when]["loss"], rtol=1e-5)
  assert report["scores"]["before"]["loss"] != report["scores"]["after"]["loss"]


@pytest.mark.parity
@pytest.mark.parametrize("more", [
  ("--method", "lora", "--template", "{text}=[MASK]"),
  ("--method", "prompt_tuning", "--template", "{p:3}{text}{p:2}=[MASK]", "--set", "init=labels"),
  ("--method", "prompt_tuning", "--template", "{p:4}{text}=[MASK]", "--init-text", "ab"),
])  # fmt: skip
def test_the_main_job_asks_a_decoder(finetune, tmp_path, more):
  folder = tiny.save_llama(tmp_path / "llama", spread=0.5)
  config = json.loads((folder / "tokenizer_config.json").read_text())
  config["mask_token"] = "<pad>"  # a decoder has no use for it
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  words = ("--verbalizer", json.dumps({"pos": "p", "neg": "n"}), "--lr", "0.03")
  report = finetune.main(arguments(tmp_path, folder, *more, *words, steps=20))
  assert report["scores"]["after"]["loss"] < report["scores"]["before"]["loss"] - 0.05


@pytest.mark.parametrize(("more", "match"), [
  (("--verbalizer", "pos=a,neg=b"), "needs a --template"),
  (("--template", "{text} [MASK]"), "go together"),
  (("--template", "{p:2} {text}", "--method", "lora"), "lora makes none"),
  (("--template", "{text}", "--method", "p_tuning"), "p_tuning makes some: write them as {p:3}"),
  (("--template", "{text}", "--placement", "end"), "leave --placement out"),
  (("--template", "{text}", "--task", "lm"), "is for --task classification, not for lm"),
  (("--init-text", "a"), "--init-text is for prompt_tuning and p_tuning, not for lora"),
  (("--method", "prompt_tuning", "--set", "init=text"), "pass --init-text"),
  (("--method", "prompt_tuning", "--set", "init=normal", "--init-text", "a"), "from another"),
  (("--placement", "end"), "--method lora has no virtual tokens to place"),
  (("--beams", "3"), "it goes with --write"),
  (("--method", "prompt_tuning", "--init-text", " "), "--init-text is empty"),
  (("--method", "p_tuning", "--set", "encoder=gru"), "expected 'lstm' or 'mlp' or 'none'"),
  (("--method", "prefix_tuning", "--set", "reparametrize=no"), "expected true or false"),
  (("--template", "{text}[MASK]", "--verbalizer", "nowhere.json"), "no such file"),
  (("--template", "{text}[MASK]", "--verbalizer", "{1"), "not JSON"),
  (("--template", "{text}[MASK]", "--verbalizer", '{"a": 1}'), "expected {"),
  (("--template", "{text}[MASK]", "--verbalizer", "a=b,a=c"), "a class comes twice"),
])  # fmt: skip
def test_options_that_do_not_fit(options, tmp_path, more, match):
  with pytest.raises(ValueError, match=match):
    args = options.parse(arguments(tmp_path, tmp_path, *more), None)
    options.check_arguments(args, False)
    options.build_method(args)
