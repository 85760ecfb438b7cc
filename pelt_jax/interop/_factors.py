"""The low-rank part of weight nodes as plain arrays, in one form whatever the kernel's axes."""

from typing import Any, NamedTuple

import numpy as np

from pelt_jax._node import Weight, strip
from pelt_jax.nodes import DoraWeight, Dropout, Guard, Residual
from pelt_jax.nodes._axes import letters
from pelt_jax.nodes._pairs import pair_of

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


def factors(node: Any) -> Factors:
  """The change that one node adds to the leaf below it; of a residual, what it lacks.

  Raises:
    ValueError: saying why the change has no such form.
  """
  try:
    pair = pair_of(node)
  except ValueError as error:
    raise ValueError(f"{error}; merge it (pelt.merge) or save it with pelt.save") from None
  batch, _, outputs = letters(pair.axes)
  if len(batch) > 1:
    raise ValueError(f"it has {len(batch)} batch axes ({pair.axes!r}), PEFT knows one (experts)")
  first = pair.axes.partition(":")[0].replace(batch, "")[0]
  a, b, scaling = (np.asarray(x) for x in (pair.a, pair.b, pair.scaling))
  rate = _rate(getattr(node, "dropout", None))
  return Factors(a, b, scaling, rate, bool(batch), first in outputs)


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
