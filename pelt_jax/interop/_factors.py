"""The low-rank part of weight nodes as plain arrays, in one form whatever the kernel's axes."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from pelt_jax._node import Weight, strip
from pelt_jax.nodes import Dropout, FusedLora, Guard, LoraWeight

# Weights under a LoRA that stand for the base itself, only stored in another way.
QUANTIZED = ("NF4Weight",)


class Factors(NamedTuple):
  """A change `scaling * a @ b` of one leaf, layers first if it is scanned.

  Attributes:
    a: ([layers], [experts], in, rank).
    b: ([layers], [experts], rank, out).
    scaling: ([layers],).
    rate: ([layers],) dropout, None for none.
    experts: whether there is an axis of experts.
    out_first: whether the leaf's out axis comes before its in axis.
  """

  a: np.ndarray
  b: np.ndarray
  scaling: np.ndarray
  rate: np.ndarray | None
  experts: bool = False
  out_first: bool = False

  def layer(self, i: int | None) -> "Factors":
    """One layer, without the components that are zero on both sides (padding of a scan)."""
    if i is None:
      return self
    one = Factors(
      self.a[i],
      self.b[i],
      self.scaling[i],
      None if self.rate is None else self.rate[i],
      self.experts,
      self.out_first,
    )
    used = _any_but(one.a, -1) | _any_but(one.b, -2)
    return one._replace(a=one.a[..., used], b=one.b[..., used, :])

  @property
  def rank(self) -> int:
    """Number of components."""
    return self.a.shape[-1]


def _any_but(x: np.ndarray, axis: int) -> np.ndarray:
  return np.any(x != 0, axis=tuple(i for i in range(x.ndim) if i != axis % x.ndim))


@functools.singledispatch
def factors(node: Any) -> Factors:
  """The change that one node adds to the leaf below it. Classes register here.

  Raises:
    ValueError: saying why the change has no such form.
  """
  raise ValueError(
    f"a {type(node).__name__} is no LoRA pair; merge it (pelt.merge) or save it with pelt.save"
  )


@factors.register
def _(node: LoraWeight) -> Factors:
  kernel, _, ab = node.axes.partition(":")
  a_axes, _, b_axes = ab.partition(",")
  batch = [c for c in kernel if c in a_axes and c in b_axes]
  inputs = [c for c in kernel if c in a_axes and c not in batch]
  outputs = [c for c in kernel if c in b_axes and c not in batch]
  if len(batch) > 1:
    raise ValueError(f"it has {len(batch)} batch axes ({node.axes!r}), PEFT knows one (experts)")
  rank = next(c for c in a_axes if c not in kernel)
  a = _arranged(node, "a", a_axes, batch, [inputs, [rank]])
  b = _arranged(node, "b", b_axes, batch, [[rank], outputs])
  first = kernel.replace(batch[0], "") if batch else kernel
  return Factors(a, b, *_numbers(node), bool(batch), first[0] in outputs)


@factors.register
def _(node: FusedLora) -> Factors:
  """Block form: one a and one b of rank g * r, zeros where a part does not belong."""
  a, b = np.asarray(node.array("a")), np.asarray(node.array("b"))
  groups, rank, width = b.shape[-3:]
  lead = b.shape[:-3]
  a = np.moveaxis(a, -3, -2).reshape(*lead, a.shape[-2], groups * rank)
  whole = np.zeros((*lead, groups * rank, node.parts * width), b.dtype)
  for g, part in enumerate(node.chosen):
    rows, columns = slice(g * rank, (g + 1) * rank), slice(part * width, (part + 1) * width)
    whole[..., rows, columns] = b[..., g, :, :]
  return Factors(a, whole, *_numbers(node), False, node.fused == 0)


def _arranged(
  node: LoraWeight, name: str, axes: str, batch: list[str], groups: list[list[str]]
) -> np.ndarray:
  """A factor with its axes in order, each group flattened to one axis, stacked axes first."""
  value = np.asarray(node.array(name))
  lead = node.stacked
  order = [lead + axes.index(c) for c in (*batch, *(c for g in groups for c in g))]
  value = value.transpose(*range(lead), *order)
  size = dict(zip(axes, np.asarray(node.array(name)).shape[lead:], strict=True))
  shape = [size[c] for c in batch] + [math.prod(size[c] for c in g) for g in groups]
  return value.reshape(*value.shape[:lead], *shape)


def _numbers(node: LoraWeight | FusedLora) -> tuple[np.ndarray, np.ndarray | None]:
  if node.dropout is None:
    return np.asarray(node.array("scaling")), None
  if not isinstance(node.dropout, Dropout):
    raise ValueError(f"its dropout is a {type(node.dropout).__name__}, PEFT has a rate only")
  return np.asarray(node.array("scaling")), np.asarray(node.dropout.array("rate"))


def all_factors(value: Any) -> list[Factors]:
  """The changes of all low-rank nodes on one leaf, innermost first; empty for a plain leaf."""
  found = []
  while isinstance(value, Weight) and type(value).__name__ not in QUANTIZED:
    if not isinstance(value, Guard):
      found.append(factors(value))
    value = value.inner
  return found[::-1]


def combined(terms: list[Factors]) -> Factors:
  """Several changes as one: ranks are joined, differing scalings go into b."""
  if len(terms) == 1:
    return terms[0]
  s = terms[0].scaling
  a = np.concatenate([t.a for t in terms], -1)
  # A ratio of one is not multiplied: equal scalings stay exact to the bit.
  b = [t.b if t.scaling == s else (t.b * (t.scaling / s)).astype(t.b.dtype) for t in terms]
  rates = {0.0 if t.rate is None else float(t.rate) for t in terms}
  if len(rates) > 1:
    raise ValueError(f"its LoRAs have different dropouts {sorted(rates)}, PEFT has one for all")
  if len({(t.experts, t.out_first) for t in terms}) > 1:
    raise ValueError("its LoRAs read the leaf's axes in different ways")
  return terms[0]._replace(a=a, b=np.concatenate(b, -2))


def plain(value: Any) -> Any:
  """The array under guards, without boxes."""
  while isinstance(value, Guard):
    value = value.base
  return strip(value)
