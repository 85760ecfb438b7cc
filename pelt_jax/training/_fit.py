"""The training loop."""

import collections
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pelt_jax._tree import combine
from pelt_jax.training._batch import Batch
from pelt_jax.training._checkpoint import Checkpoints
from pelt_jax.training._compile import Compiled
from pelt_jax.training._interrupt import Interrupted, interruptions
from pelt_jax.training._loader import Loader
from pelt_jax.training._progress import bar
from pelt_jax.training._step import TrainStep

_KEPT_TIMES = 200


@dataclasses.dataclass
class History:
  """What happened.

  Attributes:
    loss: `[step, training loss]`.
    evaluations: `[step, scores]`.
    best: Step and score of the best evaluation, if a metric was given.
  """

  loss: list[list[float]] = dataclasses.field(default_factory=list)
  evaluations: list[list[Any]] = dataclasses.field(default_factory=list)
  best: list[float] | None = None


class Fit(NamedTuple):
  """What `fit` returns.

  Attributes:
    params: The last params, or with `metric` the best.
    trainable: Their trainable part.
    state: After the last step.
    history: Losses and scores.
    steps: How many steps were done, those before a resume included.
    step_ms: Median time of a step, compilation excluded.
    compile_s: Time spent compiling the step.
    cost: Of the compiled step; see `Compiled.cost`.
  """

  params: Any
  trainable: Any
  state: Any
  history: History
  steps: int
  step_ms: float | None
  compile_s: float
  cost: dict[str, int | None]


class Diverged(FloatingPointError):
  """The loss is not a finite number any more."""


