"""Nodes: typed pytrees that live inside the params tree, where a method adds something.

Every array field of a node is declared by what becomes of it:

| declaration | trains | saved | meaning |
|---|---|---|---|
| `base()` | no | no | the frozen leaf below |
| `derived()` | no | no | rebuilt from the base at load (4-bit codes) |
| `own()` | yes, in `group` | yes | the method's parameters |
| `extra()` | no | yes | numbers that belong to the method but do not train (scaling) |
| `given()` | no | no | filled by a generator while a program runs: one array for many nodes |

`static()` fields shape the program: kernel axes, an activation's name. A field that holds another
node follows that node's own declarations. Field types are not checked: the same class also holds
labels, holes, shapes and partition specs.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
from flax.core import meta

BYPASS = "bypass"  # reserved key under a module's path
GENERATORS = "generators"  # reserved key at the root
REGISTRY: dict[str, type["Node"]] = {}  # class name -> class, for files; never an import path

_KINDS = ("base", "derived", "own", "extra", "given", "static")


def _declared(kind: str, default: Any) -> Any:
  return dataclasses.field(default=default, metadata={"kind": kind})


def base(default: Any = None) -> Any:
  """Declares the frozen leaf below: neither trains nor is saved."""
  return _declared("base", default)


def derived(default: Any = None) -> Any:
  """Declares an array that `rebuild(source)` makes again at load."""
  return _declared("derived", default)


def own(default: Any = None) -> Any:
  """Declares a parameter of the method: trains with the node's `group`, and is saved."""
  return _declared("own", default)


def extra(default: Any = None) -> Any:
  """Declares a number of the method that is saved and does not train."""
  return _declared("extra", default)


def given(default: Any = None) -> Any:
  """Declares an array that a generator fills, the same for many nodes and all members of a bank."""
  return _declared("given", default)


def static(default: Any = None) -> Any:
  """Declares a value that shapes the program (part of the tree's structure)."""
  return _declared("static", default)


