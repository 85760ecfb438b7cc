"""Low-rank weight nodes (LoRA, arXiv:2106.09685, equation 3)."""

import functools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax import _call
from pelt_jax._leaf import materialize, product, table_rows
from pelt_jax._node import Branch, Node, Weight, base, extra, own, static


class Dropout(Node):
  """Inverted dropout with a mask of its own for every node, call, layer and row.

  Attributes:
    rate: (), the share of entries dropped.
    layer: None, or (L,) layer numbers under a scan, which may not split the random stream.
      Floats, so that whole-tree gradients stay defined.
  """

  rate: Any = extra()
  layer: Any = extra()

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    """`x` with entries dropped in training, `x` itself otherwise."""
    if call is None or not call.train:
      return x
    if self.layer is not None:
      call = call.salt(jnp.asarray(self.layer, jnp.int32))
    keep = 1.0 - jnp.asarray(self.rate, jnp.float32)
    mask = jax.random.bernoulli(call.rng(), keep, x.shape)
    return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


class LoraWeight(Weight):
  """`base + scaling * a @ b`, not built in the forward pass: `x @ base + ((x @ a) * scaling) @ b`.

  Attributes:
    base: (in, out) in the plain case, an array or another weight node.
    a: (in, rank).
    b: (rank, out).
    scaling: (), or one per stacked layer; alpha / rank. Or a branch that gives one from x: a gate.
    dropout: None or a `Dropout` for the input of `a` alone.
    axes: kernel axes : axes of a, axes of b. A letter in both a and b is a batch axis (experts).
    b_group: label of b where it is another than `group`.
  """

  base: Any = base()
  a: Any = own()
  b: Any = own()
  scaling: Any = extra()
  dropout: Any = extra()
  axes: str = static("io:ir,ro")
  b_group: str | None = static(default=None)

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    y = product(eq, x, self.base, _below(call), precision)
    plan = _plan(eq, self.axes)
    if plan is None:  # both factors hold a contracted axis: only the whole delta can be applied
      if isinstance(self.scaling, Branch):
        raise ValueError(f"a gated LoRA runs a product whose factors part, not {eq!r}")
      _refuse_dropout(self.dropout)
      return y + product(eq, x, jnp.asarray(self._delta(), x.dtype), call, precision)
    down, up, swapped = plan
    first, second = (self.array("b"), self.array("a"))[:: 1 if swapped else -1]
    h = x if self.dropout is None else self.dropout(call, x)
    h = _scaled(product(down, h, first, None, precision), _scale(self.scaling, call, x))
    return y + product(up, h, second, None, precision)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    rows = table_rows(self.base, ids, _below(call))
    h = jnp.take(jnp.asarray(self.array("a"), rows.dtype), ids, axis=0)
    h = _scaled(h, _scale(self.scaling, call, None))
    return rows + product("...i,io->...o", h, self.array("b"))

  def unmergeable(self) -> str | None:
    return _gated(self.scaling)

  def materialize(self) -> jax.Array:
    _refuse_dropout(self.dropout)
    if isinstance(self.scaling, Branch):
      return _ungated(self.base)
    # Not fused into one rounding: the sum is the same in whatever program it stands.
    whole, delta = jax.lax.optimization_barrier((materialize(self.base), self._delta()))
    wide = np.promote_types(whole.dtype, delta.dtype)
    return jnp.asarray(jnp.asarray(whole, wide) + jnp.asarray(delta, wide), whole.dtype)

  def rank(self) -> int:
    _, a, _ = subscripts(self.axes)
    rank = self.array("a").shape[self.stacked + a.index(rank_letter(self.axes))]
    return min(rank, *matrix_sizes(self.axes, self.shape[self.stacked :]))

  def specs(self, spec: tuple, tensor: tuple) -> "LoraWeight":
    return super().specs(spec, tensor).replace(**factor_specs(self.axes, self.stacked, tensor))

  def _delta(self) -> jax.Array:
    """The change, scaling * a @ b, in at least float32, with stacked axes."""
    kernel, a, b = subscripts(self.axes)
    dtype = np.promote_types(self.array("a").dtype, np.promote_types(self.dtype, jnp.float32))
    left, right = (jnp.asarray(self.array(n), dtype) for n in "ab")
    delta = jnp.einsum(f"...{a},...{b}->...{kernel}", left, right, precision="highest")
    scaling = jnp.asarray(self.scaling, dtype)
    return delta * scaling.reshape(scaling.shape + (1,) * len(kernel))


class LoraFaWeight(LoraWeight):
  """A LoRA whose `a` stays as it was drawn (LoRA-FA, arXiv:2308.03303): `b` alone trains."""

  a: Any = extra()


