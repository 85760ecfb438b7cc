"""From examples to rows: unpadded arrays of ids and targets.

Targets are aligned here, once: `labels[t]` is what position `t` has to predict, `IGNORE` where it
predicts nothing. For language models that is the next token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pelt_jax.training._pack import Segment, pack
from pelt_jax.training._place import PLACEMENTS, place
from pelt_jax.training._readers import Example, Examples
from pelt_jax.training._tokenizer import FolderTokenizer, Tokenizer

IGNORE = -100
TEXT_LENGTH = 512  # rows of running text, unless the caller or the model says otherwise


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Rows ready for batching, and what evaluation needs besides them.

  Attributes:
    task: `"classification"`, `"tagging"`, `"lm"` or `"seq2seq"`.
    rows: Per row `input_ids` (T,) and `labels` (T,) or (), in the task seq2seq (U,); packed rows
      also have `segment_ids` and `position_ids` (T,).
    labels: Names of the classes, for tagging and classification.
    pad: The id that fills short rows.
    bytes: UTF-8 bytes of the text that has to be predicted (lm, seq2seq).
    tags: Per row, the true tags and the position that predicts each, -1 for a token that the
      tokenizer or the length left out (tagging).
    truncated: How many examples lost their end to `length`.
  """

  task: str
  rows: tuple[dict[str, np.ndarray], ...]
  labels: tuple[str, ...] = ()
  pad: int = 0
  bytes: int = 0
  tags: tuple[tuple[tuple[str, ...], np.ndarray], ...] = ()
  truncated: int = 0

  def __len__(self) -> int:
    return len(self.rows)

  def lengths(self, name: str = "input_ids") -> np.ndarray:
    """Number of ids, or of labels, of each row (N,)."""
    return np.array([len(row[name]) for row in self.rows], np.int64)


