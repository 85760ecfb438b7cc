"""A weight of 4-bit codes (QLoRA, arXiv:2305.14314)."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pelt_jax._node import Weight, derived, extra, static, strip
from pelt_jax._shardings import fitted
from pelt_jax.quantization._code_books import CODE_BOOKS, code_book
from pelt_jax.quantization._layout import LAYOUTS, Plan, coded, dequantize, fitting, unpacked
from pelt_jax.quantization._product import placed, product


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
    whole = functools.partial(dequantize, self.plan)
    for _ in range(self.stacked):
      whole = jax.vmap(whole)
    return whole(jax.lax.stop_gradient(self._arrays()))

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    how = (eq, self.plan, precision, x.shape, x.dtype, self.places(call))
    return product(how, x, self._arrays())

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
    return self.replace(**placed(self._arrays(), places))

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


@functools.partial(jax.jit, static_argnums=(0, 2))
def _stacked(plan: Plan, kernel: jax.Array, stacked: int) -> dict[str, jax.Array]:
  """The arrays of a node, layer by layer."""
  one = functools.partial(coded, plan)
  for _ in range(stacked):
    one = functools.partial(jax.lax.map, one)
  return one(kernel)
