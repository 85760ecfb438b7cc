"""A weight of 4-bit codes (QLoRA, arXiv:2305.14314)."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pelt_jax._node import Weight, contract, derived, extra, static, strip
from pelt_jax._save import fingerprint
from pelt_jax._shardings import fitted
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
_TILE = 2**21  # bytes of a dequantized part that a CPU multiplies
_FEW = 32  # tokens, beyond which a product outweighs what its kernel costs


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


class NF4Weight(Weight):
  """A frozen kernel as 4-bit codes: W = values[code] * scale of its block.

  The kernel lies as a torch weight does, a matrix (outputs, inputs), whose numbers are coded row by
  row in blocks. How codes are packed depends on `layout`; what they stand for does not:

  | layout | codes | scales |
  |---|---|---|
  | `"rows"` | uint8 (outputs, inputs / 2) | (outputs, inputs / block) |
  | `"words"` | uint32 (inputs / 8, outputs) | (inputs / block, outputs) |
  | `"flat"` | uint8 (ceil(n / 2),) | (ceil(n / block),) |

  A product keeps the codes alone from forward to backward: the backward pass dequantizes again.

  Attributes:
    codes: the packed codes.
    scales: float32; under double quantization uint8 codes of scales - offset.
    nested: None, or (ceil(blocks / 256),) float32 scales of the scales, in order of the rows.
    offset: None, or (), the mean of the scales.
    source: fingerprint of the kernel that was quantized, (); one per stacked layer.
    sizes: the kernel's shape.
    kind: name of its dtype, to which what codes stand for is rounded.
    order: the kernel's axes as the matrix has them, outputs first.
    inputs: how many of them are inputs.
    book: name of a code book, or its values.
    block: numbers that share a scale.
    layout: as above.
    double: whether scales are quantized again.
  """

  codes: Any = derived()
  scales: Any = derived()
  nested: Any = derived()
  offset: Any = derived()
  source: Any = extra()
  sizes: tuple[int, ...] = static(())
  kind: str = static("float32")
  order: tuple[int, ...] = static((1, 0))
  inputs: int = static(1)
  book: str | tuple[float, ...] = static("nf4")
  block: int = static(64)
  layout: str = static("rows")
  double: bool = static(default=False)

  @property
  def plan(self) -> Plan:
    """The static fields."""
    return Plan(*(getattr(self, name) for name in Plan._fields))

  @property
  def shape(self) -> tuple[int, ...]:
    return (*jnp.shape(strip(self.codes))[: self.stacked], *self.sizes)

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.kind)

  def materialize(self) -> jax.Array:
    whole = functools.partial(_dequantize, self.plan)
    for _ in range(self.stacked):
      whole = jax.vmap(whole)
    return whole(jax.lax.stop_gradient(self._arrays()))

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    how = (eq, self.plan, precision, x.shape, x.dtype, self.places(call))
    return _product(how, x, self._arrays())

  def rebuild(self, source: Any) -> Self:
    made: Any
    source = strip(source)
    if isinstance(source, NF4Weight):
      if source.plan != self.plan:
        raise ValueError(f"it is quantized as {source.plan}, the adapter's base was as {self.plan}")
      made = source
    elif str(source.dtype) != self.kind:
      raise ValueError(f"it was {self.kind} when it was quantized and is {source.dtype} now")
    else:
      made = self.replace(**_stacked(self.plan, source, self.stacked))
    if not bool(jnp.array_equal(made.source, self.source)):
      raise ValueError("it holds other values. Load the base that the adapter was trained on")
    return made

  def changed(self) -> int:
    return 0

  def specs(self, spec: tuple, tensor: tuple) -> Self:
    P = jax.sharding.PartitionSpec
    lead, kernel = spec[: self.stacked], spec[self.stacked :]
    cut = len(self.order) - self.inputs
    axes = [kernel[i] for i in self.order]
    rows, columns = _joined(axes[:cut]), _joined(axes[cut:])
    two = {"rows": (rows, columns), "words": (columns, rows), "flat": (rows,)}[self.layout]
    return (
      super()
      .specs(spec, tuple(lead) + (None,) * len(kernel))
      .replace(codes=P(*lead, *two), scales=P(*lead, *two))
    )

  def places(self, call: Any) -> tuple:
    """How the arrays lie while a product uses them: (name, sharding) each, if that was said."""
    wanted = None if call is None else call.sharding
    if wanted is None:
      return ()
    spec = tuple(wanted.spec)
    found = fitted(self, self.specs(spec, spec), wanted.mesh)
    return tuple((name, getattr(found, name)) for name in self._arrays())

  def placed(self, places: tuple) -> Self:
    """The node with its arrays where `places` says."""
    return self.replace(**_placed(self._arrays(), places))

  def numbers(self) -> jax.Array:
    """The codes of one layer, uint8, in order of the rows."""
    return unpacked(self.plan, self._arrays())[0]

  def _arrays(self) -> dict[str, jax.Array]:
    names = ("codes", "scales", "nested", "offset")
    return {n: self.array(n) for n in names if getattr(self, n) is not None}


def _joined(axes: Sequence[Any]) -> Any:
  """The mesh axes of several kernel axes that lie as one."""
  names = [n for a in axes for n in (a if isinstance(a, tuple) else (a,)) if n is not None]
  return tuple(names) if len(names) > 1 else (names[0] if names else None)


def quantize(
  kernel: Any,
  *,
  book: str | Sequence[float] = "nf4",
  block: int = 64,
  double_quant: bool = False,
  layout: str | None = None,
  outputs: Sequence[int] | None = None,
  stacked: int = 0,
) -> NF4Weight:
  """Quantizes a kernel to 4 bits a number.

  scale_b = max |W| over block b; code = index of the value nearest to W / scale_b (a middle goes
  down). A block is `block` numbers along the kernel's inputs, as in bitsandbytes.

  Args:
    kernel: (inputs, outputs), or of any shape with `outputs`.
    book: `"nf4"`, `"fp4"`, another of `CODE_BOOKS`, or 2 to 16 numbers of your own.
    block: numbers that share a scale, a power of two from 32 to 4096.
    double_quant: code scales in 8 bits: 4.127 bits a parameter instead of 4.5.
    layout: `"rows"`, `"words"` or `"flat"`, see `NF4Weight`; by default `"rows"` on GPU, else
      `"words"`. Where blocks cross rows it is `"flat"`.
    outputs: which axes of the kernel are outputs; by default the last.
    stacked: leading axes that count layers, which are quantized one by one.

  Returns:
    An `NF4Weight`; `materialize()` gives what it stands for.

  Raises:
    TypeError: if the kernel is no array of floats.
    ValueError: for a bad option; for infinities or NaNs, where values are known.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> w = pelt.quantization.quantize(jnp.array([[1.0], [-1.0], [0.0], [0.5626]]), layout="flat")
    >>> [hex(b) for b in w.codes.tolist()], w.materialize()[:, 0].tolist()
    (['0xf0', '0x7d'], [1.0, -1.0, 0.0, 0.5626170039176941])
  """
  kernel = strip(kernel)
  if not hasattr(kernel, "dtype") or not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise TypeError(f"kernel must be an array of floats, got {type(kernel).__name__} {kernel!r}")
  sizes = tuple(jnp.shape(kernel)[stacked:])
  axes = range(len(sizes))
  given = tuple(outputs) if outputs is not None else tuple(axes[-1:])
  if not given or len(set(given)) < len(given) or not set(given) <= set(axes):
    raise ValueError(f"outputs must name some of the kernel's axes {list(axes)}, got {outputs}")
  rest = tuple(i for i in axes if i not in given)
  check_options(book, block, layout)
  plan = Plan(
    sizes,
    str(kernel.dtype),
    (*given, *rest),
    len(rest),
    book if isinstance(book, str) else tuple(float(v) for v in book),
    block,
    bool(double_quant),
    fitting(layout, math.prod(sizes[i] for i in rest), block),
  )
  if not isinstance(kernel, Tracer) and not bool(jnp.isfinite(kernel).all()):
    raise ValueError("kernel holds infinities or NaNs, which no code stands for")
  made = _stacked(plan, kernel, stacked)
  return NF4Weight(**made, **plan._asdict(), group=None, stacked=stacked)


def check_options(book: Any, block: Any, layout: Any) -> None:
  """Raises ValueError for a bad option of `quantize`."""
  if isinstance(book, str) and book not in CODE_BOOKS:
    raise ValueError(f"book={book!r}: known are {', '.join(CODE_BOOKS)}; or pass 2 to 16 numbers")
  if not isinstance(book, str):
    code_book(book)
  if block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
    raise ValueError(f"block must be a power of two from 32 to 4096, got {block!r}")
  if layout is not None and layout not in LAYOUTS:
    raise ValueError(f"layout must be one of {LAYOUTS}, or None for the platform's, got {layout!r}")


def fitting(layout: str | None, inputs: int, block: int) -> str:
  """The layout that was asked for, the platform's, or "flat" where blocks cross rows."""
  layout = layout or ("rows" if jax.default_backend() == "gpu" else "words")
  return "flat" if inputs % block else layout


