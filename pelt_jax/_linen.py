"""The Linen backend: runs nodes by one method interceptor."""

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import tracers

from pelt_jax import _call
from pelt_jax._call import Call, Context, Frame
from pelt_jax._leaf import materialize, product, table_rows
from pelt_jax._node import BYPASS, GENERATORS, Bypass, Weight, spread, strip
from pelt_jax._rules import rule_for
from pelt_jax._tree import expanded
from pelt_jax._walk import every_node, update_at, walk
from pelt_jax.nodes._bank import members_of

_KEYWORDS = ("rows", "train_nodes", "record")
_SOWN = "pelt:"  # prefix of the names under which recorded values travel


def bypass(apply: Callable, *, gathered: Mapping[str, Any] | None = None) -> Callable:
  """`apply` that runs the nodes in its params.

  The result has `apply`'s signature plus three run-time keywords:

  - `rows`: (B,) integers, which member of a bank each batch row uses; may be traced.
  - `train_nodes`: overrides whether nodes are in training (dropout). By default the nearest
    enclosing `deterministic` or `train` argument decides; a dropout key alone says nothing.
  - `record`: names (`"gates"`, ...) of values to hand out. The result is then
    `(out, {path: {name: array}})`, with `mutable` `((out, variables), record)`. Under a scan the
    layer axis comes first.

  On params without nodes it computes what `apply` computes. The interceptor is entered inside the
  returned function, so it may be jitted, mapped and differentiated like `apply`.

  Args:
    apply: `model.apply` of a Linen module, or a function that takes variables first and calls it.
    gathered: for 4-bit kernels under fully sharded data parallelism, what `pelt.gathered` returned.

  Returns:
    The function.

  Raises:
    TypeError: if `apply` is not callable, or its module has an argument with one of the names.
    ValueError: when run, if a bypass node's module was called and the node did not run, `rows` is
      given for adapters that are in no bank, or `gathered` names what params do not have.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lora(rank=2, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> pelt.bypass(model.apply)({"params": params}, x).shape
    (2, 3)
  """
  if isinstance(apply, nn.Module):
    raise TypeError(f"apply is a {type(apply).__name__}: pass its method, pelt.bypass(model.apply)")
  if not callable(apply):
    raise TypeError(f"apply must be a function such as model.apply, got {type(apply)}")
  module = getattr(apply, "__self__", None)
  if isinstance(module, nn.Module):
    names = inspect.signature(type(module).__call__).parameters
    taken = [name for name in _KEYWORDS if name in names]
    if taken:
      raise TypeError(
        f"{type(module).__name__}.__call__ already has an argument named {taken}; bypass adds "
        f"{_KEYWORDS}. Wrap a function that passes the model's own by another name"
      )

  @functools.wraps(apply)
  def run(variables, *args, rows=None, train_nodes=None, record=(), **kwargs):
    params = variables.get("params", {})
    nodes = [path for path, value in walk(params) if isinstance(value, Bypass)]
    if rows is not None and members_of(params) is None and any(True for _ in every_node(params)):
      raise ValueError(
        "rows: it chooses among the members of a bank, and params hold none; make one by "
        "pelt.bank(tasks)"
      )
    if gathered and (unknown := sorted(gathered.keys() - dict(walk(params)).keys())):
      raise ValueError(
        f"gathered names {unknown[0]!r}, which params do not have: make it from these params, "
        "pelt.gathered(params, base_specs, mesh)"
      )
    if GENERATORS in params:
      params = expanded(params)
    variables = {**variables, "params": params}
    rows = rows if rows is None or hasattr(rows, "dtype") else np.asarray(rows)
    record = (record,) if isinstance(record, str) else tuple(record)
    mutable = kwargs.get("mutable", False)
    if record:
      kwargs["mutable"] = _with_intermediates(mutable)
    context = Context(rows=rows, train=train_nodes, record=record, gathered=gathered or {})
    with _call.activate(context), nn.intercept_methods(interceptor(context)):
      out = apply(variables, *args, **kwargs)
    _check_ran(nodes, context)
    return _recorded(out, mutable) if record else out

  return run


def _check_ran(nodes: list[str], context: Context) -> None:
  owners = {path: path.rpartition("/")[0] for path in nodes}
  idle = [path for path, owner in owners.items() if owner in context.called - context.ran]
  if idle:
    raise ValueError(
      f"these nodes did not run though their modules were called: {idle}. A bypass node runs on a "
      "module's __call__; the model reached these by another method"
    )


def _with_intermediates(mutable: Any) -> Any:
  if mutable is True:
    return True
  names = [mutable] if isinstance(mutable, str) else list(mutable or [])
  return [*names, "intermediates"]


def _recorded(out: Any, mutable: Any) -> Any:
  """Splits `(out, variables)` into what the caller asked for and the recorded values."""
  out, variables = out
  variables = dict(variables)
  values: dict[str, dict[str, Any]] = {}
  kept: dict[str, Any] = {}
  for path, value in walk(variables.pop("intermediates", {})):
    parent, _, name = path.rpartition("/")
    if name.startswith(_SOWN):
      value = value[0] if len(value) == 1 else value
      values.setdefault(parent, {})[name.removeprefix(_SOWN)] = value
    else:
      kept[path] = value
  if kept and (mutable is True or "intermediates" in (mutable or ())):
    variables["intermediates"] = update_at({}, kept)
  return ((out, variables) if mutable else out), values


