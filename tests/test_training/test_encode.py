"""Tokenizing, alignment of targets, and packing."""

import json

import numpy as np
import pytest
import tokenizers

from pelt_jax import training

BYTES = training.ByteTokenizer()
IGNORE = -100


def file_of(**fields):
  return training.Examples("file", (training.Example(7, **fields),))


def texts(*parts):
  examples = (training.Example(i, text=part) for i, part in enumerate(parts, 1))
  return training.Examples("file", tuple(examples))


def ids(text):
  return [b + 3 for b in text.encode()]


@pytest.fixture
def bert(tmp_path):
  """A WordPiece tokenizer in the form of an old BERT folder."""
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bad", "word", "##ly", "."]
  (tmp_path / "vocab.txt").write_text("\n".join(words))
  config = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  return training.load_tokenizer(tmp_path)


def test_bytes_round_trip():
  pieces = BYTES.encode("aé")
  assert pieces.ids == [100, 198, 172]
  assert pieces.spans == [(0, 1), (1, 2), (1, 2)]
  assert BYTES.decode([1, *pieces.ids, 2, 0]) == "aé"


def test_running_text_predicts_every_byte_once():
  data = training.encode(texts("abcdefg"), BYTES, "lm", length=4)
  first, second = data.rows
  assert first["input_ids"].tolist() == [1, *ids("abc")]
  assert first["labels"].tolist() == ids("abcd")
  assert second["input_ids"].tolist() == [1, *ids("ef")]
  assert second["labels"].tolist() == ids("efg")
  assert data.bytes == 7


def test_text_without_a_first_token_predicts_all_but_one():
  plain = training.ByteTokenizer(bos=None, eos=None, adds_bos=False)
  data = training.encode(texts("éabcdef"), plain, "lm", length=4)
  stream = ids("éabcdef")
  assert [row["input_ids"].tolist() for row in data.rows] == [stream[:4], stream[4:7]]
  assert [row["labels"].tolist() for row in data.rows] == [stream[1:5], stream[5:8]]
  assert data.bytes == 6  # the é's two bytes are one character, which the first token begins


def test_several_texts_end_and_are_packed_apart():
  data = training.encode(texts("abc", "d", "ef"), BYTES, "lm", length=5)
  assert [row["segment_ids"].tolist() for row in data.rows] == [[1, 1, 1, 1, 0], [1, 1, 2, 2, 2]]
  row = data.rows[1]
  assert row["input_ids"].tolist() == [1, *ids("d"), 1, *ids("ef")]
  assert row["labels"].tolist() == [*ids("d"), 2, *ids("ef"), 2]
  assert row["position_ids"].tolist() == [0, 1, 0, 1, 2]
  assert data.bytes == 6


def test_packing_fills_rows_and_loses_nothing():
  rng = np.random.default_rng(0)
  parts = [
    training.Segment(np.full(n, i, np.int32), np.arange(n, dtype=np.int32))
    for i, n in enumerate(rng.integers(1, 20, 200))
  ]
  rows = training.pack(parts, 20, -1, IGNORE)
  seen = np.concatenate([row["input_ids"] for row in rows])
  total = sum(len(p.inputs) for p in parts)
  assert np.bincount(seen[seen >= 0]).tolist() == [len(p.inputs) for p in parts]
  assert len(rows) <= 1.07 * total / 20
  for row in rows:
    assert ((row["labels"] == IGNORE) == (row["segment_ids"] == 0)).all()
  with pytest.raises(ValueError, match="20 tokens does not fit rows of 19"):
    training.pack([training.Segment(np.zeros(20), np.zeros(20))], 19, 0, IGNORE)


def test_only_the_completion_is_learnt():
  data = training.encode(file_of(prompt="ab", completion="cd"), BYTES, "lm")
  (row,) = data.rows
  assert row["input_ids"].tolist() == [1, *ids("ab\ncd")]
  assert row["labels"].tolist() == [IGNORE] * 3 + [*ids("cd"), 2]
  assert data.bytes == 2


TEMPLATE = (
  "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|end|\n{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = (
  {"role": "user", "content": "hi there"},
  {"role": "assistant", "content": "yes ."},
  {"role": "user", "content": "why"},
  {"role": "assistant", "content": "no"},
)


