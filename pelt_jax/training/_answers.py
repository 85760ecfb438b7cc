"""Answers to held-out prompts, beside the references that a data set has for them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from pelt_jax._host import on_host
from pelt_jax.training._beam import beam_search
from pelt_jax.training._encode_lm import prompt_ids
from pelt_jax.training._encode_seq2seq import source_ids
from pelt_jax.training._encoded import check_room
from pelt_jax.training._generate import generate
from pelt_jax.training._metrics import generation_scores
from pelt_jax.training._progress import bar
from pelt_jax.training._readers import Example, Examples
from pelt_jax.training._tokenizer import Tokenizer

_MULTIPLE = 16  # lengths of batches of prompts are rounded up to it


class Question(NamedTuple):
  """A prompt, and every answer that the data gives for it.

  Attributes:
    prompt: What is asked; of a conversation, its last turn before the answer.
    ids: What the model reads, virtual tokens in their places.
    references: At least one.
  """

  prompt: str
  ids: list[int]
  references: tuple[str, ...]


def questions(
  examples: Examples,
  tokenizer: Tokenizer,
  task: str,
  *,
  length: int | None = None,
  limit: int | None = None,
  virtual: Any = (),
  placement: str = "start",
  most: int | None = None,
) -> list[Question]:
  """The distinct prompts of a file, in order, with all their completions as references.

  Args:
    examples: What `read` returned: prompts and completions, or conversations, whose last
      assistant's turn is the reference.
    tokenizer: The model's.
    task: `"lm"` or `"seq2seq"`.
    length: As for `encode`; an encoder-decoder's sources are cut there.
    limit: As for `encode`.
    virtual: As for `encode`.
    placement: As for `encode`.
    most: How many prompts to take, evenly over the file; None takes all.

  Raises:
    DataError: An example has no prompt; file and line are named.
    ValueError: Another task, or no room for the text.

  Example:
    >>> from pelt_jax import training
    >>> rows = [("2+2?", "4"), ("3+3?", "6"), ("2+2?", "four")]
    >>> rows = [training.Example(i, prompt=p, completion=c) for i, (p, c) in enumerate(rows)]
    >>> file = training.Examples("sums", tuple(rows))
    >>> asked = training.questions(file, training.ByteTokenizer(), "lm")
    >>> [(q.prompt, q.references) for q in asked]
    [('2+2?', ('4', 'four')), ('3+3?', ('6',))]
  """
  if task not in ("lm", "seq2seq"):
    raise ValueError(f"task={task!r}: expected 'lm' or 'seq2seq', whose models write")
  if most is not None and most < 1:
    raise ValueError(f"most={most}: expected at least one prompt")
  check_room(length, limit, virtual, placement)
  found: dict[Any, list[Example]] = {}
  for example in examples:
    if example.prompt is None and example.messages is None:
      raise examples.error(example.line, "running text has no prompt to answer")
    found.setdefault(_asked(example), []).append(example)
  chosen = list(found.values())
  if most is not None and most < len(chosen):
    chosen = [chosen[i * len(chosen) // most] for i in range(most)]
  made = []
  for group in chosen:
    first = group[0]
    prompt = (tuple(virtual), placement)
    if task == "seq2seq":
      ids, _ = source_ids(examples, first, tokenizer, length, limit, prompt)
    else:
      ids = prompt_ids(examples, first, tokenizer, prompt)
    shown = first.prompt if first.messages is None else _asked(first)[-1][1]
    made.append(Question(shown or "", ids, tuple(_answer(e) for e in group)))
  return made


def _last(example: Example) -> int:
  """Which message is the reference."""
  messages = example.messages or ()
  return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def _asked(example: Example) -> Any:
  if example.messages is None:
    return example.prompt
  before = example.messages[: _last(example)]
  return tuple((m["role"], m["content"]) for m in before) or (("", ""),)


def _answer(example: Example) -> str:
  if example.messages is None:
    return example.completion or ""
  return example.messages[_last(example)]["content"]


class Writer:
  """Writes answers, greedily or by beam search.

  Args:
    apply: `pelt.bypass(model.apply)`; keep the object.
    asked: What `questions` returned.
    tokenizer: The model's.
    size: Prompts per batch; they are sorted by length.
    max_new_tokens: Longest answer.
    beams: 1 is greedy.
    progress: Show a progress bar.
  """

  def __init__(
    self,
    apply: Callable,
    asked: list[Question],
    tokenizer: Tokenizer,
    *,
    size: int = 16,
    max_new_tokens: int = 64,
    beams: int = 1,
    progress: bool = False,
  ):
    if not asked:
      raise ValueError("asked is empty: there is no prompt to answer")
    for name, value in (("size", size), ("max_new_tokens", max_new_tokens), ("beams", beams)):
      if value < 1:
        raise ValueError(f"{name}={value}: expected at least 1")
    self.asked = asked
    self._apply, self._tokenizer, self._size = apply, tokenizer, size
    self._progress = progress
    self._max_new_tokens, self._beams = max_new_tokens, beams

  def __call__(self, params: Any) -> list[str]:
    """One answer per question, in the order of the questions."""
    return [self._tokenizer.decode(ids).strip() for ids in self.tokens(params)]

  def tokens(self, params: Any) -> list[list[int]]:
    """The answers' ids, the stopping token included."""
    answers: list[list[int]] = [[] for _ in self.asked]
    with bar("writing", len(self.asked), show=self._progress) as advance:
      for indices, ids, mask in self._batches():
        for i, answer in zip(indices, self._write(params, ids, mask), strict=False):
          answers[i] = answer
        advance(by=len(indices))
    return answers

  def scores(self, answers: list[str]) -> dict[str, float]:
    """BLEU and ROUGE of answers, see `generation_scores`."""
    return generation_scores(answers, [question.references for question in self.asked])

  def _write(self, params: Any, ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    tokenizer = self._tokenizer
    options: dict[str, Any] = {
      "max_new_tokens": self._max_new_tokens,
      "eos_token_id": tokenizer.eos,
      "pad_token_id": tokenizer.pad,
    }
    if self._beams == 1:
      made = jax.tree.map(on_host, generate(self._apply, params, ids, mask, **options))
      tokens, lengths = made.tokens, made.lengths
    else:
      found = beam_search(self._apply, params, ids, mask, beams=self._beams, **options)
      tokens, lengths = on_host(found.tokens[:, 0]), on_host(found.lengths[:, 0])
    return [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)]

  def _batches(self) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    order = sorted(range(len(self.asked)), key=lambda i: len(self.asked[i].ids))
    for start in range(0, len(order), self._size):
      indices = order[start : start + self._size]
      rows = [self.asked[i].ids for i in indices]
      width = -(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE
      ids = np.full((self._size, width), self._tokenizer.pad, np.int32)
      mask = np.zeros((self._size, width), np.int32)
      for i in range(self._size):  # a short batch asks its last question again
        row = rows[min(i, len(rows) - 1)]
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
      yield indices, ids, mask