def interceptor(context: Context, listen: Callable | None = None) -> Callable:
  """Runs nodes round every module call; `listen(frame, out)` hears of each."""

  def intercept(next_fun: Callable, args: tuple, kwargs: dict, where: Any) -> Any:
    module, method = where.module, where.method_name
    if module.scope is None or method == "<lambda>":  # the shell call of a lifted transform
      return next_fun(*args, **kwargs)
    if method == "setup":
      return _setup(context, module, next_fun, args, kwargs)
    path = "/".join(module.scope.path)
    frame = Frame(
      path=path,
      method=method,
      module=module,
      function=inspect.unwrap(where.orig_method.func),
      args=args,
      kwargs=kwargs,
      parent=context.top,
      trace=tracers.current_trace(),
      key=functools.partial(_stream, module),
      sow=functools.partial(_sow, module),
      now=tracers.current_trace,
    )
    # share_scope and super(): the outermost call of a path owns its node
    outer = (f for f in frame.climb() if f is not frame)
    owner = next((f for f in outer if f.path == path and f.method == method), None)
    owned = owner is not None
    leaves = module.scope.variables().get("params", {})
    node = leaves.get(BYPASS)
    runs = isinstance(node, Bypass) and not owned and method == "__call__" and not context.plain
    node = node if runs else None
    if owner is not None:
      frame.count = owner.count
    else:
      context.called.add(path)
      frame.count = context.counts.get((path, method), 0)
      context.counts[path, method] = frame.count + 1
    call = Call(next=_again(next_fun, module) if node else next_fun, frame=frame, context=context)
    call = dataclasses.replace(call, next=_product(call, leaves))
    context.top = frame
    try:
      if node is None:
        out = call.next(*args, **kwargs)
      else:
        context.ran.add(path)
        out = node(call, *args, **kwargs)
    finally:
      context.top = frame.parent
    parent = frame.parent
    if parent is not None and parent.trace == frame.trace and module.name:
      parent.seen[module.name] = (frame.input, out)  # same trace only: no tracer escapes
    if listen is not None:
      listen(frame, out, owned)
    return out

  return intercept


def _setup(context: Context, module: Any, next_fun: Callable, args: tuple, kwargs: dict) -> Any:
  """Runs `setup`; a module whose every call has a rule may hold nodes that cannot be built."""
  functions = (f for klass in type(module).__mro__ for f in vars(klass).values())
  served = any(rule_for(f) for f in functions if inspect.isfunction(f))
  before, context.in_setup = context.in_setup, served
  try:
    return next_fun(*args, **kwargs)
  finally:
    context.in_setup = before


def _again(next_fun: Callable, module: Any) -> Callable:
  """`next_fun`, callable any number of times inside one compact call.

  Flax itself does this when a compact method returns: names reserved so far are freed.
  """
  used: list[int] = []

  def run(*args, **kwargs):
    if used:
      object.__setattr__(module, "scope", module.scope.rewound())
      module._state.autoname_cursor = {}
    used.append(1)
    return next_fun(*args, **kwargs)

  return run


def _product(call: Call, leaves: Mapping) -> Callable:
  """What runs inside the bypass node: the rule if a leaf is a weight node, else the method."""
  found = rule_for(call.frame.function)
  if found is None or not any(isinstance(v, Weight) for v in leaves.values()):
    return call.next

  def bind(name: str) -> Call:
    # A key per leaf, so that neither leaves nor the module's bypass share a mask.
    salted = call.salt(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    sharding = call.context.gathered.get(f"{call.path}/{name}".lstrip("/"))
    return dataclasses.replace(salted, sharding=sharding)

  bound = {
    name: Leaf(value, bind(name))
    for name, value in leaves.items()
    if isinstance(value, Weight) or hasattr(strip(value), "dtype")
  }

  def run(*args, **kwargs):
    out = found(call.module, bound, *args, **kwargs)
    return call.next(*args, **kwargs) if out is NotImplemented else out

  return run


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf as a rule sees it: an array or a weight node bound to its Call."""

  value: Any
  call: Call

  @property
  def shape(self) -> tuple[int, ...]:
    return self.value.shape if isinstance(self.value, Weight) else jnp.shape(strip(self.value))

  @property
  def dtype(self) -> Any:
    return self.value.dtype if isinstance(self.value, Weight) else strip(self.value).dtype

  def einsum(self, eq: str, x: jax.Array, precision: Any = None) -> jax.Array:
    return product(eq, x, self.value, self.call, precision)

  def lookup(self, ids: jax.Array) -> jax.Array:
    return table_rows(self.value, ids, self.call)

  def spread(self, like: Any) -> jax.Array:
    if isinstance(self.value, Weight):
      return self.value.spread(like, self.call)
    return spread(strip(self.value), like)

  def materialize(self) -> jax.Array:
    return materialize(self.value)


def _stream(module: Any, name: str) -> jax.Array | None:
  """The key of a random stream; its counter is not advanced, so the base model stays the same."""
  found = module.scope.rngs.get(name)
  return None if found is None else found.as_jax_rng()


def _sow(module: Any, name: str, value: jax.Array) -> None:
  if not module.scope.is_mutable_collection("intermediates"):
    raise ValueError(
      f"record={name!r}: {'/'.join(module.scope.path)!r} runs inside a scan or map that does not "
      "declare the collection 'intermediates', so the value cannot come out. Add "
      "variable_axes={'intermediates': 0} to it"
    )
  module.sow("intermediates", _SOWN + name, value)
