"""The low-rank part of weight nodes as plain arrays, in one form whatever the kernel's axes."""

import functools
from typing import Any, NamedTuple

import numpy as np

from pelt_jax._node import Weight, strip
from pelt_jax.nodes import DoraWeight, Dropout, FusedLora, Guard, LoraWeight, Residual
from pelt_jax.nodes._lora import _rank_letter, _subscripts
from pelt_jax.nodes._matrix import arranged, parts

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
  return _pair(node, _rate(node.dropout))


@factors.register
def _(node: Residual) -> Factors:
  """What it lacks of the weight, with its sign."""
  pair = _pair(node, None)
  return pair._replace(b=-pair.b)


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
  scaling = np.asarray(node.array("scaling"))
  return Factors(a, whole, scaling, _rate(node.dropout), False, node.fused == 0)


def _pair(node: LoraWeight | Residual, rate: np.ndarray | None) -> Factors:
  batch, inputs, outputs = parts(node.axes)
  if len(batch) > 1:
    raise ValueError(f"it has {len(batch)} batch axes ({node.axes!r}), PEFT knows one (experts)")
  (kernel, left, right), rank = _subscripts(node.axes), _rank_letter(node.axes)
  a, b = (np.asarray(node.array(n)) for n in "ab")
  a = arranged(a, left, (*batch, inputs, rank), node.stacked)
  b = arranged(b, right, (*batch, rank, outputs), node.stacked)
  out_first = next(c for c in kernel if c not in batch) in outputs
  return Factors(a, b, np.asarray(node.array("scaling")), rate, bool(batch), out_first)


def _rate(dropout: Any) -> np.ndarray | None:
  if dropout is None:
    return None
  if not isinstance(dropout, Dropout):
    raise ValueError(f"its dropout is a {type(dropout).__name__}, PEFT has a rate only")
  return np.asarray(dropout.array("rate"))


def magnitude(value: DoraWeight, layer: int | None) -> np.ndarray:
  """The magnitudes of one layer, (out,)."""
  whole = np.asarray(value.array("magnitude"))
  return (whole if layer is None else whole[layer]).reshape(-1)


def all_factors(value: Any) -> list[Factors]:
  """The changes of all low-rank nodes on one leaf, innermost first; empty for a plain leaf.

  Those below magnitudes have their dropout. What a residual lacks is a change from the weight
  that files are for, with the dropout of the LoRA above it, as PEFT converts one.
  """
  if isinstance(value, DoraWeight):
    return [f._replace(rate=_rate(value.dropout)) for f in all_factors(value.base)]
  found = []
  while isinstance(value, Weight) and type(value).__name__ not in QUANTIZED:
    if isinstance(value, Residual) and found:
      found.append(factors(value)._replace(rate=found[-1].rate))
    elif not isinstance(value, Guard):
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
