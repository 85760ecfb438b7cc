"""Paired timing: several functions by turns, compared by CPU time, pair by pair."""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np

Times = dict[str, dict[str, list[float]]]


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int) -> Times:
  """Seconds of every run, `{"cpu": {name: [...]}, "wall": {name: [...]}}`.

  The order turns round from one round to the next, so that other load on the machine meets all
  alike. Each function runs once before.
  """
  for run in runs.values():
    run()
  found: Times = {kind: {name: [] for name in runs} for kind in ("cpu", "wall")}
  for i in range(rounds):
    for name in list(runs)[:: -1 if i % 2 else 1]:
      cpu, wall = time.process_time(), time.perf_counter()
      runs[name]()
      found["cpu"][name].append(time.process_time() - cpu)
      found["wall"][name].append(time.perf_counter() - wall)
  return found


def ratio(times: list[float], to: list[float]) -> dict:
  """The mean ratio of pairs (geometric) with its 95 % interval by bootstrap."""
  logs = np.log(np.array(times) / np.array(to))
  rng = np.random.default_rng(0)
  means = [rng.choice(logs, len(logs)).mean() for _ in range(10_000)]
  low, high = np.exp(np.quantile(means, (0.025, 0.975)))
  return {"ratio": math.exp(logs.mean()), "95 %": [float(low), float(high)]}
