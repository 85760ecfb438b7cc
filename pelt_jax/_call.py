"""What a running node can ask for: its Call, the Frames of the enclosing calls, the Context.

A backend (`_linen`) makes one Context per call of `bypass(apply)` and one Frame per module call.
Nothing here knows the backend's framework.
"""

import contextlib
import contextvars
import dataclasses
import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_TRAIN_NAMES = (
  ("deterministic", True),
  ("train", False),
  ("training", False),
  ("is_training", False),
)
_ACTIVE: contextvars.ContextVar["Context | None"] = contextvars.ContextVar("pelt", default=None)


@dataclasses.dataclass
class Frame:
  """One module call under way.

  Attributes:
    path: the module's path in the params tree.
    method: the method's name.
    module: the module object (attributes only).
    function: the plain function that runs, for its signature.
    args: positional arguments as the caller passed them, without self.
    kwargs: keyword arguments as passed.
    parent: the enclosing call.
    trace: the trace the call belongs to; values never leave it.
    key: makes the key of a named random stream without advancing it, or None.
    sow: stores a named value in the backend's intermediates.
    now: the trace at this moment.
  """

  path: str
  method: str
  module: Any
  function: Callable
  args: tuple
  kwargs: dict
  parent: "Frame | None"
  trace: Any
  key: Callable[[str], jax.Array | None]
  sow: Callable[[str, jax.Array], None]
  now: Callable[[], Any]
  count: int = 0
  seen: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

  def bound(self) -> dict[str, Any]:
    """The call's arguments by name."""
    try:
      bound = inspect.signature(self.function).bind(None, *self.args, **self.kwargs)
    except (TypeError, ValueError):
      return dict(self.kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])

  def climb(self) -> Iterator["Frame"]:
    """This call and those around it, innermost first."""
    frame: Frame | None = self
    while frame is not None:
      yield frame
      frame = frame.parent

  @property
  def input(self) -> Any:
    """The first argument."""
    return self.args[0] if self.args else next(iter(self.kwargs.values()), None)


@dataclasses.dataclass
class Context:
  """The state of one call of `bypass(apply)`, alive while it is traced."""

  rows: Any = None
  train: bool | None = None
  record: tuple[str, ...] = ()
  top: Frame | None = None
  counts: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
  called: set[str] = dataclasses.field(default_factory=set)
  ran: set[str] = dataclasses.field(default_factory=set)
  in_setup: bool = False
  gathered: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  plain: bool = False  # no bypass node runs

  def training(self, innermost: Frame | None) -> bool:
    """`train` if given, else the nearest deterministic/train argument or field, else False."""
    if self.train is not None:
      return self.train
    for frame in innermost.climb() if innermost is not None else ():
      bound = frame.bound()
      for name, inverted in _TRAIN_NAMES:
        for value in (bound.get(name), getattr(frame.module, name, None)):
          flag = _flag(name, value)
          if flag is not None:
            return flag != inverted
    return False


def _flag(name: str, value: Any) -> bool | None:
  """A flag as a bool, None if the value is none."""
  if isinstance(value, bool | np.bool_):
    return bool(value)
  if isinstance(value, jax.Array) and value.dtype == jnp.bool_ and value.ndim == 0:
    if isinstance(value, Tracer):
      raise ValueError(
        f"{name} is traced, so nodes cannot tell training from evaluation: pass "
        "train_nodes=True or False to the bypass, or make the argument static"
      )
    return bool(value)
  return None


def active() -> Context | None:
  """The context of the bypass being traced, or None outside one."""
  return _ACTIVE.get()


@contextlib.contextmanager
def activate(context: Context | None) -> Iterator[None]:
  """Makes a context the active one."""
  token = _ACTIVE.set(context)
  try:
    yield
  finally:
    _ACTIVE.reset(token)


