"""Packing: several texts in one row, told apart by segment ids."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
  """Inputs (T,) and aligned targets (T,) of one text."""

  inputs: np.ndarray
  labels: np.ndarray


def pack(
  segments: Sequence[Segment], size: int, pad: int, ignore: int
) -> list[dict[str, np.ndarray]]:
  """Puts segments into rows of `size`, as few as first-fit-decreasing finds.

  Positions count from 0 in each segment. Rows are sorted by the first segment they hold, so that
  text which fills its rows keeps its order. Where every row holds one segment only, rows are left
  unpadded and have no segment ids.

  Args:
    segments: None longer than `size`.
    size: Length of a row.
    pad: Fills `input_ids` after the last segment, where `segment_ids` is 0.
    ignore: Fills `labels` there.

  Returns:
    Rows with `input_ids` and `labels`, and where needed `segment_ids` (from 1) and `position_ids`.

  Example:
    >>> parts = [Segment(np.arange(n), np.arange(n)) for n in (2, 4, 1)]
    >>> [row["segment_ids"].tolist() for row in pack(parts, 4, 0, -100)]
    [[1, 1, 2, 0], [1, 1, 1, 1]]
  """
  order = sorted(range(len(segments)), key=lambda i: -len(segments[i].inputs))
  bins: list[list[int]] = []
  space: list[list[int]] = [[] for _ in range(size + 1)]  # free places -> bins
  fullest = 0  # no bin has more free places than this
  for i in order:
    n = len(segments[i].inputs)
    if n > size:
      raise ValueError(f"a segment of {n} tokens does not fit rows of {size}")
    free = next((f for f in range(n, fullest + 1) if space[f]), None)
    if free is None:
      bins.append([i])
      left = size - n
      target = len(bins) - 1
    else:
      target = space[free].pop()
      bins[target].append(i)
      left = free - n
    space[left].append(target)
    fullest = max(fullest, left)
  contents = sorted(sorted(b) for b in bins)
  if all(len(b) == 1 for b in contents):
    return [{"input_ids": segments[i].inputs, "labels": segments[i].labels} for (i,) in contents]
  return [_row([segments[i] for i in b], size, pad, ignore) for b in contents]


def _row(parts: list[Segment], size: int, pad: int, ignore: int) -> dict[str, np.ndarray]:
  row = {
    "input_ids": np.full(size, pad, np.int32),
    "labels": np.full(size, ignore, np.int32),
    "segment_ids": np.zeros(size, np.int32),
    "position_ids": np.zeros(size, np.int32),
  }
  start = 0
  for number, part in enumerate(parts, 1):
    stop = start + len(part.inputs)
    row["input_ids"][start:stop] = part.inputs
    row["labels"][start:stop] = part.labels
    row["segment_ids"][start:stop] = number
    row["position_ids"][start:stop] = np.arange(stop - start)
    start = stop
  return row