@functools.partial(jax.jit, static_argnums=(0, 2))
def _stacked(plan: Plan, kernel: jax.Array, stacked: int) -> dict[str, jax.Array]:
  """The arrays of a node, layer by layer."""
  one = functools.partial(coded, plan)
  for _ in range(stacked):
    one = functools.partial(jax.lax.map, one)
  return one(kernel)


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


def _scales(plan: Plan, arrays: dict[str, jax.Array]) -> jax.Array:
  """The scales as numbers, as the layout has them."""
  scales = arrays["scales"]
  if not plan.double:
    return scales
  axis = "F" if plan.layout == "words" else "C"  # coded in order of the rows, words' columns
  decoded = decode_scales(scales.reshape(-1, order=axis), arrays["nested"], arrays["offset"])
  return decoded.reshape(scales.shape, order=axis)


def _dequantize(plan: Plan, arrays: dict[str, jax.Array]) -> jax.Array:
  """The kernel, in its own dtype and axes."""
  rows, columns = plan.matrix
  words = plan.layout == "words"
  codes, scales = arrays["codes"], _scales(plan, arrays)
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


def _tiles(eq: str, plan: Plan, x: jax.Array) -> int:
  """In how many parts a CPU multiplies few tokens: each part's kernel stays in the cache.

  A kernel of 16 MB that is written, read and packed for 16 tokens costs 1.5 times as much.
  """
  inputs, kernel, out = eq.replace("->", ",").split(",")
  cut = len(plan.order) - plan.inputs
  letter = kernel[plan.order[cut]]
  size, width = plan.sizes[plan.order[cut]], plan.matrix[1]
  tokens = x.size // width
  apart = plan.layout == "words" and letter in inputs and letter not in out
  if not apart or tokens > _FEW or jnp.finfo(x.dtype).bits < 32:
    return 1
  wanted = math.prod(plan.sizes) * x.dtype.itemsize // _TILE
  fits = lambda n: size % n == 0 and width // n % plan.block == 0
  return max((n for n in range(1, wanted + 1) if fits(n)), default=1)