def label_list(examples: Examples) -> tuple[str, ...]:
  """The distinct labels (or tags) of a file, sorted, as numbers if all of them are.

  Raises:
    DataError: There are fewer than two.
  """
  found = {e.label for e in examples} - {None} | {t for e in examples for t in e.tags or ()}
  if len(found) < 2:
    raise examples.error(
      examples.examples[0].line, f"every example has the label {found}: at least two are needed"
    )
  names = [str(name) for name in found]
  numeric = all(name.lstrip("-").isdigit() for name in names)
  return tuple(sorted(names, key=int) if numeric else sorted(names))


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

  Raises:
    DataError: A label is not among `labels`, or an example is too long; names file and line.
    ValueError: `length` is more than the model has.
  """
  check_room(length, limit, virtual, placement)
  prompt = (tuple(virtual), placement)
  if task == "seq2seq":
    return _sources_and_targets(examples, tokenizer, length, limit, prompt)
  length, limit = (None if n is None else n - len(virtual) for n in (length, limit))
  if task == "lm":
    return _language(examples, tokenizer, length, limit, prompt)
  return _supervised(examples, tokenizer, task, tuple(labels), length, limit, prompt)


def check_room(
  length: int | None, limit: int | None, virtual: Sequence[int], placement: str
) -> None:
  """Raises ValueError where virtual tokens leave no room for text; see `encode`."""
  if length is not None and length < 4:
    raise ValueError(f"length={length}: expected at least 4 tokens")
  if length is not None and limit is not None and length > limit:
    raise ValueError(f"length={length}: the model has {limit} positions")
  if placement not in PLACEMENTS:
    raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
  for name, room in (("length", length), ("the model's positions", limit)):
    if room is not None and room - len(virtual) < 4:
      raise ValueError(
        f"{len(virtual)} virtual tokens leave no room for text: {name} is {room}, and at least 4 "
        "tokens of text are needed. Shorten the prompt or raise length"
      )


def _supervised(
  examples: Examples,
  tokenizer: Tokenizer,
  task: str,
  labels: tuple[str, ...],
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> Encoded:
  ids_of = {name: i for i, name in enumerate(labels)}

  def id_of(example: Example, name: str) -> int:
    if name not in ids_of:
      raise examples.error(
        example.line, f"label {name!r} does not occur in training; known are {list(labels)}"
      )
    return ids_of[name]

  rows, tags, truncated = [], [], 0
  closing = _closing(tokenizer)
  for example in examples:
    if task == "classification":
      assert example.text is not None and example.label is not None
      ids = tokenizer.encode(example.text, special=True).ids
      at = None
    else:
      ids, at = _words(tokenizer, example.tokens or ())
    cut = _fit(examples, example, len(ids), length, limit)
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


def _sources_and_targets(
  examples: Examples,
  tokenizer: Tokenizer,
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> Encoded:
  rows, total_bytes, truncated = [], 0, 0
  for example in examples:
    source, cut = source_ids(examples, example, tokenizer, length, limit, prompt)
    completion = example.completion or ""
    pieces = tokenizer.encode(completion, special=True)
    target = pieces.ids
    if tokenizer.eos is not None and target[-1:] != [tokenizer.eos]:
      target = [*target, tokenizer.eos]
    kept = _fit(examples, example, len(target), length, limit)
    # A target that was cut does not end there, so nothing says that it does.
    end = len(completion) if kept == len(target) else max(b for _, b in pieces.spans[:kept])
    total_bytes += len(completion[:end].encode())
    truncated += bool(cut or kept < len(target))
    rows.append(
      {"input_ids": np.array(source, np.int32), "labels": np.array(target[:kept], np.int32)}
    )
  return Encoded("seq2seq", tuple(rows), pad=tokenizer.pad, bytes=total_bytes, truncated=truncated)


def source_ids(
  examples: Examples,
  example: Example,
  tokenizer: Tokenizer,
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> tuple[list[int], bool]:
  """What an encoder-decoder reads, virtual tokens in their place, and whether it was cut."""
  ids, closing = tokenizer.encode(example.prompt or "", special=True).ids, _closing(tokenizer)
  room = [None if n is None else n - len(prompt[0]) for n in (length, limit)]
  kept = _fit(examples, example, len(ids), *room)
  cut = kept < len(ids)
  if cut:
    ids = ids[:kept] if closing is None else [*ids[: kept - 1], closing]
  if not ids and not prompt[0]:
    raise examples.error(example.line, "the prompt is empty: the encoder has nothing to read")
  return place(ids, *prompt, closing=closing is not None).ids, cut


def _closing(tokenizer: Tokenizer) -> int | None:
  """The id that ends every sequence ([SEP], T5's </s>), if the tokenizer writes one."""
  around, last = (
    tokenizer.encode("", special=True).ids,
    tokenizer.encode("a", special=True).ids[-1:],
  )
  return last[0] if around[-1:] == last else None


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


def _fit(
  examples: Examples, example: Example, tokens: int, length: int | None, limit: int | None
) -> int:
  """How many of `tokens` to keep."""
  if length is not None:
    return min(tokens, length)
  if limit is not None and tokens > limit:
    raise examples.error(
      example.line,
      f"{tokens} tokens, but the model has {limit} positions: "
      f"pass a length (`--length {limit}`) to cut such examples",
    )
  return tokens


def _language(
  examples: Examples,
  tokenizer: Tokenizer,
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> Encoded:
  segments: list[Segment] = []
  total_bytes = truncated = 0
  window = length or min(TEXT_LENGTH, limit or TEXT_LENGTH)
  several = len(examples) > 1
  for example in examples:
    if example.messages is not None or example.prompt is not None:
      segment, n_bytes = _completion(examples, example, tokenizer, prompt)
      extra = len(prompt[0])
      cut = extra + _fit(examples, example, len(segment.inputs) - extra, length, limit)
      if cut < len(segment.inputs):
        truncated += 1
        segment = Segment(segment.inputs[:cut], segment.labels[:cut])
      new = [segment]
    else:
      new, n_bytes = _running(example.text or "", tokenizer, window, several)
      new = [_prompted(s, tokenizer, prompt) for s in new]
    new = [s for s in new if (s.labels != IGNORE).any()]
    segments += new
    total_bytes += n_bytes if new else 0
  if not segments:
    raise examples.error(examples.examples[0].line, "no token is left to predict")
  longest = max(len(s.inputs) for s in segments)
  total = sum(len(s.inputs) for s in segments)
  window += len(prompt[0])
  # Without a length, completions are packed into rows of about 512, longer if one of them is.
  size = max(longest, min(window, total)) if length is None else min(window, total)
  rows = pack(segments, size, tokenizer.pad, IGNORE)
  return Encoded("lm", tuple(rows), pad=tokenizer.pad, bytes=total_bytes, truncated=truncated)


def _running(
  text: str, tokenizer: Tokenizer, window: int, several: bool
) -> tuple[list[Segment], int]:
  """Segments of at most `window` tokens, and how many bytes they predict."""
  ids, spans = tokenizer.encode(text)
  if not ids:
    return [], 0
  n_bytes = len(text.encode())
  if several and tokenizer.eos is not None:  # one text among many has an end
    ids = [*ids, tokenizer.eos]
  stream = np.array(ids, np.int32)
  segments = []
  if tokenizer.adds_bos and tokenizer.bos is not None:
    for start in range(0, len(stream), window):
      part = stream[start : start + window]
      segments.append(Segment(np.concatenate([[tokenizer.bos], part[:-1]]).astype(np.int32), part))
  else:  # nothing precedes the first token, so nothing predicts it
    n_bytes -= len(text[: spans[0][1]].encode())
    for start in range(0, len(stream) - 1, window):
      part = stream[start : start + window + 1]
      segments.append(Segment(part[:-1], part[1:]))
  return segments, n_bytes


def _prompted(segment: Segment, tokenizer: Tokenizer, prompt: tuple[Sequence[int], str]) -> Segment:
  """Running text behind virtual tokens."""
  virtual, placement = prompt
  if virtual and (placement == "end" or (placement == "after_first" and not tokenizer.adds_bos)):
    raise ValueError(
      f"placement={placement!r}: running text has no {'end' if placement == 'end' else 'first'} "
      "token to stand by; use placement='start'"
    )
  ids, at = place(segment.inputs.tolist(), virtual, placement)
  labels = np.full(len(ids), IGNORE, np.int32)
  labels[at] = segment.labels
  return Segment(np.array(ids, np.int32), labels)


def _completion(
  examples: Examples,
  example: Example,
  tokenizer: Tokenizer,
  prompt: tuple[Sequence[int], str],
) -> tuple[Segment, int]:
  """A prompt and completion, or a conversation: only what the model has to write is a target."""
  if example.messages is None:
    completion = example.completion or ""
    before, after = _question(example, tokenizer), tokenizer.encode(completion).ids
    if tokenizer.eos is not None:
      after = [*after, tokenizer.eos]
    ids, supervised = [*before, *after], [False] * len(before) + [True] * len(after)
    n_bytes = len(completion.encode())
  else:
    ids, supervised, n_bytes = _conversation(examples, example, tokenizer)
  virtual, placement = prompt
  first = supervised.index(True) if placement == "end" and True in supervised else len(ids)
  placed = place(ids[:first], virtual, placement)
  stream = np.array([*placed.ids, *ids[first:]], np.int32)
  labels = np.full(len(stream), IGNORE, np.int32)
  at = np.array([*placed.at, *range(first + len(virtual), len(stream))], np.int64)
  labels[at] = np.where(supervised, ids, IGNORE)
  return Segment(stream[:-1], labels[1:]), n_bytes


def _question(example: Example, tokenizer: Tokenizer) -> list[int]:
  """What stands before the completion."""
  question, completion = example.prompt or "", example.completion or ""
  if question and completion and not (question[-1].isspace() or completion[0].isspace()):
    question += "\n"
  ids = tokenizer.encode(question).ids
  return [tokenizer.bos, *ids] if tokenizer.adds_bos and tokenizer.bos is not None else ids


def prompt_ids(
  examples: Examples,
  example: Example,
  tokenizer: Tokenizer,
  task: str,
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> list[int]:
  """What the model reads before it writes the completion, or the last assistant's turn."""
  if task == "seq2seq":
    return source_ids(examples, example, tokenizer, length, limit, prompt)[0]
  if example.messages is None:
    ids = _question(example, tokenizer)
  else:
    messages = example.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    try:
      ids = tokenizer.encode(_chat(examples, example, tokenizer).render(messages[:last], True)).ids
    except ValueError as error:
      raise examples.error(example.line, str(error)) from error
  return place(ids, *prompt).ids


def _chat(examples: Examples, example: Example, tokenizer: Tokenizer) -> FolderTokenizer:
  if not isinstance(tokenizer, FolderTokenizer):
    raise examples.error(example.line, "this model has no chat template for `messages`")
  return tokenizer


def _conversation(
  examples: Examples, example: Example, tokenizer: Tokenizer
) -> tuple[list[int], list[bool], int]:
  messages, chat = example.messages or (), _chat(examples, example, tokenizer)
  try:
    text = chat.render(messages)
    spans = [
      _turn(chat, messages, i, text)
      for i, message in enumerate(messages)
      if message["role"] == "assistant"
    ]
  except ValueError as error:
    raise examples.error(example.line, str(error)) from error
  ids, at = tokenizer.encode(text)
  supervised = [any(a <= start < end <= b for a, b, _ in spans) for start, end in at]
  return ids, supervised, sum(len(text[a:c].encode()) for a, _, c in spans)


def _turn(
  tokenizer: FolderTokenizer, messages: Sequence[dict[str, Any]], i: int, text: str
) -> tuple[int, int, int]:
  """Where turn `i` starts, where it ends with its end-of-turn token, and without."""
  before = tokenizer.render(messages[:i], prompt=True)
  after = tokenizer.render(messages[: i + 1])
  if not (text.startswith(after) and after.startswith(before)):
    raise ValueError(
      "the chat template does not write a conversation turn by turn, so the assistant's words "
      f"cannot be told from the rest (turn {i})"
    )
  end = content = len(after)
  eos = tokenizer.names["eos_token"]
  found = after.rfind(eos, len(before)) if eos else -1
  if found >= 0 and not after[found + len(eos) :].strip():
    end, content = found + len(eos), found  # what follows the token is not the model's to write
  return len(before), end, content
