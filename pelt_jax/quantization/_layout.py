"""How the 4-bit codes of a kernel lie, and what they stand for."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._save import fingerprint
from pelt_jax.quantization._blocks import (
  decode_scales,
  encode,
  encode_scales,
  lookup,
  pack_bytes,
  pack_words,
  unpack_bytes,
  unpack_words,
)
from pelt_jax.quantization._code_books import CODE_BOOKS, CodeBook, code_book

LAYOUTS = ("rows", "words", "flat")


class Plan(NamedTuple):
  """All that shapes the program of a quantized kernel; see `NF4Weight`."""

  sizes: tuple[int, ...]
  kind: str
  order: tuple[int, ...]
  inputs: int
  book: str | tuple[float, ...]
  block: int
  double: bool
  layout: str

  @property
  def matrix(self) -> tuple[int, int]:
    """Outputs and inputs."""
    cut = len(self.order) - self.inputs
    sizes = [self.sizes[i] for i in self.order]
    return math.prod(sizes[:cut]), math.prod(sizes[cut:])

  @property
  def code_book(self) -> CodeBook:
    return CODE_BOOKS[self.book] if isinstance(self.book, str) else code_book(self.book)


def fitting(layout: str | None, inputs: int, block: int) -> str:
  """The layout that was asked for, the platform's, or "flat" where blocks cross rows."""
  layout = layout or ("rows" if jax.default_backend() == "gpu" else "words")
  return "flat" if inputs % block else layout


def coded(plan: Plan, kernel: jax.Array) -> dict[str, jax.Array]:
  """The arrays of one layer's node."""
  rows, columns = plan.matrix
  matrix = kernel.transpose(plan.order).reshape(rows, columns)
  codes, scales = encode(matrix.reshape(-1), plan.code_book, plan.block)
  made: dict[str, jax.Array] = {"source": fingerprint(kernel)}
  if plan.double:
    made["offset"] = jnp.mean(scales)
    scales, made["nested"] = encode_scales(scales, made["offset"])
  return made | packed(plan, codes, scales)


def packed(plan: Plan, codes: jax.Array, scales: jax.Array) -> dict[str, jax.Array]:
  """Codes and scales in order of the rows, as the layout has them."""
  rows, columns = plan.matrix
  zero = plan.code_book.zero
  if plan.layout == "flat":
    return {"codes": pack_bytes(codes, zero), "scales": scales}
  codes, scales = codes.reshape(rows, columns), scales.reshape(rows, -1)
  if plan.layout == "words":
    return {"codes": pack_words(codes.T), "scales": scales.T}
  return {"codes": pack_bytes(codes, zero), "scales": scales}


def unpacked(plan: Plan, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """What `packed` was given."""
  rows, columns = plan.matrix
  codes, scales = arrays["codes"], arrays["scales"]
  if plan.layout == "words":
    codes, scales = unpack_words(codes).reshape(-1, rows).T, scales.T
  else:
    codes = unpack_bytes(codes)
  return codes.reshape(-1)[: rows * columns], scales.reshape(-1)


def scales_of(plan: Plan, arrays: dict[str, jax.Array]) -> jax.Array:
  """The scales as numbers, as the layout has them."""
  scales = arrays["scales"]
  if not plan.double:
    return scales
  axis = "F" if plan.layout == "words" else "C"  # coded in order of the rows, words' columns
  decoded = decode_scales(scales.reshape(-1, order=axis), arrays["nested"], arrays["offset"])
  return decoded.reshape(scales.shape, order=axis)


def dequantize(plan: Plan, arrays: dict[str, jax.Array]) -> jax.Array:
  """The kernel, in its own dtype and axes."""
  rows, columns = plan.matrix
  words = plan.layout == "words"
  codes, scales = arrays["codes"], scales_of(plan, arrays)
  codes = unpack_words(codes) if words else unpack_bytes(codes)
  values = lookup(np.asarray(plan.code_book.values, np.float32), codes)
  cut, order = len(plan.order) - plan.inputs, plan.order
  # A scale per word or byte: where devices share a block, each has all that its codes need.
  if words:
    matrix = values * jnp.repeat(scales, plan.block // 8, axis=0)[:, None, :]
    order = (*plan.order[cut:], *plan.order[:cut])
  else:
    flat = plan.layout == "flat"
    scales = jnp.repeat(scales, plan.block // 2, axis=-1)
    matrix = values * (scales[: len(values)] if flat else scales)[..., None]
    matrix = matrix.reshape(-1)[: rows * columns] if flat else matrix
  kernel = jnp.asarray(matrix, plan.kind).reshape([plan.sizes[i] for i in order])
  return kernel.transpose(np.argsort(order))
