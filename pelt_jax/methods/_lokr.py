"""LoKr: a Kronecker product of small matrices (LyCORIS, arXiv:2309.14859)."""

from collections.abc import Iterable
from typing import Any

import jax

from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, check_alpha, check_whole
from pelt_jax.methods._lora import _numbers
from pelt_jax.methods._matrices import Matrix, put, whole_matrices
from pelt_jax.nodes import LokrWeight

INITS = ("zero_w1", "lycoris")


def lokr(
  rank: int = 8,
  alpha: float | None = None,
  *,
  factor: int = -1,
  decompose_both: bool = False,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  init: str = "zero_w1",
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Adds `scaling * kron(w1, w2)` to weights: w1 (m, l), w2 (n, k), in = m n and out = l k.

  w2 is itself a product (n, rank) (rank, k), unless rank is at least half of n or k, the larger;
  so is w1 under `decompose_both`, unless rank is at least half of m or l. scaling = alpha / rank,
  also where both are whole (LyCORIS takes 1 there). w1, or the second factor of it, is zero at
  first ("zero_w1", as PEFT), or w2, or the first factor of it ("lycoris"); the others are uniform
  of bound 1/sqrt(fan_in), so the model computes what it computed before. l m + r (n + k)
  parameters per matrix, or l m + n k. The rank of the change is rank(w1) rank(w2).

  Args:
    rank: of what is decomposed, at least 1.
    alpha: numerator of the scaling; by default the rank, so that the scaling is 1.
    factor: m and l where they divide the matrix (else the largest divisor below, which is then
      the smaller one); -1 takes the divisors nearest to the square root.
    decompose_both: decompose w1 too.
    targets: roles, `"all-linear"`, or path patterns of modules or leaves.
    layers: layer numbers to keep; all by default.
    init: `"zero_w1"` or `"lycoris"`.
    dtype: dtype of the matrices; by default the leaf's, float32 over a quantized one.
    group: label of the matrices; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target matches nothing, is never called, trains
      already, or is a table or no single matrix.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(64), jnp.ones((2, 48))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lokr(rank=2, targets="kernel")
    >>> node = method.init(jax.random.key(1), params, pelt.sites(model, x))["kernel"]
    >>> node.w1.shape, node.w2_a.shape, node.w2_b.shape
    ((6, 8), (8, 2), (2, 8))
  """
  check_whole(rank=rank)
  check_alpha(alpha)
  if factor != -1:
    check_whole(factor=factor)
  if init not in INITS:
    raise ValueError(f"init must be one of {INITS}, got {init!r}")

  def of(matrix: Matrix, leaf: Any, key: jax.Array) -> LokrWeight:
    kind, wide = _numbers(leaf, dtype)
    shapes = lokr_shapes(matrix.inputs, matrix.outputs, rank, factor, decompose_both)
    zero = ("w1", "w1_b") if init == "zero_w1" else ("w2", "w2_a")
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    made = {
      name: matrix.full(shape, 0, kind)
      if name in zero
      else matrix.uniform(keys[name], shape, shape[0], kind)
      for name, shape in shapes.items()
    }
    return LokrWeight(
      leaf,
      None,
      matrix.axes,
      **{name: matrix.boxed(leaf, value, "mn") for name, value in made.items()},
      scaling=matrix.full((), (rank if alpha is None else alpha) / rank, wide),
      group=group,
      stacked=len(matrix.site.stacked),
    )

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    return put("lokr", key, params, whole_matrices("lokr", sites, targets, layers), of)

  return Transform(initialize)


def lokr_shapes(
  inputs: int, outputs: int, rank: int, factor: int, decompose_both: bool
) -> dict[str, tuple[int, int]]:
  """The matrices of one kernel, (in, out) each, by field.

  >>> lokr_shapes(48, 64, 2, -1, True)
  {'w1_a': (6, 2), 'w1_b': (2, 8), 'w2_a': (8, 2), 'w2_b': (2, 8)}
  """
  (m, n), (left, k) = divisors(inputs, factor), divisors(outputs, factor)
  first = decompose_both and rank < max(left, m) / 2
  second = rank < max(k, n) / 2
  one = {"w1_a": (m, rank), "w1_b": (rank, left)} if first else {"w1": (m, left)}
  return one | ({"w2_a": (n, rank), "w2_b": (rank, k)} if second else {"w2": (n, k)})


def divisors(size: int, factor: int = -1) -> tuple[int, int]:
  """Two numbers whose product is `size`.

  `factor` comes first if it divides size. Else it bounds the first, smaller number from above, and
  -1 does not: they are as near to each other as can be found by going from divisor to divisor
  while the sum falls.

  >>> divisors(768), divisors(4096, 1024), divisors(768, 7), divisors(127)
  ((24, 32), (1024, 4), (6, 128), (1, 127))
  """
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  first = 1
  for low in range(2, size + 1):
    if first >= size // first:
      break
    if size % low:
      continue
    if low + size // low > first + size // first or (factor > 0 and low > factor):
      break
    first = low
  return min(first, size // first), max(first, size // first)
