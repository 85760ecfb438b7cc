"""From examples to rows: unpadded arrays of ids and targets.

Targets are aligned here, once: `labels[t]` is what position `t` has to predict, `IGNORE` where it
predicts nothing. For language models that is the next token.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pelt_jax.training._encode_lm import language
from pelt_jax.training._encode_seq2seq import sources_and_targets
from pelt_jax.training._encoded import IGNORE, Encoded, check_room, closing_id, fit_in
from pelt_jax.training._place import place
from pelt_jax.training._readers import TASKS, Example, Examples, check_example
from pelt_jax.training._template import Template
from pelt_jax.training._tokenizer import Tokenizer


def encode(
  examples: Examples,
  tokenizer: Tokenizer,
  task: str,
  *,
  labels: Sequence[str] = (),
  length: int | None = None,
  limit: int | None = None,
  virtual: Sequence[int] = (),
  placement: str = "start",
  template: Template | str | None = None,
  mask: int | bool | None = None,
) -> Encoded:
  """Tokenizes a file's examples.

  Args:
    examples: What `read` returned.
    tokenizer: The model's tokenizer.
    task: As for `read`.
    labels: The classes in order, from `label_list` of the training file.
    length: Longest row in tokens; longer examples are cut there, running text is split. None: an
      example may be as long as the model allows, and running text is split at 512. Sources and
      targets of an encoder-decoder are cut there each on its own.
    limit: How many positions the model has; None if any.
    virtual: Ids of virtual tokens, from `pelt.virtual_tokens`, that every text gets, an
      encoder-decoder's source. They count towards `length` and `limit` and are never a target; the
      first token of running text stays unpredicted where nothing but them precedes it, as without
      them.
    placement: Where they stand: `"start"`, `"after_first"` (behind BOS or [CLS]) or `"end"`
      (before [SEP]; in a prompt with completion or a conversation, before the first target).
    template: Where they stand among words of its own, and perhaps a blank, instead of `placement`
      (classification). Rows of a template with a blank have `at` (), the position to ask.
    mask: What the model reads in a blank: the tokenizer's `mask` for a masked language model, None
      for a decoder, or False where a decoder's tokenizer has one.

  Raises:
    DataError: A label is not among `labels`, or an example is too long; names file and line.
    ValueError: `length` is more than the model has, or the template does not serve.
  """
  if task not in TASKS:
    raise ValueError(f"task={task!r}: expected one of {', '.join(TASKS)}")
  for example in examples:
    check_example(examples, example, task)
  if task in ("classification", "tagging") and not labels:
    raise ValueError(f"labels is empty: {task} needs the classes, labels=label_list(training file)")
  template = Template(template) if isinstance(template, str) else template
  if template is not None and task != "classification":
    raise ValueError(f"template {template.source!r} is for classification, the task is {task!r}")
  check_room(length, limit, virtual, placement)
  if template is not None:
    return _templated(
      examples, tokenizer, template, tuple(labels), length, limit, tuple(virtual), mask
    )
  prompt = (tuple(virtual), placement)
  if task == "seq2seq":
    return sources_and_targets(examples, tokenizer, length, limit, prompt)
  length, limit = (None if n is None else n - len(virtual) for n in (length, limit))
  if task == "lm":
    return language(examples, tokenizer, length, limit, prompt)
  return _supervised(examples, tokenizer, task, tuple(labels), length, limit, prompt)


def _supervised(
  examples: Examples,
  tokenizer: Tokenizer,
  task: str,
  labels: tuple[str, ...],
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> Encoded:
  id_of = _numbering(examples, labels)
  rows, tags, truncated = [], [], 0
  closing = closing_id(tokenizer)
  for example in examples:
    if task == "classification":
      assert example.text is not None and example.label is not None
      ids = tokenizer.encode(example.text, special=True).ids
      at = None
    else:
      ids, at = _words(tokenizer, example.tokens or ())
    cut = fit_in(examples, example, len(ids), length, limit)
    if cut < len(ids):
      truncated += 1
      ids = ids[:cut] if closing is None else [*ids[: cut - 1], closing]
    ids, moved = place(ids, *prompt, closing=closing is not None)
    row: dict[str, np.ndarray] = {"input_ids": np.array(ids, np.int32)}
    if at is None:
      row["labels"] = np.array(id_of(example, str(example.label)), np.int32)
    else:
      kept = (at >= 0) & (at < cut - (closing is not None))
      at = np.where(kept, np.asarray(moved)[np.where(kept, at, 0)], -1)
      row["labels"] = np.full(len(ids), IGNORE, np.int32)
      for position, tag in zip(at, example.tags or (), strict=True):
        target = id_of(example, tag)
        if position >= 0:
          row["labels"][position] = target
      tags.append((tuple(example.tags or ()), at))
    rows.append(row)
  return Encoded(task, tuple(rows), labels, tokenizer.pad, tags=tuple(tags), truncated=truncated)


def _numbering(examples: Examples, labels: tuple[str, ...]) -> Callable[[Example, str], int]:
  ids_of = {name: i for i, name in enumerate(labels)}

  def id_of(example: Example, name: str) -> int:
    if name not in ids_of:
      raise examples.error(
        example.line,
        f"label {name!r} does not occur in training, whose labels are {list(labels)}: "
        "leave such examples out, or train on some",
      )
    return ids_of[name]

  return id_of


def _templated(
  examples: Examples,
  tokenizer: Tokenizer,
  template: Template,
  labels: tuple[str, ...],
  length: int | None,
  limit: int | None,
  virtual: tuple[int, ...],
  mask: int | bool | None,
) -> Encoded:
  id_of = _numbering(examples, labels)
  rows, truncated = [], 0
  for example in examples:
    filled = template.fill(example.text or "", tokenizer, virtual, mask, length or limit)
    if filled.cut and length is None:
      raise examples.error(
        example.line,
        f"in its template the text needs more than the {limit} positions that the model has: pass "
        f"a length (`--length {limit}`) to cut such examples",
      )
    truncated += filled.cut
    row = {"input_ids": np.array(filled.ids, np.int32)}
    row["labels"] = np.array(id_of(example, str(example.label)), np.int32)
    if filled.at is not None:
      row["at"] = np.array(filled.at, np.int32)
    rows.append(row)
  return Encoded("classification", tuple(rows), labels, tokenizer.pad, truncated=truncated)


def _words(tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[list[int], np.ndarray]:
  """Ids of a sentence of words, and the position of each word's first piece (-1: it has none)."""
  word_at: list[int] = []
  for i, token in enumerate(tokens):
    word_at += [i] * len(token) + [-1]  # -1 for the space
  pieces = tokenizer.encode(" ".join(tokens), special=True)
  at = np.full(len(tokens), -1, np.int64)
  for position, (start, end) in enumerate(pieces.spans):
    # Byte-level pieces may begin with the space before their word.
    words = [w for w in word_at[start:end] if w >= 0]
    if words and at[words[0]] < 0:
      at[words[0]] = position
  return pieces.ids, at
