"""A grid of runs as jobs of one program, the worse of them stopped early (successive halving)."""

import inspect
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from pelt_jax._site import Site
from pelt_jax._transform import Transform
from pelt_jax._tree import combine
from pelt_jax.nodes._unbank import member
from pelt_jax.training._compile import Compiled
from pelt_jax.training._extras import need
from pelt_jax.training._jobs import jobs_step
from pelt_jax.training._progress import bar

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Trial(NamedTuple):
  """One run of a grid.

  Attributes:
    options: What it was made of.
    scores: `(step, score)`, as long as it ran.
    steps: How many steps it took.
  """

  options: dict[str, Any]
  scores: tuple[tuple[int, float], ...]
  steps: int


class Sweep(NamedTuple):
  """What `sweep` found.

  Attributes:
    trials: In the grid's order.
    best: The number of the winner, the best of those that ran to the end.
    params: The winner's.
    steps: Steps that all runs took together.
    full: What the grid would take if nobody stopped.
    metric: The name of the score.
    compile_s: Time spent compiling the step.
  """

  trials: tuple[Trial, ...]
  best: int
  params: dict
  steps: int
  full: int
  metric: str
  compile_s: float

  @property
  def winner(self) -> Trial:
    """The best run."""
    return self.trials[self.best]

  def table(self) -> str:
    """The runs as lines of a Markdown table, the winner first, and what they took together."""
    names = list(dict.fromkeys(name for trial in self.trials for name in trial.options))
    lines = [
      f"| {' | '.join(names)} | stopped after | {self.metric} |",
      "|---" * (len(names) + 2) + "|",
    ]
    rest = (i for i in range(len(self.trials)) if i != self.best)
    for i in (self.best, *sorted(rest, key=lambda i: -self.trials[i].steps)):
      options, scores, steps = self.trials[i]
      cells = [f"{options.get(name, '')}" for name in names]
      lines.append(f"| {' | '.join(cells)} | {steps} | {scores[-1][1]:.4f} |")
    share = self.steps / self.full
    return "\n".join([*lines, f"\n{self.steps} of the grid's {self.full} steps ({share:.0%})."])

  def plot(self, path: str | pathlib.Path) -> None:
    """Writes a picture of scores over steps, a line for each run; needs matplotlib."""
    figure = need("matplotlib.figure").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, trial in enumerate(self.trials):
      label = ", ".join(f"{k} {v}" for k, v in trial.options.items())
      axes.plot(*zip(*trial.scores, strict=True), "o-", label=label, lw=1 + (i == self.best))
    axes.set(xlabel="step", ylabel=self.metric)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def sweep(
  make: Callable[..., Transform],
  grid: Mapping[str, Sequence] | Sequence[Mapping[str, Any]],
  base: dict,
  sites: tuple[Site, ...],
  *,
  apply: Callable,
  loss: Callable,
  tx: optax.GradientTransformation,
  batches: Iterable[dict],
  steps: int,
  evaluate: Callable[[dict], Any],
  metric: str | None = None,
  higher_is_better: bool = True,
  keep: float = 1 / 3,
  rungs: Sequence[int] | None = None,
  clip: float | None = None,
  accumulate: int = 1,
  key: jax.Array | None = None,
  progress: bool = False,
) -> Sweep:
  """Trains every combination of a grid at once, and stops the worse ones early.

  The runs are jobs of one program (`jobs_step`) over one frozen model: all see the same batches in
  the same order, and each ends where a run of its own would (but for the masks of dropout). At
  every rung the runs are scored, and the best `keep` of them, rounded up, go on, until one is left,
  which runs to the end: successive halving, arXiv:1502.07943. Rates that pay late, such as small
  ones, are stopped wrongly if the first rung comes too early.

  Args:
    make: Makes the method of one run from its options, `pelt.lora` for instance.
    grid: Values by name, for all combinations; or the runs' options one by one. The names of
      `make`'s arguments are its own, `seed` is that of a run's first params, and any other is a
      hyperparameter that `tx` injects, such as `learning_rate`.
    base: The model's params.
    sites: What `pelt.sites` returned.
    apply: `pelt.bypass(model.apply)`.
    loss: As for `jobs_step`.
    tx: As for `jobs_step`.
    batches: The stream of training batches; a `Loader`, say.
    steps: Of a run that is not stopped.
    evaluate: `params -> score`, or a dict of scores, on held-out data: an `Evaluator`.
    metric: Which of a dict's scores counts.
    higher_is_better: Whether more of it is better. A score that is NaN is the worst.
    keep: The share that goes on at a rung; 1 stops nobody.
    rungs: Steps after which to score and stop. By default steps * keep^k, as many as leave one run
      of the grid.
    clip: As for `jobs_step`.
    accumulate: As for `jobs_step`.
    key: Of what is drawn.
    progress: Show a progress bar.

  Returns:
    A `Sweep`.

  Raises:
    ValueError: The grid is empty, `steps`, `keep` or `rungs` are impossible, or `metric` names no
      score; and what `jobs_step` raises.

  Example:
    >>> import flax.linen as nn, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(1, use_bias=False), jnp.ones((2, 4))
    >>> base, sites = model.init(jax.random.key(0), x)["params"], pelt.sites(model, x)
    >>> def loss(apply, params, batch, key):
    ...   out = apply({"params": params}, batch["x"], rows=batch.get("rows"))[:, 0]
    ...   return ((out - 1) ** 2).mean(), {"by_row": ((out - 1) ** 2, jnp.ones(len(out)))}
    >>> apply = pelt.bypass(model.apply)
    >>> grid = {"rank": [1], "targets": ["kernel"], "learning_rate": [1e-4, 1e-3, 0.05]}
    >>> found = pelt.sweep(
    ...   pelt.lora, grid, base, sites, apply=apply, loss=loss,
    ...   tx=optax.inject_hyperparams(optax.adam)(learning_rate=1.0),
    ...   batches=itertools.repeat({"x": x}), steps=9,
    ...   evaluate=lambda params: loss(apply, params, {"x": x}, None)[0], higher_is_better=False,
    ... )  # fmt: skip
    >>> found.winner.options["learning_rate"], [t.steps for t in found.trials], found.steps
    (0.05, [3, 3, 9], 15)
  """
  options = _combinations(grid)
  count = len(options)
  _check(steps, keep, rungs)
  rungs = _rungs(count, steps, keep) if rungs is None else (*sorted(set(rungs)), steps)
  key = jax.random.key(0) if key is None else key
  wanted = inspect.signature(make).parameters
  own = set(wanted)
  needed = {n for n, p in wanted.items() if p.default is p.empty and p.kind not in _REST}
  if lacking := sorted(needed - set(options[0])):
    raise ValueError(f"grid gives {sorted(options[0])}, and make needs {lacking} too")
  starts, drawn = jax.random.split(key)
  methods = [make(**{k: v for k, v in o.items() if k in own}) for o in options]
  members = [
    method.init(jax.random.fold_in(starts, o.get("seed", 0)), base, sites)
    for method, o in zip(methods, options, strict=True)
  ]
  names = {name for o in options for name in o} - own - {"seed"}
  for name in names:
    if odd := [i for i, o in enumerate(options) if name not in o]:
      raise ValueError(f"{name} is given for some runs and not for the run {options[odd[0]]}")
  refused = next((method for method in methods if method.post_step is not None), None)
  jobs = jobs_step(apply, loss, tx, refused, clip=clip, accumulate=accumulate)
  trainable, frozen, state = jobs.init(members, **{n: [o[n] for o in options] for n in names})
  program = Compiled(jobs.step, by=3, donate_argnums=(0, 2))
  alive, stream, sign = list(range(count)), iter(batches), 1 if higher_is_better else -1
  scores: list[list[tuple[int, float]]] = [[] for _ in options]
  used = 0
  with bar("sweep", steps, show=progress) as advance:
    for start, rung in itertools.pairwise((0, *rungs)):
      for number in range(start, rung):
        batch = next(stream, None)
        if batch is None:
          raise ValueError(
            f"batches end after {number} of {steps} steps: give a stream that goes on"
          )
        batch = _repeated(batch, alive)
        step_key = jax.random.fold_in(drawn, number)
        trainable, state, _ = program(trainable, frozen, state, batch, step_key)
        used += len(alive)
        advance(f"{len(alive)} runs")
      params = combine(trainable, frozen)
      for i in alive:
        scores[i].append((rung, _score(evaluate(member(params, i)), metric)))
      order = sorted(alive, key=lambda i: _worst_last(sign * scores[i][-1][1]))
      if rung < steps:
        alive = sorted(order[: _left(len(alive), keep)])
  trials = tuple(Trial(o, tuple(s), s[-1][0]) for o, s in zip(options, scores, strict=True))
  params = jobs.split(trainable, frozen, state)[order[0]]
  name = metric or "score"
  return Sweep(trials, order[0], params, used, count * steps, name, program.seconds)


