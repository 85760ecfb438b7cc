"""Gated parts that stay shut are closed for good and pruned: an extension, in no paper."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pelt_jax._node import GENERATORS, Branch, Node
from pelt_jax._site import Site
from pelt_jax._transform import PostStep, Transform, check_whole
from pelt_jax._tree import is_hole
from pelt_jax._walk import map_arrays, map_nodes, walk
from pelt_jax.methods._gates import GatedPart, gated_parts
from pelt_jax.nodes import Closable, Prefix, PrefixMLP


class Closing(NamedTuple):
  """How far one part is from being closed; arrays are () or, under a scan, (L,).

  Attributes:
    total: sum of the mean gates since the last evaluation.
    streak: evaluations in a row that stayed under epsilon.
    closed: whether it is closed.
  """

  total: jax.Array
  streak: jax.Array
  closed: jax.Array


class ClosingState(NamedTuple):
  """What the post-step of `close_gates` carries.

  Attributes:
    steps: how many there were.
    parts: `Closing` per path.
  """

  steps: jax.Array
  parts: dict[str, Closing]


def close_gates(epsilon: float = 0.05, patience: int = 3, *, every: int = 100) -> Transform:
  """Closes, while training, every gated part whose gate stays under epsilon.

  An evaluation is the mean of a part's gate over rows, real tokens and `every` steps, layer by
  layer. After `patience` evaluations in a row under `epsilon` the part is closed for good: what it
  adds is exactly absent (a prefix is hidden from the softmax), and its arrays stay as they are,
  whatever the optimizer's moments or decay would do. Of an MLP that makes prefixes this holds for
  what makes a closed layer's. `prune_gates` takes closed parts out of the tree.

  It follows what has gates: `chain(unipelt(), close_gates(), train("head"))`. One number per gate
  is added. The post-step is a pure function that needs the gates of the step:
  `training.train_step(apply, training.recorded(loss, "mean_gate"), tx, method)` gives them. In a
  loop of your own, call `method.post_step.update(state, old, new, grads, record)` with what
  `record="mean_gate"` hands out; with `every=1`, once per evaluation.

  Neither paper closes gates; UniPELT's stay soft.

  Args:
    epsilon: in (0, 1).
    patience: k.
    every: steps per evaluation.

  Returns:
    A `Transform` with a post-step.

  Raises:
    ValueError: for a bad option; at init, if params hold no gates that train, or two at one place;
      in the post-step, without a record.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.unipelt(), pelt.close_gates(0.05, patience=3), pelt.train("head"))
  """
  if not 0.0 < epsilon < 1.0:
    raise ValueError(f"epsilon must be above 0 and below 1, as gates are; got {epsilon!r}")
  check_whole(patience=patience, every=every)

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    new = map_nodes(_closable, params)
    parts = list(gated_parts(new))
    if not parts:
      raise ValueError(
        "close_gates: params hold no gates. Chain it behind what adds some, such as pelt.unipelt"
      )
    places = [p.module for p in parts]
    if twice := sorted({p for p in places if places.count(p) > 1}):
      raise ValueError(f"close_gates: several gates at {twice[:4]}; it can tell one per module")
    if fixed := [p.path for p in parts if p.gate.group is None]:
      raise ValueError(f"close_gates: the gates at {fixed[:4]} do not train (group=None)")
    return new

  def start(trainable: Any) -> ClosingState:
    parts = {p.field: jnp.shape(p.gate.open) for p in gated_parts(trainable)}
    zero = lambda shape, kind: jnp.zeros(shape, kind)
    return ClosingState(
      jnp.zeros((), jnp.int32),
      {f: Closing(*(zero(s, k) for k in ("float32", "int32", "bool"))) for f, s in parts.items()},
    )

  def update(
    state: ClosingState, old: Any, new: Any, grads: Any, record: Any = None
  ) -> tuple[Any, ClosingState]:
    if record is None:
      raise ValueError(
        "close_gates needs the gates of the step: give train_step the loss "
        'training.recorded(loss, "mean_gate")'
      )
    steps = state.steps + 1
    due = steps % every == 0
    parts = {}
    for part in gated_parts(new):
      before, mean = state.parts[part.field], _mean_gate(part, record)
      total = before.total + mean
      low = total / every < epsilon
      counted = jnp.where(low, before.streak + 1, jnp.zeros_like(before.streak))
      streak = jnp.where(due, counted, before.streak)
      closed = before.closed | (streak >= patience)
      parts[part.field] = Closing(jnp.where(due, jnp.zeros_like(total), total), streak, closed)
    closed = {field: part.closed for field, part in parts.items()}
    return _held(old, new, closed), ClosingState(steps, parts)

  return Transform(initialize, PostStep(start, update))


def _closable(node: Node) -> Node:
  """A node whose gate can be closed."""
  if isinstance(node, Closable):
    return node

  def of(gate: Any) -> Closable:
    lead = jax.tree.leaves(gate)[0].shape[: node.stacked]
    group = gate.group if isinstance(gate, Node) else node.group
    return Closable(gate, jnp.ones(lead, jnp.float32), group=group, stacked=node.stacked)

  is_gate = lambda name, v: name == "gate" or (name == "scaling" and isinstance(v, Branch))
  found = {n: v for n, v in node.children() if v is not None and is_gate(n, v)}
  return node.replace(**{n: of(v) for n, v in found.items() if not isinstance(v, Closable)})


def _mean_gate(part: GatedPart, record: dict) -> jax.Array:
  """The gate's mean over rows, () or (L,); of several gates the largest."""
  seen = record.get(part.module, {})
  if "mean_gate" not in seen:
    raise ValueError(
      f'close_gates: the record has no "mean_gate" of {part.module!r}, only {sorted(seen)}; record '
      "that name, of the model whose params these are"
    )
  gates = jnp.asarray(seen["mean_gate"], jnp.float32)
  return jnp.max(jnp.mean(gates, -2), -1)