class FusedLora(Weight):
  """A LoRA of its own on some of the equal parts of a fused projection (query, key, value).

  The parts left out have a change of exactly zero. Same function as loralib's MergedLinear.

  Attributes:
    base: (in, parts * out), or with `fused=0` (parts * out, in).
    a: (g, in, rank), one per chosen part.
    b: (g, rank, out).
    scaling: (), or one per stacked layer; or a branch that gives one per chosen part from x.
    dropout: None or a `Dropout` for the input of `a`.
    chosen: which parts, g of them.
    parts: how many equal parts the fused axis has.
    fused: which axis of the kernel is fused.
    b_group: as of `LoraWeight`.
  """

  base: Any = base()
  a: Any = own()
  b: Any = own()
  scaling: Any = extra()
  dropout: Any = extra()
  chosen: tuple[int, ...] = static((0, 2))
  parts: int = static(3)
  fused: int = static(1)
  b_group: str | None = static(default=None)

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    y = product(eq, x, self.base, _below(call), precision)
    if eq not in ("...i,io->...o", "...i,oi->...o"):
      raise ValueError(f"FusedLora runs a plain product of the last axis, not {eq!r}")
    h = x if self.dropout is None else self.dropout(call, x)
    h = jnp.einsum("...i,gir->...gr", h, jnp.asarray(self.array("a"), x.dtype), precision=precision)
    scaling = _scale(self.scaling, call, x)
    h = _scaled(h, scaling[..., None] if isinstance(self.scaling, Branch) else scaling)
    h = jnp.einsum(
      "...gr,gro->...go", h, jnp.asarray(self.array("b"), x.dtype), precision=precision
    )
    return y + self._placed(h)

  def unmergeable(self) -> str | None:
    return _gated(self.scaling)

  def materialize(self) -> jax.Array:
    _refuse_dropout(self.dropout)
    if isinstance(self.scaling, Branch):
      return _ungated(self.base)
    whole = materialize(self.base)
    dtype = np.promote_types(self.array("a").dtype, np.promote_types(whole.dtype, jnp.float32))
    a, b = (jnp.asarray(self.array(n), dtype) for n in "ab")
    scaling = jnp.asarray(self.scaling, dtype)
    delta = jnp.einsum("...gir,...gro->...igo", a, b, precision="highest")
    delta = self._placed(delta * scaling.reshape(scaling.shape + (1, 1, 1)))
    whole, delta = jax.lax.optimization_barrier((whole, delta))
    delta = delta if self.fused == 1 else jnp.swapaxes(delta, -1, -2)
    return jnp.asarray(jnp.asarray(whole, dtype) + delta, whole.dtype)

  def specs(self, spec: tuple, tensor: tuple) -> "FusedLora":
    *lead, first, second = tensor
    a = jax.sharding.PartitionSpec(*lead, None, first if self.fused else second, None)
    return super().specs(spec, tensor).replace(a=a)

  def rank(self) -> int:
    return min(len(self.chosen) * self.array("b").shape[-2], *self.shape[-2:])

  def changed(self) -> int:
    return 0 if self.group is None else super().changed() * len(self.chosen) // self.parts

  def _placed(self, h: jax.Array) -> jax.Array:
    """(..., g, out) -> (..., parts * out), zeros in the parts left out."""
    zero = jnp.zeros_like(h[..., 0, :])
    pieces = [
      h[..., self.chosen.index(p), :] if p in self.chosen else zero for p in range(self.parts)
    ]
    return jnp.concatenate(pieces, axis=-1)


def _scaled(h: jax.Array, scaling: jax.Array) -> jax.Array:
  """`h * scaling`, rounded once: 8/3 in bfloat16 would be 0.2 % off."""
  scaling = jnp.asarray(scaling)
  wide = np.promote_types(h.dtype, scaling.dtype)
  return jnp.asarray(jnp.asarray(h, wide) * jnp.asarray(scaling, wide), h.dtype)


def _scale(scaling: Any, call: Any, x: jax.Array | None) -> Any:
  """The number, or what the gate gives for x."""
  if not isinstance(scaling, Branch):
    return scaling
  if call is None or x is None:
    raise ValueError("a gated LoRA reads its product's input: it serves no table, and needs a rule")
  return scaling(call.salt(2), x)


def _gated(scaling: Any) -> str | None:
  return scaling.unmergeable() if isinstance(scaling, Branch) else None


