"""Placements: where a branch acts on the call of its module."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import Branch, Bypass, extra, own, static
from pelt_jax.nodes._bank import Bank
from pelt_jax.nodes._branches import Closable


class After(Bypass):
  """`y + branch(y)`, `y + branch(tap)`, or `y + branch(tap + y)`.

  Houlsby's adapters, parallel ones, and Pfeiffer's where the residual stream is not normalized. A
  module that returns a tuple has its first item changed.

  Attributes:
    branch: what is added.
    tap: what the branch reads (`Call.tap`); None reads the output.
    plus: whether the output is added to what is tapped.
  """

  branch: Any = own()
  tap: str | None = static()
  plus: bool = static(False)

  def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
    source = None if self.tap is None else call.tap(self.tap)
    out = call.next(*args, **kwargs)
    y = out[0] if isinstance(out, tuple) else out

    def read(delta: Any) -> jax.Array:
      if source is not None and not self.plus:
        return source
      now = y if delta is None else y + delta
      return now if source is None else source + now

    y = y + self.branch.along(call, read)
    return (y, *out[1:]) if isinstance(out, tuple) else y


class Before(Bypass):
  """`next(x + branch(x))`, or `next(x + branch(tap))`.

  Attributes:
    branch: what is added to the module's first argument.
    tap: what the branch reads; None reads the first argument.
  """

  branch: Any = own()
  tap: str | None = static()

  def __call__(self, call: Any, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
    source = None if self.tap is None else call.tap(self.tap)

    def read(delta: Any) -> jax.Array:
      if source is not None:
        return source
      return x if delta is None else x + delta

    return call.next(x + self.branch.along(call, read), *args, **kwargs)


class AroundNorm(Bypass):
  """`next(s + branch(next(s)))` at a LayerNorm whose input s is the residual sum (Pfeiffer).

  Attributes:
    branch: reads the normalized sum; what it gives is added to the sum, which is normalized again.
  """

  branch: Any = own()

  def __call__(self, call: Any, s: jax.Array, *args: Any, **kwargs: Any) -> Any:
    read = lambda delta: call.next(s if delta is None else s + delta, *args, **kwargs)
    return call.next(s + self.branch.along(call, read), *args, **kwargs)


class Mixed(Bypass):
  """`(1 - g) h + g branch(x)`, with g a gate's output for what the branch reads.

  Attributes:
    gate: a branch giving (B, T, 1), or (B, 1, 1).
    branch: what takes h's place as the gate opens.
    tap: x, what both read; None reads h.
    before: h is the module's first argument; else its output, of a tuple the first item.
  """

  gate: Any = own()
  branch: Any = own()
  tap: str | None = static()
  before: bool = static(False)

  def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
    source = None if self.tap is None else call.tap(self.tap)
    if self.before:
      return call.next(self._mix(call, args[0], source), *args[1:], **kwargs)
    out = call.next(*args, **kwargs)
    if isinstance(out, tuple):
      return (self._mix(call, out[0], source), *out[1:])
    return self._mix(call, out, source)

  def _mix(self, call: Any, h: jax.Array, source: jax.Array | None) -> jax.Array:
    source = h if source is None else source
    return h + self.gate(call.salt(0), source) * (self.branch(call.salt(1), source) - h)


class Prefix(Bypass):
  """Extra keys and values in front of an attention core's own: `next(q, [k'; k], [v'; v], mask)`.

  No position and no projection acts on them.

  Every query sees them, whatever the mask. The core is called with
  `(q, k, v, mask=None, bias=None)`, where mask (True: visible) and bias end in the key axis.

  Attributes:
    keys: (P, heads, head width), in a bank (N, P, heads, head width); None waits for a generator.
    values: likewise.
    gate: None, () or a branch giving (B, 1, 1): scales keys and values. A `Closable` one that is
      closed hides them.
    length: None, or () how many rows count (a float): members of a bank may be shorter than P.
    dropout: None or a `Dropout` for keys and values.
    tap: what the gate reads.
    banked: whether a member axis leads.
  """

  keys: Any = own()
  values: Any = own()
  gate: Any = own(default=None)
  length: Any = extra(default=None)
  dropout: Any = extra(default=None)
  tap: str = static(default="../in")
  banked: bool = static(default=False)

  def __call__(
    self, call: Any, q: jax.Array, k: jax.Array, v: jax.Array, mask=None, bias=None, **kwargs: Any
  ) -> Any:
    if self.keys is None:
      raise ValueError(
        f"the prefix at {call.path!r} waits for its generator: run pelt.bypass or fold"
      )
    own_k, own_v, length = self.array("keys"), self.array("values"), self.length
    if self.banked:
      mine = call.picked((own_k, own_v, length), k.shape[0], own_k.shape[0])
      own_k, own_v, length = mine
    shape = (k.shape[0], *own_k.shape[-3:])
    own_k, own_v = (jnp.broadcast_to(jnp.asarray(x, k.dtype), shape) for x in (own_k, own_v))
    if self.dropout is not None:
      own_k, own_v = (self.dropout(call.salt(i), x) for i, x in enumerate((own_k, own_v)))
    if self.gate is not None:
      gate: Any = self.gate
      gate = gate(call, call.tap(self.tap))[..., None] if isinstance(gate, Branch) else gate
      gate = jnp.asarray(gate, k.dtype)
      own_k, own_v = own_k * gate, own_v * gate
    front = [(shape[1], 0)]
    seen = self._seen(call, length, k.shape[0], shape[1])
    if seen is not None:
      mask = jnp.ones((1, 1, 1, k.shape[1]), bool) if mask is None else mask
      mask = _beside(seen[:, None, None], mask)
    elif mask is not None:
      mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + front, constant_values=True)
    if bias is not None:
      bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + front)
    k, v = jnp.concatenate([own_k, k], axis=1), jnp.concatenate([own_v, v], axis=1)
    return call.next(q, k, v, mask, bias, **kwargs)

  def specs(self, spec: tuple, tensor: tuple) -> "Prefix":
    new = super().specs(spec, tensor)
    if self.keys is None:
      return new
    lead, between = tensor[: self.stacked], self.array("keys").ndim - self.stacked - 2
    heads = jax.sharding.PartitionSpec(*lead, *(None,) * between, *tensor[self.stacked :], None)
    return new.replace(keys=heads, values=heads)

  def _seen(self, call: Any, length: Any, batch: int, rows: int) -> jax.Array | None:
    """Which rows are visible, (1 or B, P), or None: all are."""
    seen = None
    if self.banked and length is not None:  # others only fill a shorter member up
      seen = jnp.arange(rows, dtype=jnp.float32)[None] < length[:, None]
    gate: Any = self.gate.members if isinstance(self.gate, Bank) else self.gate
    if not isinstance(gate, Closable):
      return seen
    is_open = gate.open[None]
    if self.banked:
      is_open = call.picked(gate.open, batch, gate.open.shape[0])
    shown = jnp.broadcast_to((is_open > 0.5)[:, None], (is_open.shape[0], rows))
    return shown if seen is None else seen & shown


class Shift(Bypass):
  """`next(positions + by)`: tokens stand behind what a prefix holds.

  Attributes:
    by: (), a float so that whole-tree gradients stay defined; in a bank (N,).
    banked: whether a member axis leads.
  """

  by: Any = extra()
  banked: bool = static(default=False)

  def __call__(self, call: Any, position_ids: jax.Array, *args: Any, **kwargs: Any) -> Any:
    by = self.array("by")
    if self.banked:
      rows = call.rows
      by = call.picked(by, len(rows) if rows is not None else 0, by.shape[0])[:, None]
    return call.next(position_ids + jnp.asarray(by, position_ids.dtype), *args, **kwargs)


def _beside(first: Any, second: Any) -> jax.Array:
  """Masks (B, H, T, P) and (B, H, T, S) as one, each axis before the last 1 or full."""
  second = second.reshape((1,) * (first.ndim - second.ndim) + second.shape)
  lead = jnp.broadcast_shapes(first.shape[:-1], second.shape[:-1])
  return jnp.concatenate([jnp.broadcast_to(m, (*lead, m.shape[-1])) for m in (first, second)], -1)