@pytest.fixture
def chat(tmp_path):
  """A tokenizer of words with a chat template."""
  words = ["<pad>", "<unk>", "<user>", "<assistant>", "|end|", "hi", "there", "yes", ".", "why"]
  vocabulary = {word: i for i, word in enumerate([*words, "no"])}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(["<user>", "<assistant>", "|end|"])
  backend.save(str(tmp_path / "tokenizer.json"))
  config = {"chat_template": TEMPLATE, "eos_token": "|end|", "pad_token": {"content": "<pad>"}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  return training.load_tokenizer(tmp_path)


def test_assistants_turns_and_their_ends_are_learnt(chat):
  assert chat.render(CHAT[:1], prompt=True) == "<user>hi there|end|\n<assistant>"
  (row,) = training.encode(file_of(messages=CHAT), chat, "lm").rows
  #    <user> hi there |end| <assistant> yes . |end| <user> why |end| <assistant> no |end|
  stream = [2, 5, 6, 4, 3, 7, 8, 4, 2, 9, 4, 3, 10, 4]
  assert row["input_ids"].tolist() == stream[:-1]
  learnt = {5, 6, 7, 12, 13}  # the line break after |end| is no token of this tokenizer
  assert row["labels"].tolist() == [
    stream[t] if t in learnt else IGNORE for t in range(1, len(stream))
  ]


def test_chat_template_errors_name_the_line(chat, bert):
  with pytest.raises(training.DataError, match="file:7: .*no chat template"):
    training.encode(file_of(messages=CHAT), bert, "lm")
  with pytest.raises(training.DataError, match="file:7: .*no chat template"):
    training.encode(file_of(messages=CHAT), BYTES, "lm")
  for template, message in (
    ("{{ raise_exception('roles must alternate') }}", "refuses .*roles must alternate"),
    ("{{ messages[0]['content'] }}{{ messages|length }}", "turn by turn"),
    ("{{ messages.__class__.__mro__ }}", "refuses|unsafe"),
    ("{% for %}", "does not compile"),
  ):
    broken = training.FolderTokenizer(**{**vars_of(chat), "template": template})
    with pytest.raises(training.DataError, match=f"file:7: .*({message})"):
      training.encode(file_of(messages=CHAT), broken, "lm")


def vars_of(tokenizer):
  return {name: getattr(tokenizer, name) for name in tokenizer.__dataclass_fields__}


def test_too_long_is_an_error_unless_a_length_says_where_to_cut(chat):
  with pytest.raises(training.DataError, match=r"file:7: 13 tokens.*10 positions.*--length 10"):
    training.encode(file_of(messages=CHAT), chat, "lm", limit=10)
  data = training.encode(file_of(messages=CHAT), chat, "lm", length=9, limit=10)
  assert data.truncated == 1 and data.lengths().tolist() == [9]
  with pytest.raises(ValueError, match="length=11: the model has 10 positions"):
    training.encode(file_of(messages=CHAT), chat, "lm", length=11, limit=10)
  with pytest.raises(training.DataError, match="no token is left"):
    training.encode(file_of(messages=CHAT), chat, "lm", length=4)


def test_classification_keeps_the_closing_token_when_cut(bert):
  examples = file_of(text="a badly word .", label="y")
  full = training.encode(examples, bert, "classification", labels=("n", "y"))
  assert full.rows[0]["input_ids"].tolist() == [2, 5, 6, 8, 7, 9, 3]
  assert full.rows[0]["labels"] == 1
  cut = training.encode(examples, bert, "classification", labels=("n", "y"), length=5)
  assert cut.rows[0]["input_ids"].tolist() == [2, 5, 6, 8, 3]
  assert cut.truncated == 1
  with pytest.raises(training.DataError, match=r"file:7: 7 tokens, but the model has 6"):
    training.encode(examples, bert, "classification", labels=("n", "y"), limit=6)


def test_labels_of_evaluation_must_be_known(bert):
  with pytest.raises(training.DataError, match=r"file:7: label 'x' .*\['n', 'y'\]"):
    training.encode(file_of(text="a", label="x"), bert, "classification", labels=("n", "y"))
  with pytest.raises(training.DataError, match="file:7: label 'B-x'"):
    training.encode(file_of(tokens=("a",), tags=("B-x",)), bert, "tagging", labels=("B-y", "O"))


def test_first_pieces_carry_the_tags(bert):
  examples = file_of(tokens=("badly", "a", "\u200b", "wordly"), tags=("B-x", "O", "O", "I-x"))
  labels = ("B-x", "I-x", "O")
  data = training.encode(examples, bert, "tagging", labels=labels)
  (row,) = data.rows
  assert row["input_ids"].tolist() == [2, 6, 8, 5, 7, 8, 3]
  assert row["labels"].tolist() == [IGNORE, 0, IGNORE, 2, 1, IGNORE, IGNORE]
  assert data.tags[0][1].tolist() == [1, 3, -1, 4]
  cut = training.encode(examples, bert, "tagging", labels=labels, length=5)
  assert cut.rows[0]["input_ids"].tolist() == [2, 6, 8, 5, 3]
  assert cut.tags[0][1].tolist() == [1, 3, -1, -1]
  plain = training.encode(examples, BYTES, "tagging", labels=labels)
  assert plain.tags[0][1].tolist() == [0, 6, 8, 12]
  assert plain.rows[0]["labels"][[0, 6, 8, 12]].tolist() == [0, 2, 2, 1]


def test_folder_without_a_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no vocab.txt"):
    training.load_tokenizer(tmp_path)


def test_real_tokenizers(stories, shared_data):
  tokenizer = training.load_tokenizer(stories)
  assert tokenizer.adds_bos and tokenizer.bos == 1
  examples = training.read(shared_data / "tinystories" / "tinystories.txt", "lm")
  part = training.Examples("part", (training.Example(1, text=examples.examples[0].text[:5000]),))
  data = training.encode(part, tokenizer, "lm", length=256, limit=512)
  joined = np.concatenate([row["labels"] for row in data.rows])
  assert tokenizer.decode(joined) == part.examples[0].text
  assert all(row["input_ids"][0] == 1 for row in data.rows)


VIRTUAL = range(300, 302)


def test_virtual_tokens_stand_before_text_and_change_no_target():
  plain = training.encode(texts("abcdefg"), BYTES, "lm", length=4)
  data = training.encode(texts("abcdefg"), BYTES, "lm", length=6, virtual=VIRTUAL)
  for row, before in zip(data.rows, plain.rows, strict=True):
    assert row["input_ids"].tolist() == [300, 301, *before["input_ids"]]
    assert row["labels"].tolist() == [IGNORE, IGNORE, *before["labels"]]
  assert data.bytes == plain.bytes
  first = training.encode(
    texts("ab"), BYTES, "lm", length=6, virtual=VIRTUAL, placement="after_first"
  )
  assert first.rows[0]["input_ids"].tolist() == [1, 300, 301, *ids("a")]
  # What BOS predicted is still predicted from where it stands.
  assert first.rows[0]["labels"].tolist() == [*ids("a"), IGNORE, IGNORE, *ids("b")]


def test_each_packed_text_has_its_own_virtual_tokens():
  data = training.encode(texts("abc", "d", "ef"), BYTES, "lm", length=12, virtual=VIRTUAL)
  assert sum(row["segment_ids"].max() for row in data.rows) == 3 > len(data.rows)
  for row in data.rows:
    starts = np.flatnonzero(row["position_ids"] == 0)[: row["segment_ids"].max()]
    assert (row["input_ids"][starts] == 300).all() and (row["input_ids"][starts + 1] == 301).all()


def test_virtual_tokens_at_the_end_of_a_prompt_predict_its_completion():
  example = file_of(prompt="ab", completion="cd")
  (row,) = training.encode(example, BYTES, "lm", virtual=VIRTUAL, placement="end").rows
  assert row["input_ids"].tolist() == [1, *ids("ab\n"), 300, 301, *ids("cd")]
  assert row["labels"].tolist() == [IGNORE] * 5 + [*ids("cd"), 2]
  (row,) = training.encode(example, BYTES, "lm", virtual=VIRTUAL).rows
  assert row["input_ids"].tolist() == [300, 301, 1, *ids("ab\ncd")]
  assert row["labels"].tolist() == [IGNORE] * 5 + [*ids("cd"), 2]


@pytest.mark.parametrize(
  ("placement", "want"),
  [
    ("start", [20, 21, 2, 5, 6, 3]),
    ("after_first", [2, 20, 21, 5, 6, 3]),
    ("end", [2, 5, 6, 20, 21, 3]),
  ],
)
def test_placements_among_special_tokens(bert, placement, want):
  example = file_of(text="a bad", label="y")
  (row,) = training.encode(
    example,
    bert,
    "classification",
    labels=("n", "y"),
    virtual=range(20, 22),
    placement=placement,
  ).rows
  assert row["input_ids"].tolist() == want and row["labels"] == 1


@pytest.mark.parametrize("placement", training.PLACEMENTS)
def test_tags_stay_on_their_words(bert, placement):
  example = file_of(tokens=("bad", "wordly", "."), tags=("A", "B", "A"))
  data = training.encode(
    example, bert, "tagging", labels=("A", "B"), virtual=VIRTUAL, placement=placement
  )
  plain = training.encode(example, bert, "tagging", labels=("A", "B"))
  (row,), (before,) = data.rows, plain.rows
  kept = row["input_ids"] < 300
  np.testing.assert_array_equal(row["input_ids"][kept], before["input_ids"])
  np.testing.assert_array_equal(row["labels"][kept], before["labels"])
  assert (row["labels"][~kept] == IGNORE).all()
  ((_, at),), ((_, old),) = data.tags, plain.tags
  np.testing.assert_array_equal(row["input_ids"][at], before["input_ids"][old])


def test_virtual_tokens_need_room_and_a_place(bert):
  example = file_of(text="a", label="y")
  options = dict(labels=("n", "y"), virtual=VIRTUAL)
  with pytest.raises(ValueError, match="2 virtual tokens leave no room for text: length is 5"):
    training.encode(example, bert, "classification", length=5, **options)
  with pytest.raises(
    ValueError, match="leave no room for text: the number of the model's positions is 5"
  ):
    training.encode(example, bert, "classification", limit=5, **options)
  with pytest.raises(ValueError, match="placement must be one of"):
    training.encode(example, bert, "classification", placement="middle", **options)
  with pytest.raises(ValueError, match="placement='end': running text has no end token"):
    training.encode(texts("abc"), BYTES, "lm", virtual=VIRTUAL, placement="end")
