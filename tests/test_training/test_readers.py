"""Readers: what each format means, and errors that name file and line."""

import json

import pytest

from pelt_jax import training


def write(tmp_path, name, text, encoding="utf-8"):
  path = tmp_path / name
  path.write_bytes(text.encode(encoding))
  return path


def lines(*rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


def fields(examples, *names):
  return [tuple(getattr(e, n) for n in names) for e in examples]


OBJECTS = lines({"text": 'x "y', "label": 1}) + "\n" + lines({"text": "z", "label": 0})


@pytest.mark.parametrize(
  ("name", "text", "columns"),
  [
    ("a.jsonl", OBJECTS, None),
    ("a.csv", 'label,text\n1,"x ""y"\n0,z\n', None),
    ("a.csv", '"x ""y",1\nz,0\n', "text,label"),
    ("a.csv", 'n,q,c\n9,"x ""y",1\n9,z,0\n', "text=q,label=c"),
    ("a.csv", '9,"x ""y",1\n9,z,0\n', "-,text,label"),
    ("a.tsv", 'x "y\t1\nz\t0\n', None),
    ("a.tsv", 'sentence\tlabel\r\nx "y\t1\r\nz\t0\r\n', None),
    ("a.all", '1 x "y\n0 z\n', None),
  ],
)
def test_formats_of_classification_agree(tmp_path, name, text, columns):
  examples = training.read(write(tmp_path, name, text), "classification", columns)
  assert fields(examples, "text", "label") == [('x "y', "1"), ("z", "0")]
  assert training.label_list(examples) == ("0", "1")


def test_lines_are_counted_over_quoted_line_breaks(tmp_path):
  path = write(tmp_path, "a.csv", 'text,label\n"x\ny",1\nz,0\n')
  assert fields(training.read(path, "classification"), "line", "text") == [(2, "x\ny"), (4, "z")]


def test_conll(tmp_path):
  text = "-DOCSTART- -X- O\n\nAda NNP B-person\nsleeps VB O\n\n\nOslo NNP B-place\n"
  examples = training.read(write(tmp_path, "a.conll", text), "tagging")
  assert fields(examples, "line", "tokens", "tags") == [
    (3, ("Ada", "sleeps"), ("B-person", "O")),
    (7, ("Oslo",), ("B-place",)),
  ]
  same = lines({"tokens": ["Ada", "sleeps"], "tags": ["B-person", "O"]})
  (example,) = training.read(write(tmp_path, "a.jsonl", same), "tagging")
  assert example.tags == ("B-person", "O")


def test_plain_text_is_one_example_and_objects_are_not_text(tmp_path):
  assert fields(training.read(write(tmp_path, "a.txt", "{ not\nJSON"), "lm"), "text") == [
    ("{ not\nJSON",)
  ]
  chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
  (example,) = training.read(write(tmp_path, "b.txt", lines({"messages": chat})), "lm")
  assert example.messages == tuple(chat)


def test_latin1_where_the_file_is_no_utf8(tmp_path):
  path = write(tmp_path, "a.txt", "LOC Où est Nîmes ?\n", "latin-1")
  assert fields(training.read(path, "classification"), "text") == [("Où est Nîmes ?",)]


def test_labels_sort_as_numbers_if_they_are():
  def listed(*labels):
    examples = tuple(training.Example(i, text="", label=label) for i, label in enumerate(labels))
    return training.label_list(training.Examples("f", examples))

  assert listed("10", "9", "9", "-1") == ("-1", "9", "10")
  assert listed("b", "10", "9") == ("10", "9", "b")
  with pytest.raises(training.DataError, match="at least two"):
    listed("b", "b")


BAD = [
  ("a.jsonl", "classification", "", "empty"),
  ("a.txt", "lm", " \n", "empty"),
  ("a.txt", "lm", "a\0b", "zero bytes"),
  ("a.csv", "classification", "text,label\n", "no examples"),
  ("a.jsonl", "classification", '{"text": "a", "label": 1}\n{"text"\n', ":2: not a line of JSON"),
  ("a.jsonl", "classification", "[1]\n", ":1: expected a JSON object, got list"),
  ("a.jsonl", "classification", '\n{"text": "a"}\n', ":2: .*has \\['text'\\]"),
  ("a.jsonl", "classification", '{"text": 3, "label": 1}\n', ":1: `text` must be a string"),
  ("a.jsonl", "classification", '{"text": "", "label": 1.5}\n', ":1: `label` must be .* 1.5"),
  ("a.csv", "classification", "text,label\na,1\nb\n", ":3: expected 2 columns.*got 1"),
  ("a.csv", "classification", 'text,label\na,1\n"b\n', ":3: not a row"),
  ("a.csv", "classification", "a,b,c\n", ":1: .*`--columns text,label`"),
  ("a.tsv", "classification", "a\t \n", ":1: the label is empty"),
  ("a.all", "classification", "1 a\n2\n", ":2: expected `label words"),
  ("a.conll", "tagging", "a O\nb\n", ":2: expected a token and a tag"),
  ("a.conll", "tagging", "a O\nb X\n", ":2: tag 'X' of token 'b'"),
  ("a.jsonl", "tagging", '{"tokens": ["a"], "tags": []}\n', ":1: 1 tokens but 0 tags"),
  ("a.jsonl", "lm", '{"messages": []}\n', ":1: `messages` must be a list"),
  ("a.jsonl", "lm", '{"messages": [{"content": ""}]}\n', ":1: message 0 has no `role`"),
  ("a.jsonl", "lm", '{"messages": [{"role": "user", "content": ""}]}\n', ":1: .*assistant"),
]


@pytest.mark.parametrize(("name", "task", "text", "message"), BAD)
def test_bad_files_are_named(tmp_path, name, task, text, message):
  with pytest.raises(training.DataError, match=message) as caught:
    training.read(write(tmp_path, name, text), task)
  assert str(tmp_path / name) in str(caught.value)


def test_bad_arguments(tmp_path):
  with pytest.raises(training.DataError, match="no such file"):
    training.read(tmp_path / "none.csv", "lm")
  path = write(tmp_path, "a.csv", "a,b\n1,2\n")
  with pytest.raises(ValueError, match="task='summary'"):
    training.read(path, "summary")
  with pytest.raises(training.DataError, match="unknown .*'texts'"):
    training.read(path, "classification", "texts,label")
  with pytest.raises(training.DataError, match=":1: no column is named 'q'"):
    training.read(path, "classification", "text=q,label=b")
  with pytest.raises(training.DataError, match="columns=.* are for tables"):
    training.read(write(tmp_path, "a.txt", "x"), "lm", "text")


def test_real_files(shared_data):
  counts = {
    ("classification", "sst2/train.tsv"): 6920,
    ("classification", "sst2/dev.tsv"): 872,
    ("classification", "trec/TREC.train.all"): 5452,
    ("tagging", "wnut17/wnut17train.conll"): 3394,
    ("tagging", "wnut17/emerging.test.annotated"): 1287,
  }
  for (task, name), count in counts.items():
    assert len(training.read(shared_data / name, task)) == count, name
  path = shared_data / "e2e/devset.csv"
  assert len(training.read(path, "lm", "prompt=mr,completion=ref")) == 4672


def test_an_unknown_header_is_not_a_row(tmp_path):
  path = tmp_path / "data.csv"
  rows = "good,pos\nbad,neg\nfine,pos\ndull,neg\n"
  path.write_text("review,sentiment\n" + rows)
  with pytest.raises(training.DataError, match=r"data\.csv:1.*looks like a header.*text=review"):
    training.read(path, "classification")
  columns = "text=review,label=sentiment"
  assert len(training.read(path, "classification", columns)) == 4
  path.write_text(rows)
  assert len(training.read(path, "classification")) == 4
