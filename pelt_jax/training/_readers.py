"""Reads training files: JSON lines, tables, CoNLL columns and plain text.

Every example remembers its line, so that whatever goes wrong later can name file and line.
"""

import csv
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

FIELDS = ("text", "label", "prompt", "completion", "tokens", "tags", "messages")
TASKS = ("classification", "tagging", "lm", "seq2seq")

# What an example must have, per task; the first alternative that is present counts.
_NEEDS = {
  "classification": (("text", "label"),),
  "tagging": (("tokens", "tags"),),
  "lm": (("messages",), ("prompt", "completion"), ("text",)),
  "seq2seq": (("prompt", "completion"),),
}


class DataError(ValueError):
  """Something is wrong with an input file; the message starts with `file:line`."""


@dataclasses.dataclass(frozen=True)
class Example:
  """One example of a file; fields that the file does not have are None."""

  line: int
  text: str | None = None
  label: str | None = None
  prompt: str | None = None
  completion: str | None = None
  tokens: tuple[str, ...] | None = None
  tags: tuple[str, ...] | None = None
  messages: tuple[dict, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
  """The examples of one file, in order."""

  path: str
  examples: tuple[Example, ...]

  def __len__(self) -> int:
    return len(self.examples)

  def __iter__(self) -> Iterator[Example]:
    return iter(self.examples)

  def error(self, line: int, message: str) -> DataError:
    """An error that names this file and `line`."""
    return DataError(f"{self.path}:{line}: {message}")


def read(
  path: str | os.PathLike, task: str, columns: Sequence[str] | str | None = None
) -> Examples:
  r"""Reads a file of examples for `task`.

  - `.jsonl`, `.json`, or a first line that is a JSON object: one object a line, with `text` and
    `label`; `tokens` and `tags`; or `messages`, or `prompt` and `completion`, or `text`.
  - `.csv`, `.tsv`, for classification any file with tabs, for seq2seq any other file: a table
    whose header names those fields, or see `columns`. Two columns without a header are
    `text,label`.
  - Anything else, tagging: CoNLL, a line has the token first and the tag last, and blank lines
    separate sentences.
  - Anything else, classification: `label words …`.
  - Anything else, lm: plain text, the whole file is one example.

  Text is UTF-8; a file that is not is read as Latin-1.

  Args:
    path: The file.
    task: `"classification"`, `"tagging"`, `"lm"` or `"seq2seq"`.
    columns: For tables. Either the fields in order (`"text,label"`; `-` skips a column), and the
      file has no header; or `"field=name"` pairs that say which named column is which field.

  Returns:
    The examples, at least one.

  Raises:
    DataError: The file is empty, is no text, or a line is malformed.

  Example:
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "questions.txt"
    >>> _ = file.write_text("HUM Who was Galileo ?\nLOC Where is Aspen ?\n")
    >>> read(file, "classification").examples[1].label
    'LOC'
  """
  if task not in TASKS:
    raise ValueError(f"task={task!r}: expected one of {', '.join(TASKS)}")
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f"{path}: no such file")
  text = _decode(path)
  if not text.strip():
    raise DataError(f"{path}: the file is empty")
  kind = _kind(path, text, task)
  if kind not in ("csv", "tsv") and columns is not None:
    raise DataError(f"{path}: columns={columns!r} are for tables, but this is read as {kind}")
  file = Examples(str(path), ())
  if kind == "text":
    found = [Example(1, text=text)]
  elif kind == "jsonl":
    found = _jsonl(file, text)
  elif kind == "conll":
    found = _conll(file, text)
  elif kind == "label words":
    found = _label_words(file, text)
  else:
    found = _table(file, text, "," if kind == "csv" else "\t", task, columns)
  if not found:
    raise DataError(f"{path}: the file holds no examples")
  for example in found:
    _check(file, example, task)
  return Examples(str(path), tuple(found))


def _decode(path: pathlib.Path) -> str:
  data = path.read_bytes()
  if b"\0" in data:
    raise DataError(f"{path}: this is no text file (it has zero bytes)")
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError:
    text = data.decode("latin-1")  # older corpora, TREC for one
  return text.replace("\r\n", "\n")