@dataclass_transform(
  field_specifiers=(base, derived, own, extra, given, static), frozen_default=True
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Node(meta.AxisMetadata):
  """A pytree inside the params. Subclassing makes a frozen dataclass and registers it.

  Attributes:
    group: label of the `own` fields; None freezes them.
    stacked: how many leading axes every array field has from scan or vmap, at this moment.
  """

  _: dataclasses.KW_ONLY
  group: str | None = static("trainable")
  stacked: int = static(0)

  kinds: ClassVar[dict[str, str]] = {}

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    for name, kind in inspect.get_annotations(cls).items():
      value = cls.__dict__.get(name)
      if "ClassVar" in str(kind):
        continue
      if not isinstance(value, dataclasses.Field) or value.metadata.get("kind") not in _KINDS:
        raise TypeError(
          f"{cls.__name__}.{name} is undeclared: write `{name}: Any = own()`, or base(), "
          "derived(), extra(), given(), static()"
        )
    dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    cls.kinds = {f.name: f.metadata["kind"] for f in dataclasses.fields(cls)}
    arrays = tuple(n for n, k in cls.kinds.items() if k != "static")
    statics = tuple(n for n, k in cls.kinds.items() if k == "static")

    def flatten(node):
      return [getattr(node, n) for n in arrays], tuple(getattr(node, n) for n in statics)

    def flatten_with_keys(node):
      keys = [(jax.tree_util.GetAttrKey(n), getattr(node, n)) for n in arrays]
      return keys, tuple(getattr(node, n) for n in statics)

    def unflatten(aux, children):
      node = object.__new__(cls)
      for name, value in zip(arrays + statics, (*children, *aux), strict=True):
        object.__setattr__(node, name, value)
      return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    if cls.__name__ in REGISTRY and REGISTRY[cls.__name__].__module__ != cls.__module__:
      raise TypeError(
        f"a node class named {cls.__name__} exists already; files name nodes by class"
      )
    REGISTRY[cls.__name__] = cls

  def rebuild(self, source: Any) -> Self:
    """The node with its `derived` arrays made again from the base leaf."""
    raise NotImplementedError(f"{type(self).__name__} has derived fields and no rebuild(source)")

  def penalty(self) -> jax.Array:
    """A regulariser to add to the loss, its weight included; zero unless a class has one."""
    return jnp.zeros((), jnp.float32)

  def group_of(self, name: str) -> str | None:
    """The label of one own field: `group`, or a static `<name>_group` of its own if that is set."""
    return self.group and (getattr(self, f"{name}_group", None) or self.group)

  def replace(self, **changes: Any) -> Self:
    """A copy with some fields changed."""
    return dataclasses.replace(self, **changes)

  def array(self, name: str) -> Any:
    """A field without the partitioning box that may surround it."""
    return strip(getattr(self, name))

  def children(self) -> Iterator[tuple[str, Any]]:
    """Names and values of the non-static fields."""
    return ((n, getattr(self, n)) for n, k in self.kinds.items() if k != "static")

  def specs(self, spec: tuple, tensor: tuple) -> Self:
    """The node holding a partition spec per array.

    Args:
      spec: the leaf's own partition spec, stacked axes first, one entry per axis; of a node that is
        in no leaf's place, stacked axes alone.
      tensor: the same without the axes of fully sharded data parallelism; of a bypass, stacked axes
        and then what splits the features of its module.

    Arrays are replicated unless a class knows better; stacked axes follow the leaf's.
    """
    P = jax.sharding.PartitionSpec

    def of(name: str, value: Any) -> Any:
      plain = spec if self.kinds[name] == "base" else tensor[: self.stacked]
      inside = lambda x: x.specs(spec, tensor) if isinstance(x, Node) else P(*plain)
      return jax.tree.map(inside, value, is_leaf=is_node)

    return self.replace(**{n: of(n, v) for n, v in self.children()})

  def get_partition_spec(self) -> Self:
    """The node holding a `PartitionSpec` per array: its box's, or P() without a box."""
    return self.replace(**{n: meta.get_partition_spec(v) for n, v in self.children()})

  def get_sharding(self, mesh: jax.sharding.Mesh) -> Self:
    """The node holding a `NamedSharding` per array, as `get_partition_spec`."""
    return self.replace(**{n: meta.get_sharding(v, mesh) for n, v in self.children()})

  # What Flax asks of a box: scans move `stacked`, boxes inside follow.
  def unbox(self) -> Any:
    return self

  def replace_boxed(self, val: Any) -> Any:
    return val

  def add_axis(self, index: int, params: dict) -> Self:
    return self._moved("add_axis", 1, index, params)

  def remove_axis(self, index: int, params: dict) -> Self:
    return self._moved("remove_axis", -1, index, params)

  def _moved(self, method: str, by: int, index: int, params: dict) -> Self:
    if index != 0:
      raise ValueError(
        f"params stacked on axis {index}: {type(self).__name__} supports scan and vmap over axis 0"
      )

    def move(box: Any) -> Any:
      return getattr(box, method)(index, params) if meta.is_axis_metadata(box) else box

    moved = {n: jax.tree.map(move, v, is_leaf=meta.is_axis_metadata) for n, v in self.children()}
    return self.replace(**moved, stacked=self.stacked + by)

  def __repr__(self) -> str:
    def show(v: Any) -> str:
      if hasattr(v, "shape") and hasattr(v, "dtype"):
        return f"{v.dtype}{list(v.shape)}"
      return repr(v)

    fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
    shown = ", ".join(f"{n}={show(v)}" for n, v in fields)
    return f"{type(self).__name__}({shown})"


class Weight(Node):
  """A node in place of an array leaf: it knows how to multiply without being built.

  `outermost` classes stay outside the nodes that are added later. Classes whose arrays mean
  something else once zeros are put behind them say so by `pads`: a bank wants them of one size.
  Those that a post-step changes while they train say so by `scheduled`.
  """

  outermost: ClassVar[bool] = False
  pads: ClassVar[bool] = True
  scheduled: ClassVar[bool] = False

  def materialize(self) -> jax.Array:
    """The plain array (with its stacked axes)."""
    raise NotImplementedError

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    """`jnp.einsum(eq, x, self)`; the array is cast to `x.dtype`, as the caller fixes the dtype."""
    return contract(eq, x, self.materialize(), precision)

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    """Rows of a table: `(..., d)` for ids `(...)`."""
    return jnp.take(self.materialize(), ids, axis=0)

  def spread(self, like: Any, call: Any = None) -> jax.Array:
    """The array shaped to broadcast against the trailing axes of `like`."""
    return spread(self.materialize(), like)

  def matmul(self, x: jax.Array, call: Any = None) -> jax.Array:
    """`x @ self`."""
    return self.einsum("...i,io->...o", x, call)

  def unmergeable(self) -> str | None:
    """Why `merge` cannot turn this into a plain array, or None."""
    return None

  def changed(self) -> int:
    """How many entries of the leaf may differ from the base."""
    return 0 if self.group is None else math.prod(self.shape)

  def rank(self) -> int:
    """An upper bound on the rank of the change of one matrix."""
    return 0

  @property
  def inner(self) -> Any:
    """The leaf below: an array or another weight."""
    return getattr(self, "base", None)

  def based(self, below: Any) -> Self:
    """The node over another leaf; a node without a base stays as it is."""
    return self.replace(base=below) if "base" in self.kinds else self

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(jnp.shape(strip(self.inner)))

  @property
  def dtype(self) -> Any:
    return strip(self.inner).dtype

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def unbox(self) -> jax.Array:
    return self.materialize()

  # Some models reach round Flax for a leaf, `self.variables["params"]["wte"]["embedding"].T` for a
  # tied head: they get the plain array, as they would from `self.param`.
  def __jax_array__(self) -> jax.Array:
    return self.materialize()

  @property
  def T(self) -> jax.Array:
    """The plain array, transposed."""
    return self.materialize().T

  def astype(self, dtype: Any) -> jax.Array:
    """The plain array in another dtype."""
    return self.materialize().astype(dtype)


class Bypass(Node):
  """A node under a module's path (key `bypass`): it wraps the module's call."""

  def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Receives the module's own arguments, returns its output; `call.next` runs what is inside."""
    raise NotImplementedError

  def unmergeable(self) -> str:
    """Why no weight computes what this node does."""
    branches = [v for _, v in self.children() if isinstance(v, Branch)]
    why = [reason for branch in branches if (reason := branch.unmergeable())]
    return ": ".join([f"{type(self).__name__} wraps a module call", *why[:1]])


class Branch(Node):
  """A function `x -> delta` inside a placement."""

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    """The branch's output for `x`."""
    raise NotImplementedError

  def along(self, call: Any, read: Callable[[Any], jax.Array]) -> jax.Array:
    """The output where `read(delta)` is what the placement reads once `delta` was added there.

    `read(None)` is what it reads as it stands, which is all that a single branch asks for.
    """
    return self(call, read(None))

  def unmergeable(self) -> str | None:
    """Why it is no matrix, or None: then the one within tells."""
    inside = [v for _, v in self.children() if isinstance(v, Branch)]
    return next((why for branch in inside if (why := branch.unmergeable())), None)


class Generator(Node):
  """A node at the root that fills waiting fields of other nodes from shared parameters.

  `kept` classes fill fields with copies of what is stored once: `fold` leaves them in the tree.
  """

  kept: ClassVar[bool] = False

  def expand(self, params: dict) -> dict:
    """Params in which the nodes this generator serves are filled."""
    raise NotImplementedError


class Chain(Bypass):
  """Several bypasses at one site; the last is outermost."""

  nodes: Any = own(())

  def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
    for i, node in enumerate(self.nodes):
      call = call.wrapped(node, i)
    return call.next(*args, **kwargs)

  def unmergeable(self) -> str:
    return "; ".join(node.unmergeable() for node in self.nodes)


def strip(value: Any) -> Any:
  """The value without Flax's partitioning boxes; nodes stay."""
  while meta.is_axis_metadata(value) and not isinstance(value, Node):
    value = value.value  # not .unbox(): that would add a sharding constraint
  return value


def is_node(x: Any) -> bool:
  """Whether `x` is a node; the `is_leaf` of tree walks that stop at nodes."""
  return isinstance(x, Node)


def spread(value: jax.Array, like: Any) -> jax.Array:
  """`value` cast to `like.dtype`, with leading ones so that it broadcasts against `like`."""
  value = jnp.asarray(value, like.dtype)
  return value.reshape((1,) * (like.ndim - value.ndim) + value.shape)


# Products of one matrix, and whether it lies as (in, out).
_PLAIN = {"...i,io->...o": True, "...i,oi->...o": False, "...d,vd->...v": False}


def contract(eq: str, x: jax.Array, w: Any, precision: Any = None) -> jax.Array:
  """`jnp.einsum(eq, x, w)` with `w` cast to `x.dtype`; a plain product runs on a 2-D `x`.

  The 2-D form is the same product; XLA:CPU runs N-D products of a thin matrix much slower. A kernel
  that lies the other way round is transposed, as `nn.Embed.attend` does: the same bits eagerly.
  """
  w = jnp.asarray(strip(w), x.dtype)
  if eq in _PLAIN:
    w = w if _PLAIN[eq] else w.T
    y = jnp.dot(x.reshape(-1, x.shape[-1]), w, precision=precision)
    return y.reshape(*x.shape[:-1], w.shape[-1])
  return jnp.einsum(eq, x, w, precision=precision)