@dataclasses.dataclass(frozen=True)
class Call:
  """What a node asks besides its module's own arguments.

  Attributes:
    next: runs what is inside the node; may be called any number of times.
    frame: the module call that the node wraps.
    context: the run-time keywords of `bypass`.
    salts: numbers folded into this node's random keys.
    row: in a bank, the batch row that this member serves.
    sharding: how the kernel should lie while a product uses it, if that was said.
  """

  next: Callable
  frame: Frame
  context: Context
  salts: tuple = ()
  row: Any = None
  sharding: Any = None

  @property
  def module(self) -> Any:
    """The module, for its attributes only."""
    return self.frame.module

  @property
  def path(self) -> str:
    """Path of the module."""
    return self.frame.path

  @property
  def rows(self) -> jax.Array | np.ndarray | None:
    """Which member of a bank each batch row uses."""
    return self.context.rows

  def tap(self, where: str | None) -> Any:
    """A value of an enclosing or earlier call.

    `"in"` is this call's input; `"../in"` the enclosing call's; `"../ln_2:in"` and
    `"../dense:out"` what an earlier call inside the enclosing one took or gave. Each `..` climbs
    one call.

    Raises:
      KeyError: if nothing was seen there, listing what was.
    """
    frame, rest = self.frame, (where or "in")
    while rest.startswith("../"):
      if frame.parent is None:
        raise KeyError(
          f"tap {where!r} at {self.path or 'the root'!r} climbs above the outermost call"
        )
      frame, rest = frame.parent, rest[3:]
    if rest == "in":
      return frame.input
    name, _, side = rest.partition(":")
    if side not in ("in", "out"):
      raise KeyError(f"tap {where!r}: write 'in', '../in', '../name:in' or '../name:out'")
    if name not in frame.seen:
      raise KeyError(
        f"tap {where!r} at {self.path!r}: no call named {name!r} has run inside "
        f"{frame.path or 'the root'!r} yet; seen: {sorted(frame.seen)}. A sibling that runs later, "
        "or inside its own scan or remat, cannot be tapped"
      )
    return frame.seen[name][side == "out"]

  def arg(self, name: str, default: Any = inspect.Parameter.empty) -> Any:
    """The nearest enclosing call's argument of that name."""
    for frame in self.frame.climb():
      bound = frame.bound()
      if name in bound:
        return bound[name]
    if default is not inspect.Parameter.empty:
      return default
    raise KeyError(f"no call around {self.path!r} has an argument named {name!r}")

  @property
  def train(self) -> bool:
    """`train_nodes` if given, else the nearest deterministic/train argument, else False."""
    return self.context.training(self.frame)

  def rng(self, stream: str = "dropout") -> jax.Array:
    """A key for this node and call, folded from the enclosing stream, whose counter stays.

    Path, call count, position and every `salt` are folded in, so no two nodes share a mask.

    Raises:
      ValueError: if no enclosing call has the stream.
    """
    key = self._first_key(self.frame.climb(), stream)
    for number in (zlib.crc32(self.path.encode()) & 0x7FFFFFFF, self.frame.count, *self.salts):
      key = jax.random.fold_in(key, number)
    return key

  def common_rng(self, stream: str = "dropout") -> jax.Array:
    """A key that all nodes of one call of the model share, from the outermost stream.

    Raises:
      ValueError: if no enclosing call has the stream.
    """
    return self._first_key(reversed(tuple(self.frame.climb())), stream)

  def _first_key(self, frames: Iterable[Frame], stream: str) -> jax.Array:
    for frame in frames:
      if (key := frame.key(stream)) is not None:
        return key
    raise ValueError(
      f"the node at {self.path!r} needs random numbers: pass rngs={{{stream!r}: key}} to apply"
    )

  @contextlib.contextmanager
  def arm(self, plain: bool = False) -> Iterator[None]:
    """What an arm of a `lax.cond` round `next` runs in: taps stay within it.

    Args:
      plain: run the module without the bypass nodes inside it.
    """
    frame, context = self.frame, self.context
    before = frame.trace, frame.seen, context.plain
    frame.trace, frame.seen, context.plain = frame.now(), {}, plain or context.plain
    try:
      yield
    finally:
      frame.trace, frame.seen, context.plain = before

  def salt(self, number: Any) -> "Call":
    """The same call with a number (a row, a layer; may be traced) folded into its keys."""
    return dataclasses.replace(self, salts=(*self.salts, number))

  def of_row(self, number: Any) -> "Call":
    """The same call for one batch row (traced) of a bank."""
    return dataclasses.replace(self.salt(number), row=number)

  def mine(self, value: Any) -> Any:
    """An argument with the batch as first axis, as this member sees it: in a bank its row alone."""
    return value if self.row is None else jnp.take(value, self.row, axis=0)[None]

  @property
  def causal(self) -> bool:
    """Whether the nearest enclosing module says that its positions see no later ones."""
    flags = (getattr(frame.module, "causal", None) for frame in self.frame.climb())
    return bool(next((f for f in flags if f is not None), False))

  def wrapped(self, node: Any, position: int) -> "Call":
    """The call as the next outer node of a chain sees it."""
    inner = self.salt(position)
    run = lambda *args, **kwargs: node(inner, *args, **kwargs)
    return dataclasses.replace(self, next=run)

  def record(self, name: str, value: jax.Array) -> None:
    """Hands `value` out under `name` if `bypass` was called with `record` naming it."""
    if name not in self.context.record:
      return
    if self.row is not None:
      raise ValueError(
        f"record={name!r}: {self.path!r} holds a bank, whose members' values cannot be handed out; "
        "run the member's own params"
      )
    self.frame.sow(name, value)

  def picked(self, members: Any, batch: int, count: int) -> Any:
    """The members' arrays gathered by `rows`: their leading axis becomes the batch's.

    Raises:
      ValueError: if `rows` is missing, has another length than the batch, or (when concrete) names
        no member. Traced rows out of range give NaN.
    """
    rows = self.rows
    if rows is None:
      raise ValueError(f"{self.path!r} holds a bank of {count} members: pass rows= to the bypass")
    if not np.issubdtype(rows.dtype, np.integer):
      raise ValueError(
        f"rows has dtype {rows.dtype}, but it counts the members of the bank from 0, as integers"
      )
    if jnp.shape(rows) != (batch,):
      raise ValueError(
        f"rows has shape {jnp.shape(rows)}; the batch at {self.path!r} needs ({batch},)"
      )
    if not isinstance(rows, Tracer):
      low, high = (int(f(np.asarray(rows))) for f in (np.min, np.max))
      if low < 0 or high >= count:
        raise ValueError(
          f"rows holds {low}..{high}, but the bank at {self.path!r} has {count} members"
        )
    # A negative traced row must not wrap round to the last member.
    rows = jnp.where(rows < 0, count, rows)

    def gather(x: jax.Array) -> jax.Array:
      if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.take(x, rows, axis=0, mode="fill", fill_value=math.nan)
      return jnp.take(x, rows, axis=0, mode="clip")

    return jax.tree.map(gather, members)