def _held(old: Any, new: Any, closed: dict[str, jax.Array]) -> Any:
  """`new`, where a part is closed with the arrays of `old`, and its gate's `open` as it should."""
  before: dict[str, Any] = {}
  map_arrays(lambda kind, group, x, path: before.setdefault(path, x), old, is_leaf=is_hole)
  made = _generated(new, closed)

  def hold(kind: str, group: str | None, x: Any, path: str) -> Any:
    if is_hole(x):
      return x
    owner = next((f for f in closed if path.startswith(f"{f}/")), None)
    if owner is not None and not path.startswith(f"{owner}/base"):
      shut = closed[owner]
      shut = shut.reshape(shut.shape + (1,) * (x.ndim - shut.ndim))
      if path.endswith("/open"):
        return jnp.asarray(~shut, x.dtype)
      return jnp.where(shut, before[path], x)
    return x if path not in made else jnp.where(made[path], before[path], x)

  return map_arrays(hold, new, is_leaf=is_hole)


def _generated(tree: Any, closed: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """By path of a generator's arrays: which of their numbers make closed prefixes alone."""
  prefixes = {p.module: p.field for p in gated_parts(tree) if isinstance(p.node, Prefix)}
  held = {}
  for path, node in walk(tree.get(GENERATORS, {})):
    if not isinstance(node, PrefixMLP) or not all(site in prefixes for site in node.sites):
      continue
    layers = jnp.concatenate([jnp.atleast_1d(closed[prefixes[site]]) for site in node.sites])
    columns = jnp.repeat(layers, 2 * node.heads[0] * node.heads[1])
    of = lambda name, flags, path=path: held.update({f"{GENERATORS}/{path}/{name}": flags})
    of("w2", columns[None])
    of("b2", columns)
    for name, ndim in (("embedding", 2), ("w1", 2), ("b1", 1)):
      of(name, jnp.all(layers).reshape((1,) * ndim))
  return held
