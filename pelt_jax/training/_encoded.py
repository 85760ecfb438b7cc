"""Rows of a task, and the room that a row has."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pelt_jax.training._place import PLACEMENTS
from pelt_jax.training._readers import Example, Examples
from pelt_jax.training._tokenizer import Tokenizer

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Rows ready for batching, and what evaluation needs besides them.

  Attributes:
    task: `"classification"`, `"tagging"`, `"lm"` or `"seq2seq"`.
    rows: Per row `input_ids` (T,) and `labels` (T,) or (), in the task seq2seq (U,); packed rows
      also have `segment_ids` and `position_ids` (T,), rows with a blank `at` ().
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
  for name, room in (("length", length), ("the number of the model's positions", limit)):
    if room is not None and room - len(virtual) < 4:
      raise ValueError(
        f"{len(virtual)} virtual tokens leave no room for text: {name} is {room}, and at least 4 "
        "tokens of text are needed. Shorten the prompt or raise length"
      )


def closing_id(tokenizer: Tokenizer) -> int | None:
  """The id that ends every sequence ([SEP], T5's </s>), if the tokenizer writes one."""
  around, last = (
    tokenizer.encode("", special=True).ids,
    tokenizer.encode("a", special=True).ids[-1:],
  )
  return last[0] if around[-1:] == last else None


def fit_in(
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
