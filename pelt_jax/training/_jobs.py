"""Many adapters trained by one program: each row of a batch belongs to one of N jobs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from pelt_jax._node import GENERATORS
from pelt_jax._transform import Transform
from pelt_jax._tree import combine, partition
from pelt_jax.nodes._bank import bank, member_axes, members_of
from pelt_jax.nodes._unbank import member
from pelt_jax.training._slots import (
  cleaned,
  first_of_two,
  injected_with,
  real_entries,
  set_slot,
)
from pelt_jax.training._step import (
  State,
  finisher,
  gradients,
  masters,
  optax_dtypes,
  warn_of_schedules,
)


class JobsState(NamedTuple):
  """What N jobs carry besides params; the leading axis of every array counts the jobs.

  Attributes:
    optimizer: the optimizer's states: step counts, moments, hyperparameters.
    active: (N,) bool; a job that is not active keeps its parameters and its optimizer's state.
    sizes: by trainable array, (N, axes), how much of each axis is the job's own; the rest pads.
  """

  optimizer: Any
  active: jax.Array
  sizes: list[jax.Array]


class Jobs(NamedTuple):
  """Pure functions, to be jitted by the caller.

  Attributes:
    init: `(members, active=None, **hyperparameters) -> (trainable, frozen, state)`.
    step: `(trainable, frozen, state, batch, key) -> (trainable, state, metrics)`.
    put: `(trainable, frozen, state, slot, params, **hyperparameters)`, to the same three.
    split: `(trainable, frozen, state) -> members`, each as wide as it came; not to be jitted.
  """

  init: Callable[..., tuple[Any, Any, JobsState]]
  step: Callable[..., tuple[Any, JobsState, dict[str, jax.Array]]]
  put: Callable[..., tuple[Any, Any, JobsState]]
  split: Callable[[Any, Any, JobsState], list[dict]]


def jobs_step(
  apply: Callable,
  loss: Callable,
  tx: optax.GradientTransformation,
  method: Transform | None = None,
  clip: float | None = None,
  accumulate: int = 1,
) -> Jobs:
  """Builds the functions that train N adapters of one frozen model at once.

  The adapters are the members of a bank; `batch["rows"]`, (B,), says whose each row is. One step
  differentiates the sum over jobs of each job's mean over its own targets, so that every member
  gets the gradient of a run of its own; then mean, penalty, clipping and `tx` run for each member
  apart. What a job does is what `train_step` would do with its rows alone, but for the masks of
  dropout. A job without rows in a batch, or not active, keeps parameters and optimizer's state to
  the bit.

  Args:
    apply: `pelt.bypass(model.apply)`.
    loss: As for `train_step`, with `aux["by_row"]`: (B,) sums and (B,) numbers of targets. Those
      of `LOSSES` serve.
    tx: An optax transformation; it sees one member's trainable part. What jobs set for themselves
      is what `optax.inject_hyperparams` injects: `inject_hyperparams(optax.adamw)(1e-3)`, or of any
      function of numbers, `inject_hyperparams(lambda learning_rate: ...)(learning_rate=1e-3)`, in
      which a schedule may depend on them.
    method: What made the members; one with a post-step is refused.
    clip: Largest norm of each job's gradients.
    accumulate: Parts a batch is split into, one after another, to save memory.

  Returns:
    A `Jobs`. `init` takes params that methods of one kind made over one base, of any width: smaller
    ones are padded, and the padding never changes. Hyperparameters are a number, or N of them.
    `step` gives each of the metrics of `train_step` as (N,), 0 for jobs without rows, and
    `trained`, which jobs took a step. `put` starts a new job in a slot of the same or a larger
    width, without another compilation of `step`; the slot may be traced. A job stops by
    `state._replace(active=state.active.at[i].set(False))`; `pelt.combine(trainable, frozen)` serves
    all of them with `rows=`.

    The optimizer's state takes N times that of one job. The forward and backward pass cost what
    the rows cost, whatever N is. (Where all members have one shape and read the same batch,
    `jointly` runs a whole `train_step` for each, post-steps included.)

  Raises:
    ValueError: `method` has a post-step, or an option is none of `train_step`'s. `init` and `put`:
      members hold generators, which a bank folds; something trains that is no member's; a
      hyperparameter that `tx` does not inject; params wider than the slot. `step`: the batch has no
      `rows`, or they name no job. (Rows that are traced make all losses NaN.)

  Example:
    >>> import jax, jax.numpy as jnp, optax, pelt_jax as pelt
    >>> from pelt_jax import nodes, training
    >>> apply = lambda variables, x, rows: x * variables["params"]["w"].members.value[rows]
    >>> def loss(apply, params, batch, key):
    ...   losses = apply({"params": params}, batch["x"], batch["rows"])
    ...   return losses.mean(), {"by_row": (losses, jnp.ones(3))}
    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    >>> jobs = training.jobs_step(apply, loss, tx)
    >>> members = [{"w": nodes.Tuned(jnp.array(w))} for w in (1.0, 2.0, 4.0)]
    >>> trainable, frozen, state = jobs.init(members, learning_rate=[0.5, 0.25, 1.0])
    >>> batch = {"x": jnp.array([1.0, 3.0, 2.0]), "rows": jnp.array([0, 0, 1])}
    >>> trainable, state, metrics = jobs.step(trainable, frozen, state, batch, jax.random.key(0))
    >>> trainable["w"].members.value.tolist(), metrics["loss"].tolist()
    ([0.0, 1.5, 4.0], [2.0, 4.0, 0.0])
  """
  if method is not None and method.post_step is not None:
    raise ValueError(
      "method has a post-step, which sees the parameters of one run: train its jobs by train_step"
    )

  def total(params: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, tuple]:
    result = loss(apply, params, batch, key)
    aux = result[1] if isinstance(result, tuple) else {}
    if "by_row" not in aux:
      raise ValueError(
        'the loss tells no aux["by_row"]: jobs need the (B,) sums and the (B,) numbers of targets '
        "of a batch's rows, as the losses of training.LOSSES give them"
      )
    sums, weights = aux["by_row"]
    by_job = lambda x: jnp.zeros(members_of(params), x.dtype).at[batch["rows"]].add(x, mode="drop")
    told = by_job(sums), by_job(weights), by_job(jnp.ones(sums.shape, jnp.int32))
    return jnp.sum(sums), told

  gradient, finish = gradients(total, accumulate), finisher(tx, clip)

  def init(
    members: Sequence[dict] | Mapping[str, dict], active: Any = None, **hyperparameters: Any
  ) -> tuple[Any, Any, JobsState]:
    every = list(members.values()) if isinstance(members, Mapping) else list(members)
    for params in every:
      _check_member(params)
    fixed = [[jnp.shape(x) for x in jax.tree.leaves(partition(m, extra=True)[1])] for m in every]
    if any(shapes != fixed[0] for shapes in fixed):
      raise ValueError(
        "members have arrays of different sizes that do not train (LoRA-FA's a): give them one rank"
      )
    trainable, frozen = partition(masters(bank(every)))
    warn_of_schedules(trainable)
    axes = _axes(trainable)
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(partition(m)[0])] for m in every]
    sizes = [jnp.asarray(s, jnp.int32) for s in zip(*shapes, strict=True)]
    leaves, structure = jax.tree.flatten(trainable)

    def start(own: list, size: list) -> Any:
      return tx.init(jax.tree.unflatten(structure, cleaned(own, real_entries(own, size))))

    with optax_dtypes():
      optimizer = jax.jit(jax.vmap(start, (axes, 0)))(leaves, sizes)
    # Strong types, as those that a step gives, or the second step would compile again.
    optimizer = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), optimizer)
    on = jnp.ones(len(every), bool) if active is None else jnp.asarray(active, bool)
    if on.shape != (len(every),):
      raise ValueError(
        f"active has shape {on.shape}: expected a flag for each of {len(every)} jobs"
      )
    return trainable, frozen, JobsState(injected_with(optimizer, hyperparameters), on, sizes)

  def step(
    trainable: Any, frozen: Any, state: JobsState, batch: dict, key: jax.Array
  ) -> tuple[Any, JobsState, dict[str, jax.Array]]:
    count, axes = state.active.shape[0], _axes(trainable)
    rows = _checked_rows(batch, count)
    told, grads = gradient(trainable, frozen, {**batch, "rows": rows}, key)
    values, weights, seen = told
    leaves, structure = jax.tree.flatten(trainable)
    rest, around = jax.tree.flatten(frozen)

    def one(own, rest, optimizer, grads, value, weight, trained, size):
      real = real_entries(own, size)
      tree, grads = (jax.tree.unflatten(structure, cleaned(x, real)) for x in (own, grads))
      before = State(optimizer, ())
      frozen = jax.tree.unflatten(around, rest)
      new, after, metrics = finish(tree, frozen, before, grads, value, weight, None)
      kept = zip(jax.tree.leaves(new), own, real, strict=True)
      new = [jnp.where(trained & r, n, o) for n, o, r in kept]
      still = lambda n, o: jnp.where(trained, n, o)
      return new, jax.tree.map(still, after.optimizer, optimizer), metrics

    trained = state.active & (seen > 0)
    places = (axes, member_axes(frozen), 0, axes, 0, 0, 0, 0)
    given = leaves, rest, state.optimizer, jax.tree.leaves(grads), values, weights, trained
    new, optimizer, metrics = jax.vmap(one, places, (axes, 0, 0))(*given, state.sizes)
    lost = jnp.where(jnp.any(rows >= count), math.nan, 0.0)
    metrics["loss"] = metrics["loss"] + lost.astype(metrics["loss"].dtype)
    metrics["trained"] = trained
    return jax.tree.unflatten(structure, new), state._replace(optimizer=optimizer), metrics

  def put(
    trainable: Any, frozen: Any, state: JobsState, slot: Any, params: dict, **hyperparameters: Any
  ) -> tuple[Any, Any, JobsState]:
    _check_member(params)
    count = state.active.shape[0]
    if not isinstance(slot, Tracer) and not 0 <= int(slot) < count:
      raise ValueError(f"slot={slot}: expected the number of one of {count} jobs, from 0")
    params = masters(params)
    wide = member(combine(trainable, frozen), 0)
    parts = partition(bank({"new": params, "slot": wide}))
    own = first_of_two(parts[0], trainable)
    size = [jnp.asarray(jnp.shape(x), jnp.int32) for x in jax.tree.leaves(partition(params)[0])]
    leaves, structure = jax.tree.flatten(trainable)
    with optax_dtypes():
      optimizer = tx.init(jax.tree.unflatten(structure, cleaned(own, real_entries(own, size))))
    optimizer = injected_with(optimizer, hyperparameters)
    fresh = JobsState(optimizer, jnp.ones((), bool), size)
    state = jax.tree.map(lambda x, new: set_slot(x, new, slot, 0), state, fresh)
    others = first_of_two(parts[1], frozen)
    rest, around = jax.tree.flatten(frozen)
    leaves = [
      set_slot(*x) for x in zip(leaves, own, [slot] * len(own), _axes(trainable), strict=True)
    ]
    rest = [
      x if axis is None else set_slot(x, new, slot, axis)
      for x, new, axis in zip(rest, others, member_axes(frozen), strict=True)
    ]
    return jax.tree.unflatten(structure, leaves), jax.tree.unflatten(around, rest), state

  def split(trainable: Any, frozen: Any, state: JobsState) -> list[dict]:
    params, sizes = combine(trainable, frozen), [np.asarray(size) for size in state.sizes]

    def one(number: int) -> dict:
      own, rest = partition(member(params, number))
      leaves, structure = jax.tree.flatten(own)
      cut = [x[tuple(map(slice, size[number]))] for x, size in zip(leaves, sizes, strict=True)]
      return combine(jax.tree.unflatten(structure, cut), rest)

    return [one(number) for number in range(len(state.active))]

  return Jobs(init, step, put, split)


def _check_member(params: dict) -> None:
  shared = (n for n, g in params.get(GENERATORS, {}).items() if getattr(g, "kept", False))
  if kept := sorted(shared):
    raise ValueError(
      f"members hold {kept}, which give one array to many nodes (VeRA, IA3 with biases), and jobs "
      "do not hold those: train each by train_step; pelt.bank serves them together"
    )
  if GENERATORS in params:
    raise ValueError(
      f"members hold the generators {sorted(params[GENERATORS])}, which a bank folds away, so that "
      "they would not train: give members without (reparametrize=False of prefixes), or pelt.fold "
      "them first and train what they made"
    )
  if members_of(params) is not None:
    raise ValueError("params hold a bank: give jobs the members, which they bank themselves")


def _axes(trainable: Any) -> list[int]:
  """The member axes of what trains.

  Raises:
    ValueError: naming what is no member's.
  """
  axes = member_axes(trainable)
  if None in axes:
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    shared = [path for path, axis in zip(paths, axes, strict=True) if axis is None]
    raise ValueError(
      f"{shared[:4]} train outside the bank, so every job would move what the others use: let each "
      "member have its own (pelt.train in its method), or train all tasks together by train_step"
    )
  return axes  # type: ignore[return-value]


def _checked_rows(batch: dict, count: int) -> jax.Array:
  """Whose each row is; numbers that name no job, where they are traced, are at least `count`."""
  if "rows" not in batch:
    raise ValueError(f'the batch has no "rows": (B,) integers that name each row\'s job of {count}')
  rows = batch["rows"]
  if not isinstance(rows, Tracer):
    odd = sorted({int(i) for i in np.asarray(rows).ravel() if not 0 <= i < count})
    if odd:
      raise ValueError(f"rows name the jobs {odd[:4]}, but there are {count}, counted from 0")
  rows = jnp.asarray(rows)
  return jnp.where(rows < 0, count, rows)
