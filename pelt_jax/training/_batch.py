"""Batches: rows of similar length, padded to one of few lengths so that few programs compile."""

from collections.abc import Iterator, Sequence

import numpy as np

from pelt_jax.training._encoded import IGNORE, Encoded

Batch = dict[str, np.ndarray]

_MULTIPLE = 8


def buckets(*data: Encoded) -> tuple[int, ...]:
  """Lengths to pad to: for half of the rows, nine tenths, and all, rounded up to multiples of 8.

  Sources and targets of an encoder-decoder share them.

  Args:
    *data: Everything that will run, training and evaluation.
  """
  if all(d.task == "lm" for d in data):  # packed or windows: one length serves
    return (int(max(d.lengths().max() for d in data)),)
  sides = [d.lengths() for d in data]
  sides += [d.lengths("labels") for d in data if d.task == "seq2seq"]
  lengths = np.sort(np.concatenate(sides))
  at = (lengths[int(np.ceil(q * len(lengths))) - 1] for q in (0.5, 0.9, 1.0))
  return tuple(sorted({-(-int(n) // _MULTIPLE) * _MULTIPLE for n in at}))


def collate(
  data: Encoded, indices: Sequence[int] | np.ndarray, size: int, lengths: Sequence[int]
) -> Batch:
  """One batch of `size` rows; where `indices` are fewer, rows without targets fill it.

  Args:
    data: The rows.
    indices: Which of them.
    size: Rows of the batch.
    lengths: Lengths to choose from; the smallest that holds every row is taken.

  Returns:
    `input_ids` (B, T), `labels` (B, T) or (B,), and `attention_mask` (B, T) or, for packed rows,
    `segment_ids` and `position_ids` (B, T). In the task seq2seq the labels have a length of their
    own, (B, U); rows of a template with a blank have `at` (B,).
  """
  rows = [data.rows[i] for i in indices]

  def width(name: str) -> int:
    longest = max(len(row[name]) for row in rows)
    return next((n for n in lengths if n >= longest), longest)

  length = width("input_ids")
  targets = width("labels") if data.task == "seq2seq" else length
  packed = "segment_ids" in data.rows[0]
  batch = {
    "input_ids": np.full((size, length), data.pad, np.int32),
    "labels": np.full((size, targets)[: 1 + rows[0]["labels"].ndim], IGNORE, np.int32),
  }
  names = ("segment_ids", "position_ids") if packed else ("attention_mask",)
  batch |= {name: np.zeros((size, length), np.int32) for name in names}
  if "at" in rows[0]:
    batch["at"] = np.zeros(size, np.int32)
  for i, row in enumerate(rows):
    for name, value in row.items():
      if value.ndim:
        batch[name][i, : len(value)] = value
      else:
        batch[name][i] = value
    if not packed:
      batch["attention_mask"][i, : len(row["input_ids"])] = 1
  if not packed:  # attention over no position at all is undefined
    batch["attention_mask"][len(rows) :, 0] = 1
  return batch


def batches(
  data: Encoded, size: int, lengths: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
  """All rows once, short ones first, for evaluation.

  Args:
    data: The rows.
    size: Rows per batch; the last one of each length is filled with rows without targets.
    lengths: As for `collate`; None: those of `buckets(data)`.

  Yields:
    Indices of the rows (at most `size`) and the batch.
  """
  lengths = buckets(data) if lengths is None else lengths
  order = np.argsort(data.lengths(), kind="stable")
  for start in range(0, len(order), size):
    indices = order[start : start + size]
    yield indices, collate(data, indices, size, lengths)
