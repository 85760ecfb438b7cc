"""Rows of language models: running text, prompts with completions, conversations."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pelt_jax.training._encoded import IGNORE, Encoded, fit_in
from pelt_jax.training._pack import Segment, pack
from pelt_jax.training._place import place
from pelt_jax.training._readers import Example, Examples
from pelt_jax.training._tokenizer import FolderTokenizer, Tokenizer

TEXT_LENGTH = 512  # rows of running text, unless the caller or the model says otherwise


def language(
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
      cut = extra + fit_in(examples, example, len(segment.inputs) - extra, length, limit)
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
  prompt: tuple[Sequence[int], str],
) -> list[int]:
  """What the model reads before it writes the completion, or the last assistant's turn."""
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