def _by_tiles(
  eq: str, plan: Plan, precision: Any, tiles: int, x: jax.Array, arrays: dict[str, jax.Array]
) -> jax.Array:
  """The product as a sum over parts of the kernel's first input axis."""
  inputs, kernel, _ = eq.replace("->", ",").split(",")
  cut = plan.order[len(plan.order) - plan.inputs]
  axis = x.ndim - len(inputs) + inputs.index(kernel[cut])
  sizes = tuple(n // tiles if i == cut else n for i, n in enumerate(plan.sizes))
  part = plan._replace(sizes=sizes, double=False)
  lie = {"codes": arrays["codes"], "scales": _scales(plan, arrays)}

  def taken(x: jax.Array, i: jax.Array, axis: int = 0) -> jax.Array:
    size = x.shape[axis] // tiles
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

  def term(i: jax.Array) -> jax.Array:
    w = _dequantize(part, {n: taken(v, i) for n, v in lie.items()})
    return contract(eq, taken(x, i, axis), w, precision)

  zero = jnp.zeros_like(jax.eval_shape(term, 0))
  return jax.lax.fori_loop(0, tiles, lambda i, y: y + term(i), zero)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: tuple, x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
  eq, plan, precision, *_, places = how
  whole = lambda x, arrays: contract(eq, x, _dequantize(plan, _placed(arrays, places)), precision)
  tiles = 1 if places else _tiles(eq, plan, x)
  if tiles == 1:
    return whole(x, arrays)
  by_tiles = functools.partial(_by_tiles, eq, plan, precision, tiles)
  return jax.lax.platform_dependent(x, arrays, cpu=by_tiles, default=whole)


def _forward(how: tuple, x: jax.Array, arrays: dict[str, jax.Array]) -> tuple:
  return _product(how, x, arrays), arrays


def _backward(how: tuple, arrays: dict[str, jax.Array], g: Any) -> tuple:
  eq, plan, precision, shape, dtype, places = how
  # Without the barrier XLA would find that the forward pass dequantized already, and keep that.
  arrays, g = jax.lax.optimization_barrier((arrays, g))
  kernel = _dequantize(plan, _placed(arrays, places))
  dx = to_input(eq, kernel, precision, jax.ShapeDtypeStruct(shape, dtype), g)
  return dx, jax.tree.map(_no_gradient, arrays)


def to_input(eq: str, kernel: jax.Array, precision: Any, x: Any, g: jax.Array) -> jax.Array:
  """The gradient of a product with respect to `x`, of which shape and dtype are given."""
  (dx,) = jax.linear_transpose(lambda x: contract(eq, x, kernel, precision), x)(g)
  return dx


def _placed(arrays: dict[str, jax.Array], places: tuple) -> dict[str, jax.Array]:
  """The codes brought together, so that devices exchange them and not what they stand for."""
  return {**arrays, **{n: jax.lax.with_sharding_constraint(arrays[n], at) for n, at in places}}


def _no_gradient(x: jax.Array) -> Any:
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)