def fit(
  train: TrainStep,
  params: Any,
  loader: Loader,
  *,
  steps: int,
  key: jax.Array,
  evaluate: Callable[[Any], dict[str, float]] | None = None,
  every: int | None = None,
  metric: str | None = None,
  higher_is_better: bool = True,
  patience: int | None = None,
  checkpoints: Checkpoints | None = None,
  save_every: int | None = None,
  resume: bool = False,
  progress: bool = True,
  place: Callable[[Batch], Any] | None = None,
) -> Fit:
  """Trains, evaluates, keeps the best, and can go on where it stopped.

  A resumed run ends with the same bits as one that was never interrupted: step i uses the key
  `fold_in(key, i)`, and the checkpoint holds the position in the data. With `checkpoints`, SIGTERM
  ends the run after a step, and saves it. Checkpoints are written while training goes on, so that
  a failed save is raised at the next one, or at the end.

  Args:
    train: What `train_step` returned.
    params: Params with nodes, at the start.
    loader: The stream of batches.
    steps: Optimizer steps in all.
    key: For dropout.
    evaluate: `params -> scores`, an `Evaluator` for instance; runs every `every` steps and at the
      end.
    every: See there; None evaluates at the end only.
    metric: Which score tells the best params. None keeps the last.
    higher_is_better: Whether more of it is better.
    patience: Stop after so many evaluations without improvement.
    checkpoints: Where to save, every `save_every` steps (None: with each evaluation, and at the
      end).
    save_every: See there.
    resume: Start from the last checkpoint, if there is one.
    progress: Show a progress bar.
    place: What puts a batch on devices, for sharded runs.

  Returns:
    A `Fit`.

  Raises:
    Diverged: The loss is not finite.
    Interrupted: SIGTERM came; the last step is saved.
    OSError: A checkpoint could not be written; those before it are as they were.
    CheckpointMismatch: The checkpoint to resume from was made by a run with other options.
    ValueError: `patience` without `metric` or `metric` without `evaluate`; fewer than 1 step.
  """
  if steps < 1:
    raise ValueError(f"steps={steps}: expected at least 1")
  if metric is not None and evaluate is None:
    raise ValueError(f"metric={metric!r} needs evaluate, the function that computes it")
  if patience is not None and metric is None:
    raise ValueError(f"patience={patience} needs metric, the score that should improve")
  # A copy: the step donates its buffers, and the caller's params stay valid.
  trainable, frozen, state = train.init(params)
  trainable = jax.tree.map(lambda x: x.copy(), trainable)
  best = jax.tree.map(lambda x: x.copy(), trainable) if metric is not None else ()
  history, start, since = History(), 0, 0
  saved: int | None = None
  if resume and checkpoints is not None and checkpoints.latest() is not None:
    like = {"trainable": trainable, "state": state, "best": best, "key": key}
    start, tree, meta = checkpoints.restore(like)
    saved = start
    trainable, state, key = tree["trainable"], tree["state"], tree["key"]
    best = tree["best"]
    history, since = History(**meta["history"]), meta["since"]
    loader.set_state(meta["data"])

  # Results keep the placement of what they replace, or the next step would not fit its program.
  kept = jax.tree.map(lambda x: x.sharding, (trainable, state))
  program = Compiled(train.step, by=3, donate_argnums=(0, 2), out_shardings=(*kept, None))
  place = place or (lambda batch: batch)
  pending: tuple[int, Any] | None = None
  times: collections.deque[float] = collections.deque(maxlen=_KEPT_TIMES)

  def flush() -> float | None:
    nonlocal pending
    if pending is None:
      return None
    (number, value), pending = pending, None
    loss = float(value)
    if not math.isfinite(loss):
      raise Diverged(
        f"the loss of step {number} is {loss}: lower the learning rate, warm up longer, or clip "
        "gradients harder"
      )
    history.loss.append([number, loss])
    return loss

  def save(number: int) -> None:
    nonlocal saved
    if checkpoints is not None and saved != number:
      meta = {"history": dataclasses.asdict(history), "since": since, "data": loader.get_state()}
      tree = {"trainable": trainable, "state": state, "best": best, "key": key}
      checkpoints.save(number, tree, meta)
      saved = number

  number = start
  stopped = patience is not None and since >= patience
  mark: float | None = None  # when the step before last was done
  with contextlib.ExitStack() as stack:
    asked_to_stop = lambda step: False
    if checkpoints is not None:
      asked_to_stop = stack.enter_context(interruptions())
      stack.push(lambda kind, *_: _ended(checkpoints, kind))
    advance = stack.enter_context(bar("training", steps, start, progress))
    while number < steps and not stopped:
      if checkpoints is not None and asked_to_stop(number):
        flush()
        save(number)
        checkpoints.wait()
        raise Interrupted(number)
      batch = place(next(loader))
      before = program.seconds
      trainable, state, metrics = program(
        trainable, frozen, state, batch, jax.random.fold_in(key, number)
      )
      number += 1
      loss = flush()  # of the step before, so that the device never waits for the host
      now = time.perf_counter() if loss is not None else None
      if now is not None and mark is not None and program.seconds == before:
        times.append(now - mark)
      mark, pending = now, (number, metrics["loss"])
      advance(None if loss is None else f"loss {loss:.4f}")
      due = number == steps or (every is not None and number % every == 0)
      if evaluate is not None and due:
        flush()
        scores = evaluate(combine(trainable, frozen))
        history.evaluations.append([number, scores])
        if metric is not None:
          sign = 1 if higher_is_better else -1
          if history.best is None or sign * scores[metric] > sign * history.best[1]:
            history.best, since = [number, scores[metric]], 0
            best = jax.tree.map(lambda x: x.copy(), trainable)
          else:
            since += 1
          stopped = patience is not None and since >= patience
      keep = due if save_every is None else number % save_every == 0 or number == steps
      if keep or stopped:
        flush()
        save(number)
      if pending is None:  # evaluated or saved since: the next interval is no step's
        mark = None
    if (loss := flush()) is not None:
      advance(f"loss {loss:.4f}", 0)
  if metric is not None and history.best is not None:
    trainable = best
  return Fit(
    combine(trainable, frozen),
    trainable,
    state,
    history,
    number,
    1e3 * statistics.median(times) if times else None,
    program.seconds,
    program.cost(),
  )


def _ended(checkpoints: Checkpoints, error: type[BaseException] | None) -> None:
  """Sees to it that what was saved is written, also when training failed."""
  if error is None:
    checkpoints.wait()
  elif jax.process_count() == 1:  # the others may never come
    with contextlib.suppress(OSError):
      checkpoints.wait()