def _combinations(grid: Mapping[str, Sequence] | Sequence[Mapping[str, Any]]) -> list[dict]:
  if isinstance(grid, Mapping):
    runs = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
  else:
    runs = [dict(run) for run in grid]
  if not runs or not runs[0]:
    raise ValueError(f"grid={grid!r}: expected at least one run, {{'learning_rate': [1e-3, 1e-4]}}")
  return runs


def _check(steps: int, keep: float, rungs: Sequence[int] | None) -> None:
  if steps < 1:
    raise ValueError(f"steps={steps}: expected at least 1")
  if not 0 < keep <= 1:
    raise ValueError(f"keep={keep}: expected a share, 0 < keep <= 1")
  if rungs is not None and not all(0 < r < steps for r in rungs):
    raise ValueError(f"rungs={tuple(rungs)}: expected steps between 0 and the last, {steps}")


def _rungs(count: int, steps: int, keep: float) -> tuple[int, ...]:
  """When to score: the last step, and as many before as leave one run."""
  found, left = [steps], count
  while left > 1 and keep < 1:
    left = _left(left, keep)
    found.append(max(1, round(steps * keep ** len(found))))
  return tuple(sorted(set(found)))


def _left(count: int, keep: float) -> int:
  """How many of some runs go on."""
  share = math.ceil(round(keep * count, 9))  # a third of six is two
  return count if keep == 1 else max(1, min(count - 1, share))


def _repeated(batch: dict, jobs: list[int]) -> dict:
  """The batch once for each job, one after the other."""
  rows = len(next(iter(batch.values())))
  many = {k: np.concatenate([np.asarray(v)] * len(jobs)) for k, v in batch.items()}
  return many | {"rows": np.repeat(np.asarray(jobs, np.int32), rows)}


def _score(found: Any, metric: str | None) -> float:
  if not isinstance(found, Mapping):
    return float(found)
  if metric not in found:
    raise ValueError(f"metric={metric!r}: expected one of evaluate's scores, {sorted(found)}")
  return float(found[metric])


def _worst_last(score: float) -> float:
  return math.inf if math.isnan(score) else -score
