"""The changes of low-rank weight nodes as matrices, whatever the kernel's axes."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from pelt_jax._leaf import lowest
from pelt_jax.nodes._axes import to_pair
from pelt_jax.nodes._lora import FusedLora, LoraWeight
from pelt_jax.nodes._residual import Residual
from pelt_jax.nodes._svd import SvdWeight
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
  a, b = to_pair(node.array("a"), node.array("b"), node.axes)
  return Pair(a, b, node.array("scaling"), node.axes)


@pair_of.register
def _(node: SvdWeight) -> Pair:
  return pair_of(node.lora)


@pair_of.register
def _(node: Residual) -> Pair:
  """What it lacks of the weight, with its sign."""
  a, b = to_pair(node.array("a"), node.array("b"), node.axes)
  return Pair(a, -b, node.array("scaling"), node.axes)


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