def _ungated(base: Any) -> jax.Array:
  """The base, where a rule will serve the module's calls; else an error, for lack of the input."""
  context = _call.active()
  if context is not None and context.in_setup:
    return materialize(base)
  where = context.top.path if context is not None and context.top else ""
  raise RuntimeError(
    f"the LoRA at {where!r} has a gate that depends on the input, but its module only reads the "
    "weight. Give the module a rule (pelt.rule)"
  )


def _refuse_dropout(dropout: Dropout | None) -> None:
  """Raises where training would drop nothing: the node was only built, never given its input."""
  context = _call.active()
  if dropout is None or context is None or context.in_setup:
    return
  if context.training(context.top):
    where = context.top.path if context.top else ""
    raise RuntimeError(
      f"the LoRA at {where!r} has dropout on the input of a, but its module only reads the weight. "
      "Give the module a rule (pelt.rule), or train with dropout=0"
    )


def _below(call: Any) -> Any:
  """The call as the node underneath sees it: its dropout has masks of its own."""
  return None if call is None else call.salt(1)


def subscripts(axes: str) -> tuple[str, str, str]:
  kernel, _, factors = axes.partition(":")
  a, _, b = factors.partition(",")
  return kernel, a, b


def factor_specs(axes: str, stacked: int, tensor: tuple) -> dict[str, Any]:
  """The specs of a and b over a kernel of spec `tensor`: they follow its axes, the rank none."""
  kernel, a, b = subscripts(axes)
  lead, axis = tensor[:stacked], dict(zip(kernel, tensor[stacked:], strict=True))
  P = jax.sharding.PartitionSpec
  return {name: P(*lead, *map(axis.get, own)) for name, own in (("a", a), ("b", b))}


def rank_letter(axes: str) -> str:
  kernel, a, _ = subscripts(axes)
  return next(c for c in a if c not in kernel)


def matrix_sizes(axes: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """Inputs and outputs of one matrix of a kernel; what both factors index is a batch of matrices.

  >>> matrix_sizes("ihd:ir,rhd", (64, 4, 16))
  (64, 64)
  """
  kernel, a, b = subscripts(axes)
  size = dict(zip(kernel, shape, strict=True))
  return (
    math.prod(size[c] for c in kernel if c in a and c not in b),
    math.prod(size[c] for c in kernel if c in b and c not in a),
  )


@functools.cache
def lora_axes(eq: str | None, ndim: int) -> str:
  """The axes of a and b for a kernel used by `eq`: a contracts, b makes the output.

  Without an equation (a raw kernel nobody described) the last two axes are in and out, and those
  before them batch axes.

  >>> lora_axes("BSD,CKDH->CBSKH", 4)
  'CKDH:Dr,rCKH'
  """
  if eq is None or eq == "lookup":
    kernel = "eghklm"[: ndim - 2] + "io"
    inputs, outputs = kernel[:-1], kernel[:-2] + "o"
  else:
    x, kernel, out = eq.replace("->", ",").split(",")
    inputs = "".join(c for c in kernel if c in x)
    outputs = "".join(c for c in kernel if c in out)
  r = next(c for c in "r" + string.ascii_letters if c not in kernel)
  return f"{kernel}:{inputs}{r},{_rank_first(inputs, outputs, r)}"


def _rank_first(inputs: str, outputs: str, r: str) -> str:
  """Batch axes come first, then the rank, then the output axes."""
  batch = "".join(c for c in outputs if c in inputs)
  return batch + r + "".join(c for c in outputs if c not in inputs)


@functools.cache
def _plan(eq: str, axes: str) -> tuple[str, str, bool] | None:
  """Equations for x -> rank -> out, and whether b comes first (a tied table read the other way)."""
  x, kernel, out = eq.replace("->", ",").split(",")
  own_kernel, a, b = subscripts(axes)
  r = next(c for c in "r" + string.ascii_letters if c not in x + kernel + out)
  rename = dict(zip(own_kernel, kernel, strict=True)) | {rank_letter(axes): r}
  a, b = ("".join(map(rename.__getitem__, s)) for s in (a, b))
  contracted = {c for c in kernel if c in x and c not in out}
  for first, second, swapped in ((a, b, False), (b, a, True)):
    if contracted <= set(first):
      kept = "".join(c for c in x if c not in contracted)
      down, up = f"{x},{first}->{kept}{r}", f"{kept}{r},{second}->{out}"
      return _plain(down), _plain(up), swapped
  return None


def _plain(eq: str) -> str:
  """The standard spelling of a plain product, which has a fast path."""
  x, w, out = eq.replace("->", ",").split(",")
  plain = len(w) == 2 and x == f"...{w[0]}" and out == f"...{w[1]}"
  return "...i,io->...o" if plain else eq
