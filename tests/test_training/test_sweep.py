"""A grid in one program: each run as it would be alone, the worse ones stopped early."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pelt_jax as pelt
from pelt_jax import training

MODEL = nn.Dense(3, use_bias=False)
APPLY = pelt.bypass(MODEL.apply)
X = jax.random.normal(jax.random.key(0), (6, 4))
BASE = MODEL.init(jax.random.key(1), X)["params"]
SITES = pelt.sites(MODEL, X)
# A change of rank 3, which no LoRA of rank 1 makes.
WANTED = X @ (BASE["kernel"] + jax.random.normal(jax.random.key(2), (4, 3)))
TX = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
GRID = {"rank": [1, 3], "learning_rate": [1e-4, 0.1, 30.0]}
STEPS = 90


def make(rank, alpha=None):
  return pelt.lora(rank, alpha, targets="kernel")


def squares(apply, params, batch, key):
  out = apply({"params": params}, batch["x"], rows=batch.get("rows"))
  losses = jnp.sum((out - batch["y"]) ** 2, axis=1)
  return losses.mean(), {"by_row": (losses, jnp.ones(len(losses)))}


def stream():
  """Batches of two rows, no two alike."""
  for i in itertools.count():
    rows = np.array([i % 6, (i * i + 1) % 6])
    yield {"x": np.asarray(X)[rows], "y": np.asarray(WANTED)[rows]}


@jax.jit
def held_out(params):
  return squares(APPLY, params, {"x": X, "y": WANTED}, None)[0]


def run(grid=GRID, **options):
  given = {"steps": STEPS, "batches": stream(), "evaluate": held_out, "higher_is_better": False}
  given |= {"apply": APPLY, "loss": squares, "tx": TX} | options
  return training.sweep(make, grid, BASE, SITES, **given)


def test_the_known_winner_is_found_with_fewer_steps():
  found = run()
  assert found.winner.options == {"rank": 3, "learning_rate": 0.1}
  assert [t.steps for t in found.trials] == [10, 30, 10, 10, 90, 10]
  assert found.steps == 6 * 10 + 2 * 20 + 60 and found.full == 6 * 90
  assert [step for step, _ in found.winner.scores] == [10, 30, 90]
  assert found.params["kernel"].a.shape == (4, 3)
  np.testing.assert_allclose(held_out(found.params), found.winner.scores[-1][1], rtol=1e-6)
  lines = found.table().splitlines()
  assert lines[0] == "| rank | learning_rate | stopped after | score |"
  assert lines[2].startswith("| 3 | 0.1 | 90 |") and lines[3].startswith("| 1 | 0.1 | 30 |")
  assert lines[-1] == "160 of the grid's 540 steps (30%)."


def test_each_run_is_a_run_of_its_own():
  """The same batches in the same order, whoever else is there; a narrow one stays narrow."""
  grid = [
    {"rank": 2, "learning_rate": 0.1, "seed": 1},
    {"rank": 1, "learning_rate": 0.2, "seed": 2},
  ]
  both = run(grid, keep=1, rungs=[3], steps=9)
  assert both.steps == both.full == 18 and [t.steps for t in both.trials] == [9, 9]
  for options, trial in zip(grid, both.trials, strict=True):
    alone = run([options], steps=9, rungs=[3])
    np.testing.assert_allclose(alone.winner.scores, trial.scores, rtol=1e-5)
    assert alone.params["kernel"].a.shape == (4, options["rank"])


def test_what_diverged_is_the_worst_whichever_way_scores_count():
  nan = lambda params: float("nan") if params["kernel"].scaling == 4 else 1.0
  grid = [{"rank": 1, "alpha": a, "learning_rate": 0.1} for a in (4, 2)]
  for higher in (False, True):
    found = run(grid, evaluate=nan, higher_is_better=higher, steps=2)
    assert found.best == 1 and [t.steps for t in found.trials] == [1, 2]


@pytest.mark.parity
def test_a_picture(tmp_path):
  run(steps=2).plot(tmp_path / "sweep.png")
  assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_sweeps_are_named():
  for options, match in (
    ({"grid": {}}, "grid={}: expected at least one run"),
    ({"keep": 0.0}, "keep=0.0"),
    ({"steps": 0}, "steps=0"),
    ({"rungs": [90]}, r"rungs=\(90,\)"),
    ({"grid": {"rank": [1], "rate": [1.0]}}, r"rate: tx injects .*'learning_rate'"),
    ({"grid": [{"rank": 1, "learning_rate": 0.1}, {"rank": 1}]}, "learning_rate is given for some"),
    ({"evaluate": lambda p: {"loss": 1.0}, "metric": "accuracy", "steps": 1}, r"one of .*'loss'"),
  ):
    with pytest.raises(ValueError, match=match):
      run(**options)


def test_methods_with_a_post_step_are_refused():
  model, x = nn.Dense(3), jnp.ones((2, 4))
  base = model.init(jax.random.key(0), x)["params"]
  make = lambda alpha: pelt.adalora(steps=6, rank=2, target_rank=1, alpha=alpha, targets="kernel")
  with pytest.raises(ValueError, match="method has a post-step"):
    pelt.sweep(
      make,
      {"alpha": [3.0, 6.0]},
      base,
      pelt.sites(model, x),
      apply=pelt.bypass(model.apply),
      loss=lambda apply, params, batch, key: 0.0,
      tx=optax.sgd(0.1),
      batches=[],
      steps=6,
      evaluate=lambda params: {"score": 0.0},
      metric="score",
    )
