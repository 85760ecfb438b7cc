"""Kernels of any axes as batches of matrices (batch, inputs, outputs), and factors of them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pelt_jax.nodes._lora import _rank_letter, _subscripts


def parts(axes: str) -> tuple[str, str, str]:
  """The batch, input and output axes of a kernel, each in its order.

  >>> parts("heio:hei,heo")
  ('he', 'i', 'o')
  """
  kernel, a, b = _subscripts(axes)
  batch = "".join(c for c in kernel if c in a and c in b)
  inputs, outputs = ("".join(c for c in kernel if c in s and c not in batch) for s in (a, b))
  return batch, inputs, outputs


def arranged(x: Any, letters: str, groups: Iterable[str], stacked: int = 0) -> Any:
  """An array with its axes in the order of `groups`, each group as one axis, stacked axes first."""
  groups = tuple(groups)
  order = [stacked + letters.index(c) for c in "".join(groups)]
  x = x.transpose(*range(stacked), *order)
  sizes, shape = iter(x.shape[stacked:]), x.shape[:stacked]
  return x.reshape(*shape, *(math.prod(next(sizes) for _ in group) for group in groups))


def restored(
  x: Any, letters: str, groups: Iterable[str], size: Mapping[str, int], stacked: int = 0
) -> Any:
  """What `arranged` was given, the axes' sizes by letter."""
  order = "".join(groups)
  x = x.reshape(*x.shape[:stacked], *(size[c] for c in order))
  return x.transpose(*range(stacked), *(stacked + order.index(c) for c in letters))


def as_matrix(kernel: Any, axes: str, stacked: int = 0) -> Any:
  """(batch, inputs, outputs) of a kernel, stacked axes first."""
  return arranged(kernel, _subscripts(axes)[0], parts(axes), stacked)


def as_pair(a: Any, b: Any, axes: str, stacked: int = 0) -> tuple[Any, Any]:
  """(batch, inputs, rank) of `a` and (batch, rank, outputs) of `b`, stacked axes first."""
  _, left, right = _subscripts(axes)
  (batch, inputs, outputs), rank = parts(axes), _rank_letter(axes)
  return (
    arranged(a, left, (batch, inputs, rank), stacked),
    arranged(b, right, (batch, rank, outputs), stacked),
  )


def from_pair(
  a: Any, b: Any, axes: str, shape: tuple[int, ...], stacked: int = 0
) -> tuple[Any, Any]:
  """What `as_pair` was given; `shape` is the kernel's, without stacked axes."""
  kernel, left, right = _subscripts(axes)
  (batch, inputs, outputs), rank = parts(axes), _rank_letter(axes)
  size = dict(zip(kernel, shape, strict=True)) | {rank: a.shape[-1]}
  return (
    restored(a, left, (batch, inputs, rank), size, stacked),
    restored(b, right, (batch, rank, outputs), size, stacked),
  )


def wide(*arrays: Any) -> np.dtype:
  """The widest dtype of some arrays, at least float32."""
  dtype = np.dtype(np.float32)
  for x in arrays:
    dtype = np.promote_types(dtype, x.dtype)
  return dtype
