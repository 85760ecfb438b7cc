"""The low-rank part of weight nodes as plain arrays, in one form whatever the kernel's axes."""

import functools
from typing import Any, NamedTuple

import numpy as np

from pelt_jax._node import Weight, strip
from pelt_jax.nodes import Dropout, FusedLora, Guard, LoraWeight
from pelt_jax.nodes._pairs import letters, pair_of

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


@factors.register(LoraWeight)
@factors.register(FusedLora)
def _(node: LoraWeight | FusedLora) -> Factors:
  pair = pair_of(node)
  batch, _, outputs = letters(pair.axes)
  if len(batch) > 1:
    raise ValueError(f"it has {len(batch)} batch axes ({pair.axes!r}), PEFT knows one (experts)")
  first = pair.axes.partition(":")[0].replace(batch, "")[0]
  a, b = np.asarray(pair.a), np.asarray(pair.b)
  return Factors(a, b, *_numbers(node), bool(batch), first in outputs)


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
