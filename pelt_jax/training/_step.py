"""One optimizer step on the trainable part of params."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pelt_jax._node import Weight
from pelt_jax._shardings import BATCH_AXES
from pelt_jax._transform import PostStep, Transform
from pelt_jax._tree import combine, partition, penalised, penalty, value_and_grad
from pelt_jax._walk import every_node


class State(NamedTuple):
  """What training carries besides params: the optimizer's state and the method's."""

  optimizer: Any
  post: Any


class TrainStep(NamedTuple):
  """Two pure functions, to be jitted by the caller (`fit` does).

  Attributes:
    init: `params -> (trainable, frozen, state)`.
    step: `(trainable, frozen, state, batch, key) -> (trainable, state, metrics)`.
  """

  init: Callable[[Any], tuple[Any, Any, State]]
  step: Callable[..., tuple[Any, State, dict[str, jax.Array]]]


def train_step(
  apply: Callable,
  loss: Callable,
  tx: optax.GradientTransformation,
  method: Transform | None = None,
  clip: float | None = None,
  accumulate: int = 1,
) -> TrainStep:
  """Builds the functions that start and run training.

  `step` differentiates `loss(apply, params, batch, key) + pelt.penalty(params)` with respect to the
  trainable part, clips, applies `tx` and then the method's post-step. With weights w (see below),
  the loss of a batch split in parts is sum(w_i loss_i) / sum(w_i): exactly the whole batch's.

  Args:
    apply: `pelt.bypass(model.apply)`.
    loss: Returns a scalar, the mean over a batch's targets, or `(scalar, aux)`; `aux["weight"]` is
      the number of targets. Without it all parts weigh the same. `aux["record"]` (see `recorded`)
      goes to the post-step, of parts their mean.
    tx: An optax transformation; it sees the trainable part only.
    method: Its post-step runs once per step, on the gradients after clipping.
    clip: Largest global norm of the trainable part's gradients.
    accumulate: Parts a batch is split into, one after another, to save memory.

  Returns:
    `(init, step)`. Trainable arrays of 16 bits become float32 (master weights); what is frozen
    keeps its dtype. `metrics` are `loss` (with the penalty), `grad_norm` (before clipping),
    `weight`, and `learning_rate` where `tx` was made by `optax.inject_hyperparams`. Jit `step` with
    `donate_argnums=(0, 2)` to update in place.

  Raises:
    ValueError: `clip` is not positive, or `accumulate` is less than 1 or does not divide the batch,
      or the devices of the mesh in use cannot share a part's rows evenly.
  """
  post = None if method is None else method.post_step
  gradient, finish = gradients(_total(apply, loss), accumulate), finisher(tx, clip, post)

  def init(params: Any) -> tuple[Any, Any, State]:
    trainable, frozen = partition(params)
    trainable = jax.tree.map(_master, trainable)
    if post is None:
      warn_of_schedules(trainable)
    with optax_dtypes():
      optimizer = tx.init(trainable)
    return trainable, frozen, State(optimizer, post.init(trainable) if post else ())

  def step(
    trainable: Any, frozen: Any, state: State, batch: dict, key: jax.Array
  ) -> tuple[Any, State, dict[str, jax.Array]]:
    (value, weight, record), grads = gradient(trainable, frozen, batch, key)
    if accumulate > 1:
      record = jax.tree.map(lambda x: x / accumulate, record)
    return finish(trainable, frozen, state, grads, value, weight, record)

  return TrainStep(init, step)


def warn_of_schedules(trainable: Any) -> None:
  """Warns of nodes that a post-step should change while they train, where there is none."""
  waiting = [n for n in every_node(trainable) if isinstance(n, Weight) and n.scheduled]
  if kinds := sorted({type(n).__name__ for n in waiting if jax.tree.leaves(n)}):
    warnings.warn(
      f"params hold {kinds} that train and no post-step changes, so their ranks stay as they are: "
      "pass the method that made them (adalora) as method=",
      stacklevel=3,
    )


def _total(apply: Callable, loss: Callable) -> Callable:
  # The sum rather than the mean over targets: sums of parts add up to the sum of the batch.
  def total(params: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, tuple]:
    result = loss(apply, params, batch, key)
    value, aux = result if isinstance(result, tuple) else (result, {})
    weight = jnp.asarray(aux.get("weight", 1.0), value.dtype)
    return value * weight, (value * weight, weight, aux.get("record"))

  return total


def gradients(total: Callable, accumulate: int) -> Callable:
  """A function `(trainable, frozen, batch, key) -> (aux, grads)` for a batch in parts, added up.

  Args:
    total: `(params, batch, key) -> (sum, aux)`; sums and aux of parts add up to the batch's.
    accumulate: How many parts.

  Raises:
    ValueError: `accumulate` is less than 1, or (when it runs) does not divide the batch.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate={accumulate}: expected at least 1")
  gradient = value_and_grad(total, has_aux=True)

  def run(trainable: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple[Any, Any]:
    if accumulate == 1:
      (_, aux), grads = gradient(trainable, frozen, batch, key)
    else:
      (_, aux), grads = _accumulated(gradient, trainable, frozen, batch, key, accumulate)
    return aux, grads

  return run


def finisher(
  tx: optax.GradientTransformation, clip: float | None, post: PostStep | None = None
) -> Callable:
  """What follows the gradients of a sum: the mean, the penalty, clipping, `tx`, the post-step.

  Returns:
    `(trainable, frozen, state, grads, value, weight, record) -> (trainable, state, metrics)`.

  Raises:
    ValueError: `clip` is not positive.
  """
  if clip is not None and not clip > 0:
    raise ValueError(f"clip={clip}: expected a positive norm, or None for no clipping")

  def finish(
    trainable: Any, frozen: Any, state: State, grads: Any, value: Any, weight: Any, record: Any
  ) -> tuple[Any, State, dict[str, jax.Array]]:
    count = jnp.where(weight > 0, weight, jnp.ones_like(weight))  # no target: no gradient, not NaN
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    value = value / count
    if penalised(trainable):
      extra, push = value_and_grad(penalty)(trainable, frozen)
      value = value + extra.astype(value.dtype)
      grads = jax.tree.map(jnp.add, grads, push)
    norm = optax.tree.norm(grads)
    metrics = {"loss": value, "grad_norm": norm, "weight": weight}
    if clip is not None:
      factor = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
      grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
    with optax_dtypes():
      updates, optimizer = tx.update(grads, state.optimizer, trainable)
      new = optax.apply_updates(trainable, updates)
    after = state.post
    if post is not None:
      new, after = post.update(state.post, trainable, new, grads, record)
    rates = _learning_rates(optimizer)
    if len(rates) == 1:
      metrics["learning_rate"] = rates[0]
    return new, State(optimizer, after), metrics

  return finish


@contextlib.contextmanager
def optax_dtypes() -> Iterator[None]:
  """What optax runs in, whatever the caller's settings."""
  # Optax's own arithmetic mixes dtypes (`decay**count`), which strict promotion refuses.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def _learning_rates(state: Any) -> list[jax.Array]:
  """What `optax.inject_hyperparams` recorded."""
  injected = lambda x: hasattr(x, "hyperparams")
  found = [x for x in jax.tree.leaves(state, is_leaf=injected) if injected(x)]
  return [x.hyperparams["learning_rate"] for x in found if "learning_rate" in x.hyperparams]


def masters(params: Any) -> Any:
  """Params whose trainable arrays are float32 where they were half precision, as in training.

  >>> import pelt_jax
  >>> half = {"w": pelt_jax.nodes.Tuned(jnp.ones(2, jnp.bfloat16)), "b": jnp.ones(2, jnp.bfloat16)}
  >>> [str(x.dtype) for x in jax.tree.leaves(masters(half))]
  ['bfloat16', 'float32']
  """
  trainable, frozen = partition(params)
  return combine(jax.tree.map(_master, trainable), frozen)


def _master(x: Any) -> Any:
  half = jnp.issubdtype(x.dtype, jnp.floating) and jnp.dtype(x.dtype).itemsize < 4
  return x.astype(jnp.float32) if half else x


def _accumulated(
  gradient: Callable, trainable: Any, frozen: Any, batch: dict, key: jax.Array, parts: int
) -> Any:
  """What `gradient` gives for the parts of a batch, added up."""

  def split(x: Any) -> Any:
    if x.shape[0] % parts:
      raise ValueError(f"accumulate={parts} does not divide the batch of {x.shape[0]} rows")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

  def body(carry: Any, xs: Any) -> tuple[Any, None]:
    part, i = xs
    new = gradient(trainable, frozen, part, jax.random.fold_in(key, i))
    return jax.tree.map(jnp.add, carry, new), None

  pieces = jax.tree.map(split, batch)
  _check_shared(jax.tree.leaves(pieces)[0].shape[1], parts)
  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(gradient, trainable, frozen, first, key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(body, zeros, (pieces, jnp.arange(parts)))[0]


def _check_shared(rows: int, parts: int) -> None:
  """Raises ValueError if devices of the mesh in use would each compute all rows of a part."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = [name for name in BATCH_AXES if name in mesh.axis_names]
  sharing = math.prod(mesh.shape[name] for name in axes)
  if rows % sharing:
    raise ValueError(
      f"accumulate={parts} leaves {rows} rows to a part, which {sharing} devices "
      f"({', '.join(axes)}) cannot share evenly: each would compute all of them. Take a larger "
      "batch, or fewer parts"
    )
