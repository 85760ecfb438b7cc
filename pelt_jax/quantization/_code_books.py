"""Code books of 4 bits, and the 8-bit one for scales (QLoRA, arXiv:2305.14314)."""

import functools
import itertools
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class CodeBook(NamedTuple):
  """At most sixteen numbers, and which of them a number becomes.

  Attributes:
    values: the number of each code; a block's scale times it is what a code stands for.
    thresholds: ascending, one fewer than values: a number takes as its ordinal how many thresholds
      it exceeds, so at a threshold the lower one.
    order: code of each ordinal.
    scale: `"absmax"`, the largest magnitude of a block, or `"std"`, the standard deviation of the
      whole array.
  """

  values: tuple[float, ...]
  thresholds: tuple[float, ...]
  order: tuple[int, ...]
  scale: str = "absmax"

  @property
  def zero(self) -> int:
    """The code of 0."""
    return self.order[sum(t < 0 for t in self.thresholds)]


def code_book(values: Sequence[float]) -> CodeBook:
  """A code book in which every number becomes the nearest value.

  Args:
    values: 2 to 16 finite numbers, in any order, one per code.

  Raises:
    ValueError: for another number of values, or one that is not finite.
  """
  found = np.asarray(values, np.float32)
  if found.ndim != 1 or not 2 <= found.size <= 16 or not np.isfinite(found).all():
    raise ValueError(f"a code book holds 2 to 16 finite numbers, got {values!r}")
  order = np.argsort(found, kind="stable")
  ascending = found[order]
  middles = (ascending[1:] + ascending[:-1]) / np.float32(2)
  return CodeBook(tuple(found.tolist()), tuple(middles.tolist()), tuple(order.tolist()))


# Quantiles of N(0, 1) so spaced that 0 and the ends are exact: seven below zero, eight above. The
# values are those of bitsandbytes to the bit.
NF4 = code_book(
  (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
  )
)


def _signed(magnitudes: Sequence[float]) -> CodeBook:
  """A sign bit above codes of magnitudes."""
  return code_book((*magnitudes, *(-m for m in magnitudes)))


def _equal_shares() -> CodeBook:
  """Sixteen intervals that N(0, 1) fills alike, each becoming its mean; no zero among them."""
  normal = NormalDist()
  edges = [normal.inv_cdf(i / 16) for i in range(1, 16)]
  density = [0.0, *map(normal.pdf, edges), 0.0]
  means = [16 * (a - b) for a, b in itertools.pairwise(density)]
  to32 = lambda xs: tuple(np.asarray(xs, np.float32).tolist())
  return CodeBook(to32(means), to32(edges), tuple(range(16)), scale="std")


CODE_BOOKS = {
  "nf4": NF4,
  # That of bitsandbytes, by its codes.
  "fp4": _signed((0.0, 0.0052083335, 0.66666669, 1.0, 0.33333334, 0.5, 0.16666667, 0.25)),
  "fp4_e2m1": _signed([m / 6 for m in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]),
  "fp4_e3m0": _signed([0.0, *(2.0**k for k in range(-6, 1))]),
  "int4": code_book([i / 7 for i in range(-7, 8)]),
  "int4_full": code_book([i / 8 for i in range(-8, 8)]),
  "int4_uniform": code_book([-1 + 2 * i / 15 for i in range(16)]),
  "equal_shares": _equal_shares(),
}


@functools.cache
def dynamic_map() -> np.ndarray:
  """The 256 float32 numbers, ascending, in which scales are quantized again.

  For i = 0..6 the middles of 2^i equal parts of [0.1, 1], times 10^(i - 6), with both signs; 0 and
  1: an exponent in unary, the rest a linear fraction. -1 is not among them. Computed as
  bitsandbytes does in float32, whose `linspace` rounds once per number, from the nearer end.
  """
  found = [np.zeros(1, np.float32), np.ones(1, np.float32)]
  for i in range(7):
    n = 2**i + 1
    low, high = np.float32(0.1), np.float32(1)
    step = float(np.float32((high - low) / np.float32(n - 1)))
    ends = [float(low) + step * k if k < n // 2 else 1.0 - step * (n - 1 - k) for k in range(n)]
    edges = np.asarray(ends, np.float32)
    middles = (edges[1:] + edges[:-1]) / np.float32(2) * np.float32(10.0 ** (i - 6))
    found += [middles, -middles]
  return np.sort(np.concatenate(found))


@functools.cache
def dynamic_thresholds() -> np.ndarray:
  """The 255 middles between neighbours of `dynamic_map`, float32."""
  values = dynamic_map().astype(np.float64)
  return ((values[1:] + values[:-1]) / 2).astype(np.float32)


def bits(block: int, double_quant: bool, nested_block: int = 256) -> float:
  """Bits a parameter takes: 4.5 in blocks of 64, 4.126953125 with scales quantized again.

  >>> bits(64, False), bits(64, True)
  (4.5, 4.126953125)
  """
  scale = 8 + 32 / nested_block if double_quant else 32
  return 4 + scale / block
