"""Prompt ensembling: many small additions to one frozen model, trained and asked together."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._parallel import parallel
from pelt_jax._tree import combine, partition
from pelt_jax.nodes._bank import bank, members_of
from pelt_jax.training._encoded import Encoded
from pelt_jax.training._evaluate import MAIN_METRIC, Evaluator
from pelt_jax.training._step import TrainStep


def vote(scores: jax.Array | np.ndarray, by: str = "majority") -> jax.Array:
  """Scores of the classes from those of N members, (N, ..., C) to (..., C).

  Args:
    scores: Every member's logits.
    by: `"majority"`: how many members have a class as their best; in a tie `argmax` takes the
      lowest class. `"mean_logit"`: the mean of the logits.

  Returns:
    What `argmax` picks the class from. Votes are no logits: a loss of them means nothing.

  Raises:
    ValueError: Another `by`, or no axis of members.

  Example:
    >>> from pelt_jax import training
    >>> scores = jnp.array([[[9.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    >>> training.vote(scores).tolist(), training.vote(scores, "mean_logit").tolist()
    ([[1.0, 2.0]], [[3.0, 1.0]])
  """
  if by not in ("majority", "mean_logit"):
    raise ValueError(f"by must be 'majority' or 'mean_logit', got {by!r}")
  if scores.ndim < 2:
    raise ValueError(f"scores has shape {scores.shape}, expected (N, ..., C)")
  if by == "mean_logit":
    return jnp.mean(scores, axis=0)
  best = jnp.argmax(scores, axis=-1)
  return jnp.sum(jax.nn.one_hot(best, scores.shape[-1], dtype=scores.dtype), axis=0)


def ensemble(apply: Callable, members: int, by: str = "majority") -> Callable:
  """An `apply` that asks all members of a bank about every row, in one forward pass.

  The batch of B rows runs as one of N B, the first B with member 0; the frozen model is there once.

  Args:
    apply: `pelt.bypass(model.apply)` of a model that returns logits, or `cloze` of it.
    members: N, how many members the bank has.
    by: As for `vote`.

  Returns:
    `apply(variables, input_ids, ...) -> (B, ..., C)` for params that `pelt.bank` made, heads
    included where they train. Arguments whose first axis is the batch are repeated. Every method
    but `full` serves: a table that is looked up once for all rows, such as BERT's token types, has
    no members.

  Raises:
    ValueError: `members` is less than 1, or more than the bank has, or what differs by member does
      not meet every row (both when it runs).
    RuntimeError: A weight that differs by member is in a module without a rule (when it runs).

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> from pelt_jax import training
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> base, sites = model.init(jax.random.key(0), x)["params"], pelt.sites(model, x)
    >>> lora = pelt.lora(rank=1, targets="*")
    >>> runs = [lora.init(jax.random.key(i), base, sites) for i in range(5)]
    >>> ask = training.ensemble(pelt.bypass(model.apply), len(runs))
    >>> ask({"params": pelt.bank(runs)}, x).sum(-1).tolist()  # five votes a row
    [5.0, 5.0]
  """
  if members < 1:
    raise ValueError(f"members={members}: expected at least 1")

  @functools.wraps(apply)
  def ask(variables: Any, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    found = members_of(variables["params"])
    if found != members:
      holds = "no bank" if found is None else f"a bank of {found}"
      raise ValueError(f"members={members}, but params hold {holds}: pass those of pelt.bank(...)")
    if "rows" in kwargs:
      raise ValueError("rows: an ensemble asks all members about every row, so leave rows out")
    return vote(parallel(apply)(variables, inputs, *args, **kwargs), by)

  return ask


class EnsembleScores(NamedTuple):
  """What members score alone and together, all by one metric.

  Attributes:
    metric: Its name, accuracy or entity_f1.
    members: One score each.
    average: Their mean.
    best: The best of them. It is chosen on the data that scores it, so it flatters.
    majority: Of the majority's votes.
    mean_logit: Of the mean logits.
  """

  metric: str
  members: tuple[float, ...]
  average: float
  best: float
  majority: float
  mean_logit: float


def ensemble_scores(
  apply: Callable, members: Sequence[Any], data: Encoded, size: int = 32
) -> EnsembleScores:
  """Scores members on data, each alone and all together.

  Args:
    apply: As for `ensemble`.
    members: Their params, over one base, their heads included.
    data: What `encode` returned, of a task with classes.
    size: Rows per batch; the ensemble's have N times as many.

  Raises:
    ValueError: There are no members, their sites differ, or the task has no classes.
  """
  metric, _ = MAIN_METRIC[data.task]
  if data.task not in ("classification", "tagging"):
    raise ValueError(f"data has the task {data.task!r}: only classes can be voted for")
  banked = bank(members)
  alone = Evaluator(apply, data, size)
  scores = tuple(alone(member)[metric] for member in members)
  together = [
    Evaluator(ensemble(apply, len(members), by), data, size)(banked)[metric]
    for by in ("majority", "mean_logit")
  ]
  return EnsembleScores(metric, scores, float(np.mean(scores)), max(scores), *together)


class Joint(NamedTuple):
  """Pure functions that train N members at once, to be jitted by the caller.

  Attributes:
    init: `members -> (trainable, frozen, state)`; every array of members has a leading axis N.
    step: `(trainable, frozen, state, batch, keys) -> (trainable, state, metrics)` with one key per
      member; the batch is the same for all. Metrics are (N,).
    split: `(trainable, frozen) -> members`.
  """

  init: Callable[[Sequence[Any]], tuple[Any, Any, Any]]
  step: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
  split: Callable[[Any, Any], list[Any]]


def jointly(train: TrainStep) -> Joint:
  """The step of one member for N, as one vmapped program over one frozen model.

  Each member has its own optimizer state, and its gradients are clipped by their own norm: the
  result is that of N separate runs.

  Args:
    train: What `train_step` returned.

  Returns:
    A `Joint`. Its `init` takes members that one method made over one base, whose frozen leaves are
    those of the first, and raises ValueError where their nodes or shapes differ; its `step` does
    where there is not one key per member.

  Example:
    >>> import jax, jax.numpy as jnp, optax, pelt_jax as pelt
    >>> from pelt_jax import nodes, training
    >>> loss = lambda apply, params, batch, key: jnp.sum(params["w"].value * batch["x"])
    >>> train = training.jointly(training.train_step(print, loss, optax.sgd(0.5)))
    >>> runs = [{"w": nodes.Tuned(jnp.array(w))} for w in (1.0, 2.0)]
    >>> trainable, frozen, state = train.init(runs)
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> trainable, state, _ = train.step(trainable, frozen, state, {"x": 2.0}, keys)
    >>> [float(p["w"].value) for p in train.split(trainable, frozen)]
    [0.0, 1.0]
  """

  def init(members: Sequence[Any]) -> tuple[Any, Any, Any]:
    if not members:
      raise ValueError("members is empty: give the params of at least one run")
    parts = [partition(m, extra=True) for m in members]
    kinds = [jax.tree.structure(p) for p in parts]
    if odd := [i for i, kind in enumerate(kinds) if kind != kinds[0]]:
      raise ValueError(f"members 0 and {odd[0]} have different nodes: give them the same method")
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(p)] for p in parts]
    if odd := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
      pairs = zip(shapes[0], shapes[odd[0]], strict=True)
      first, other = next((a, b) for a, b in pairs if a != b)
      raise ValueError(
        f"members 0 and {odd[0]} have arrays of shapes {first} and {other} at one place: give them "
        "the same method with the same options"
      )
    stack = lambda i: jax.tree.map(lambda *x: jnp.stack(x), *(p[i] for p in parts))
    own, extra, base = stack(0), stack(1), parts[0][2]

    def start(own: Any, extra: Any) -> tuple[Any, Any]:
      trainable, _, state = train.init(combine(own, extra, base))
      return trainable, state

    trainable, state = jax.vmap(start)(own, extra)
    return trainable, (extra, base), state

  def step(trainable: Any, frozen: Any, state: Any, batch: Any, keys: jax.Array) -> Any:
    extra, base = frozen
    count = len(jax.tree.leaves(trainable)[0])
    if jnp.shape(keys)[:1] != (count,):
      raise ValueError(
        f"keys has shape {jnp.shape(keys)}: expected one key for each of {count} members, such as "
        f"jax.random.split(key, {count})"
      )

    def one(trainable: Any, extra: Any, state: Any, key: jax.Array) -> Any:
      return train.step(trainable, combine(extra, base), state, batch, key)

    return jax.vmap(one)(trainable, extra, state, keys)

  def split(trainable: Any, frozen: Any) -> list[Any]:
    extra, base = frozen
    count = len(jax.tree.leaves(trainable)[0])
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    return [combine(pick(trainable, i), pick(extra, i), base) for i in range(count)]

  return Joint(init, step, split)
