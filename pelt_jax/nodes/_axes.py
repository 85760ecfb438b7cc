"""Kernels of any axes as matrices (experts, inputs, outputs), and their factors likewise."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pelt_jax.nodes._lora import rank_letter, subscripts


def letters(axes: str) -> tuple[str, str, str]:
  """The kernel's axes that count matrices (experts), its inputs and its outputs.

  >>> letters("CKDH:Dr,rCKH")
  ('', 'D', 'CKH')
  >>> letters("heio:hei,heo")
  ('he', 'i', 'o')
  """
  kernel, a, b = subscripts(axes)
  batch = "".join(c for c in kernel if c in a and c in b)
  inputs, outputs = ("".join(c for c in kernel if c in s and c not in batch) for s in (a, b))
  return batch, inputs, outputs


def arranged(x: Any, axes: str, groups: Iterable[str]) -> Any:
  """An array whose last axes are `axes`, in the order of `groups`, each group as one axis."""
  groups, lead = tuple(groups), x.ndim - len(axes)
  x = x.transpose(*range(lead), *(lead + axes.index(c) for c in "".join(groups)))
  sizes = iter(x.shape[lead:])
  return x.reshape(*x.shape[:lead], *(math.prod(next(sizes) for _ in group) for group in groups))


def restored(x: Any, axes: str, groups: Iterable[str], size: Mapping[str, int]) -> Any:
  """What `arranged` was given, the axes' sizes by letter."""
  groups = tuple(groups)
  order, lead = "".join(groups), x.ndim - len(groups)
  x = x.reshape(*x.shape[:lead], *(size[c] for c in order))
  return x.transpose(*range(lead), *(lead + order.index(c) for c in axes))


def to_matrices(kernel: Any, axes: str) -> Any:
  """A kernel as ([layers], [experts], in, out)."""
  batch, inputs, outputs = letters(axes)
  return arranged(kernel, subscripts(axes)[0], (*batch, inputs, outputs))


def from_matrices(x: Any, axes: str, shape: tuple[int, ...]) -> Any:
  """A kernel of this shape; undoes `to_matrices`."""
  (batch, inputs, outputs), kernel = letters(axes), subscripts(axes)[0]
  size = dict(zip(kernel, shape[len(shape) - len(kernel) :], strict=True))
  return restored(x, kernel, (*batch, inputs, outputs), size)


def to_pair(a: Any, b: Any, axes: str) -> tuple[Any, Any]:
  """Factors as ([layers], [experts], in, rank) and ([layers], [experts], rank, out)."""
  (batch, inputs, outputs), (_, left, right) = letters(axes), subscripts(axes)
  rank = rank_letter(axes)
  return arranged(a, left, (*batch, inputs, rank)), arranged(b, right, (*batch, rank, outputs))


def from_pair(a: Any, b: Any, axes: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
  """Factors as a `LoraWeight` over a kernel of this shape holds them; undoes `to_pair`."""
  (batch, inputs, outputs), (kernel, left, right) = letters(axes), subscripts(axes)
  rank = rank_letter(axes)
  size = dict(zip(kernel, shape[len(shape) - len(kernel) :], strict=True)) | {rank: a.shape[-1]}
  return (
    restored(a, left, (*batch, inputs, rank), size),
    restored(b, right, (*batch, rank, outputs), size),
  )


def wide(*arrays: Any) -> np.dtype:
  """The widest dtype of some arrays, at least float32."""
  dtype = np.dtype(np.float32)
  for x in arrays:
    dtype = np.promote_types(dtype, x.dtype)
  return dtype