def _kind(path: pathlib.Path, text: str, task: str) -> str:
  suffix = path.suffix.lower()
  first = text.lstrip().partition("\n")[0]
  if suffix in (".jsonl", ".json", ".ndjson"):
    return "jsonl"
  if suffix in (".csv", ".tsv"):
    return suffix[1:]
  if task == "lm":
    return "jsonl" if _is_object(first) else "text"
  if first.startswith("{"):
    return "jsonl"
  if task == "tagging":
    return "conll"
  return "tsv" if "\t" in first or task == "seq2seq" else "label words"


def _is_object(line: str) -> bool:
  # Plain text may well begin with a brace.
  try:
    return isinstance(json.loads(line), dict)
  except ValueError:
    return False


def _jsonl(file: Examples, text: str) -> list[Example]:
  found = []
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      raise file.error(number, f"not a line of JSON: {error}") from error
    if not isinstance(row, dict):
      raise file.error(number, f"expected a JSON object, got {type(row).__name__}")
    found.append(_from_json(file, number, row))
  return found


def _from_json(file: Examples, line: int, row: dict[str, Any]) -> Example:
  fields: dict[str, Any] = {}
  for name in FIELDS:
    value = row.get(name)
    if value is None:
      continue
    if name == "label":
      if isinstance(value, float | list | dict):
        raise file.error(line, f"`label` must be a string or an integer, got {value!r}")
      fields[name] = str(value)
    elif name in ("text", "prompt", "completion"):
      if not isinstance(value, str):
        raise file.error(line, f"`{name}` must be a string, got {value!r}")
      fields[name] = value
    elif name in ("tokens", "tags"):
      if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise file.error(line, f"`{name}` must be a list of strings, got {value!r}")
      fields[name] = tuple(value)
    else:
      _check_messages(file, line, value)
      fields[name] = tuple(value)
  return Example(line, **fields)


def _check_messages(file: Examples, line: int, messages: Any) -> None:
  if not isinstance(messages, list) or not messages:
    raise file.error(line, f"`messages` must be a list of messages, got {messages!r}")
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise file.error(line, f"message {i} has no `role`: {message!r}")
    if not isinstance(message.get("content"), str):
      raise file.error(line, f"message {i} has no `content` string: {message!r}")
  if not any(message["role"] == "assistant" for message in messages):
    raise file.error(line, "no message has the role `assistant`: there is nothing to learn")


def _table(
  file: Examples, text: str, delimiter: str, task: str, columns: Sequence[str] | str | None
) -> list[Example]:
  if delimiter == "\t":  # tab-separated corpora hold bare quotation marks
    rows = csv.reader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
  else:
    rows = csv.reader(text.splitlines(keepends=True), strict=True)
  numbered = []
  try:
    start = 1
    for row in rows:
      if row:
        numbered.append((start, row))
      start = rows.line_num + 1
  except csv.Error as error:
    raise file.error(rows.line_num, f"not a row of a table: {error}") from error
  names, body = _header(file, numbered, task, columns)
  found = []
  for line, row in body:
    if len(row) != len(names):
      raise file.error(line, f"expected {len(names)} columns ({', '.join(names)}), got {len(row)}")
    fields: dict[str, Any] = {n: v for n, v in zip(names, row, strict=True) if n in FIELDS}
    if "label" in fields:
      fields["label"] = fields["label"].strip()
    for name in ("tokens", "tags"):
      if name in fields:
        fields[name] = tuple(fields[name].split())
    found.append(Example(line, **fields))
  return found


