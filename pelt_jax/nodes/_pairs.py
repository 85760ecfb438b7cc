"""The changes of low-rank weight nodes as matrices, whatever the kernel's axes."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pelt_jax._leaf import lowest
from pelt_jax.nodes._lora import FusedLora, LoraWeight, _rank_letter, _subscripts
from pelt_jax.nodes._tuned import Guard


class Pair(NamedTuple):
  """A change `scaling * a @ b` of one leaf, layers first if it is stacked.

  Attributes:
    a: ([layers], [experts], in, rank).
    b: ([layers], [experts], rank, out).
    scaling: ([layers],).
    axes: those of the kernel and of the factors, as in `LoraWeight`.
  """

  a: Any
  b: Any
  scaling: Any
  axes: str

  @property
  def rank(self) -> int:
    """Number of components."""
    return self.a.shape[-1]


@functools.singledispatch
def pair_of(node: Any) -> Pair:
  """The change that one node adds to the leaf below it. Classes register here.

  Raises:
    ValueError: saying that the change has no such form.
  """
  raise ValueError(f"a {type(node).__name__} is no LoRA pair")


@pair_of.register
def _(node: LoraWeight) -> Pair:
  batch, inputs, outputs = letters(node.axes)
  (_, a, b), rank = _subscripts(node.axes), _rank_letter(node.axes)
  return Pair(
    _grouped(node.array("a"), a, batch, inputs, rank),
    _grouped(node.array("b"), b, batch, rank, outputs),
    node.array("scaling"),
    node.axes,
  )


@pair_of.register
def _(node: FusedLora) -> Pair:
  """Block form: one a and one b of rank g * r, zeros where a part does not belong."""
  a, b = node.array("a"), node.array("b")
  groups, rank, width = b.shape[-3:]
  lead = b.shape[:-3]
  whole = jnp.zeros((*lead, groups * rank, node.parts * width), b.dtype)
  for g, part in enumerate(node.chosen):
    rows, columns = slice(g * rank, (g + 1) * rank), slice(part * width, (part + 1) * width)
    whole = whole.at[..., rows, columns].set(b[..., g, :, :])
  a = jnp.moveaxis(a, -3, -2).reshape(*lead, a.shape[-2], groups * rank)
  return Pair(a, whole, node.array("scaling"), "io:ir,ro" if node.fused else "oi:ir,ro")


def pairs_of(leaf: Any) -> list[Pair]:
  """The changes of all nodes on a leaf, innermost first; none on a plain or a 4-bit leaf.

  Raises:
    ValueError: if one of them is no LoRA pair.
  """
  found, below = [], lowest(leaf)
  while leaf is not below:
    if not isinstance(leaf, Guard):
      found.append(pair_of(leaf))
    leaf = leaf.base
  return found[::-1]


def letters(axes: str) -> tuple[str, str, str]:
  """The kernel's axes that count matrices (experts), its inputs and its outputs.

  >>> letters("CKDH:Dr,rCKH")
  ('', 'D', 'CKH')
  """
  kernel, a, b = _subscripts(axes)
  batch = "".join(c for c in kernel if c in a and c in b)
  return (
    batch,
    "".join(c for c in kernel if c in a and c not in batch),
    "".join(c for c in kernel if c in b and c not in batch),
  )


def to_matrices(kernel: jax.Array, axes: str) -> jax.Array:
  """A kernel as ([layers], [experts], in, out)."""
  return _grouped(kernel, _subscripts(axes)[0], *letters(axes))


def from_matrices(
  a: jax.Array, b: jax.Array, axes: str, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Factors as a `LoraWeight` over a kernel of this shape holds them; undoes `pair_of`."""
  (kernel, a_axes, b_axes), rank = _subscripts(axes), _rank_letter(axes)
  batch, inputs, outputs = letters(axes)
  size = dict(zip(kernel, shape[len(shape) - len(kernel) :], strict=True)) | {rank: a.shape[-1]}
  return (
    _ungrouped(a, a_axes, size, batch, inputs, rank),
    _ungrouped(b, b_axes, size, batch, rank, outputs),
  )


def _grouped(value: jax.Array, axes: str, batch: str, first: str, second: str) -> jax.Array:
  """Batch axes first, then two groups of axes, each flattened to one; stacked axes lead."""
  lead = value.ndim - len(axes)
  size = dict(zip(axes, value.shape[lead:], strict=True))
  value = value.transpose(*range(lead), *(lead + axes.index(c) for c in (*batch, *first, *second)))
  two = (math.prod(size[c] for c in group) for group in (first, second))
  return value.reshape(*value.shape[:lead], *(size[c] for c in batch), *two)


def _ungrouped(
  value: jax.Array, axes: str, size: dict[str, int], batch: str, first: str, second: str
) -> jax.Array:
  lead, order = value.shape[: value.ndim - len(batch) - 2], batch + first + second
  value = value.reshape(*lead, *(size[c] for c in order))
  return value.transpose(*range(len(lead)), *(len(lead) + order.index(c) for c in axes))
