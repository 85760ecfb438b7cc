"""Where virtual tokens stand among a text's own."""

from collections.abc import Sequence
from typing import NamedTuple

PLACEMENTS = ("start", "after_first", "end")


class Placed(NamedTuple):
  """Ids with virtual tokens among them, and where each of the text's own went.

  Attributes:
    ids: P ids more than before.
    at: (T,) the new position of every old one.
  """

  ids: list[int]
  at: list[int]


def place(
  ids: Sequence[int], virtual: Sequence[int], placement: str = "start", closing: bool = False
) -> Placed:
  """Puts virtual tokens in front of the text, after its first token, or at its end.

  Args:
    ids: the text's tokens.
    virtual: what `pelt.virtual_tokens` gives.
    placement: `"start"`; `"after_first"`: behind BOS or [CLS]; `"end"`.
    closing: the last token closes the sequence ([SEP]): `"end"` is before it.

  Raises:
    ValueError: for another placement.

  >>> place([101, 7, 8, 102], range(200, 202), "end", closing=True)
  Placed(ids=[101, 7, 8, 200, 201, 102], at=[0, 1, 2, 5])
  """
  if placement not in PLACEMENTS:
    raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
  cut = {"start": 0, "after_first": min(1, len(ids)), "end": len(ids) - bool(closing and ids)}
  i = cut[placement]
  at = [*range(i), *range(i + len(virtual), len(ids) + len(virtual))]
  return Placed([*ids[:i], *virtual, *ids[i:]], at)