def _header(
  file: Examples, rows: list, task: str, columns: Sequence[str] | str | None
) -> tuple[list[str], list]:
  line, first = rows[0]
  asked = columns.split(",") if isinstance(columns, str) else list(columns or ())
  asked = [name.strip() for name in asked]
  if asked and not any("=" in name for name in asked):
    if unknown := [n for n in asked if n not in FIELDS and n != "-"]:
      raise DataError(f"columns: unknown {unknown}; the fields are {', '.join(FIELDS)}, or -")
    return asked, rows
  names = [name.strip() for name in first]
  if asked:
    renamed = {field: name for field, _, name in (pair.partition("=") for pair in asked)}
    if unknown := [n for n in renamed if n not in FIELDS]:
      raise DataError(f"columns: unknown {unknown}; the fields are {', '.join(FIELDS)}")
    if missing := [n for n in renamed.values() if n not in names]:
      raise file.error(line, f"no column is named {missing[0]!r}; the header is {names}")
    back = {name: field for field, name in renamed.items()}
    return [back.get(name, "-") for name in names], rows[1:]
  lower = [name.lower() for name in names]
  lower = ["text" if name == "sentence" else name for name in lower]
  if any(all(name in lower for name in group) for group in _NEEDS[task]):
    return lower, rows[1:]
  if task == "classification" and len(names) == 2:
    others = [row[1].strip() for _, row in rows[1:] if len(row) == 2]
    if len(others) > 2 and names[1] not in others and len(set(others)) < len(others):
      raise file.error(
        line,
        f"{names} looks like a header, since no other row has the label {names[1]!r}. If it is "
        f"one, pass `--columns text={names[0]},label={names[1]}`; if not, put the line "
        "`text,label` before it",
      )
    return ["text", "label"], rows
  groups = " or ".join(",".join(group) for group in _NEEDS[task])
  raise file.error(
    line,
    f"the header {names} does not name {groups}: pass columns, as in "
    f"`--columns {','.join(_NEEDS[task][-1])}`",
  )


def _conll(file: Examples, text: str) -> list[Example]:
  found: list[Example] = []
  tokens: list[str] = []
  tags: list[str] = []
  start = 1

  def close() -> None:
    if tokens:
      found.append(Example(start, tokens=tuple(tokens), tags=tuple(tags)))
      tokens.clear()
      tags.clear()

  for number, line in enumerate(text.split("\n"), 1):
    parts = line.split("\t") if "\t" in line else line.split()
    parts = [part.strip() for part in parts]
    if not any(parts) or parts[0] == "-DOCSTART-":
      close()
      continue
    if len(parts) < 2 or not parts[0] or not parts[-1]:
      raise file.error(number, f"expected a token and a tag, got {line!r}")
    _check_tag(file, number, parts[0], parts[-1])
    if not tokens:
      start = number
    tokens.append(parts[0])
    tags.append(parts[-1])
  close()
  return found


def _label_words(file: Examples, text: str) -> list[Example]:
  found = []
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    match = re.fullmatch(r"(\S+)\s+(\S.*)", line.strip())
    if not match:
      raise file.error(number, f"expected `label words …`, got {line!r}")
    found.append(Example(number, label=match[1], text=match[2]))
  return found


_TAG = re.compile(r"O|[BI]-\S+")


def check_example(file: Examples, example: Example, task: str) -> None:
  """Raises DataError where an example lacks a field that a task needs."""
  present = {n for n in FIELDS if getattr(example, n) is not None}
  if not any(set(group) <= present for group in _NEEDS[task]):
    groups = " or ".join(" and ".join(f"`{n}`" for n in group) for group in _NEEDS[task])
    raise file.error(
      example.line, f"{task} needs {groups}; this example has {sorted(present) or 'none of them'}"
    )


def _check(file: Examples, example: Example, task: str) -> None:
  check_example(file, example, task)
  if task == "classification" and not (example.label or "").strip():
    raise file.error(example.line, "the label is empty")
  if task == "tagging":
    tokens, tags = example.tokens or (), example.tags or ()
    if len(tokens) != len(tags) or not tokens:
      raise file.error(example.line, f"{len(tokens)} tokens but {len(tags)} tags")
    for token, tag in zip(tokens, tags, strict=True):
      _check_tag(file, example.line, token, tag)


def _check_tag(file: Examples, line: int, token: str, tag: str) -> None:
  if not _TAG.fullmatch(tag):
    raise file.error(line, f"tag {tag!r} of token {token!r} is not O, B-… or I-…")
