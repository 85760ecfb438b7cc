"""AdaLoRA's budget: which singular values of all matrices are kept (arXiv:2303.10512, 3.2, 3.3)."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Node, extra, static
from pelt_jax._transform import PostStep
from pelt_jax._tree import is_hole
from pelt_jax._walk import map_arrays, named_nodes
from pelt_jax.nodes import SvdWeight
from pelt_jax.nodes._axes import wide

DECAYS = {
  "cubic": lambda u: (1 - u) ** 3,
  "linear": lambda u: 1 - u,
  "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
}
SCORES = ("importance", "sensitivity", "value", "magnitude")
TIES = ("topk", "kth")
SENSITIVITIES = ("post_step", "pre_step")
_FIELDS = ("a", "b", "lam")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How many singular values there may be, over all matrices, after each optimizer step.

  Attributes:
    steps: of the whole run; the first is step 0.
    warmup: up to and with this step nothing is pruned.
    final: so many steps at the end keep what was chosen.
    interval: between two choices.
    target: mean rank at the end.
    decay: `"cubic"`, `"linear"` or `"cosine"`.
  """

  steps: int
  warmup: int
  final: int
  interval: int
  target: float
  decay: str = "cubic"

  def table(self, first: int, matrices: int) -> tuple[np.ndarray, np.ndarray]:
    """Budget and whether to prune by step, (steps,) int32 and bool.

    Args:
      first: singular values at the start.
      matrices: how many matrices there are.
    """
    last, end = round(self.target * matrices), self.steps - self.final
    budgets, due = [], []
    for t in range(self.steps):
      share = 1.0 if t <= self.warmup else 0.0
      if self.warmup < t < end:
        share = DECAYS[self.decay]((t - self.warmup) / (end - self.warmup))
      budgets.append(int(last + (first - last) * share))
      due.append(t > self.warmup and (t >= end or t % self.interval == 0))
    return np.array(budgets, np.int32), np.array(due, bool)


class Allocation(Node):
  """What AdaLoRA carries from step to step.

  Attributes:
    count: how many steps there were.
    sensitivity: moving means of |w dL/dw|, by path of the array.
    uncertainty: moving means of their deviation, by path.
    scores: the triplets' scores, over all matrices in the order of paths, then layers.
    kept: singular values that are not zero after each step, (steps,); -1 for steps to come.
    schedule: what a resumed run must share.
  """

  count: Any = extra()
  sensitivity: Any = extra()
  uncertainty: Any = extra()
  scores: Any = extra()
  kept: Any = extra()
  schedule: str = static("")


def allocator(
  schedule: Schedule,
  betas: tuple[float, float],
  score: str,
  ties: str,
  sensitivity: str,
) -> PostStep:
  """The post-step; see `adalora` for its options."""

  def start(trainable: Any) -> Allocation:
    nodes = dict(_svds(trainable))
    banked = [p for p, n in nodes.items() if n.array("lam").ndim != n.stacked + 1]
    if not nodes or banked:
      why = f"those at {banked[:4]} are in a bank" if banked else "nothing there trains"
      raise ValueError(
        f"adalora: the budget is over the SvdWeight nodes that train, and {why}: use its params by "
        "themselves, or leave method out of train_step"
      )
    zeros = {
      f"{p}/{n}": _wide(jnp.zeros_like(node.array(n))) for p, node in nodes.items() for n in _FIELDS
    }
    smooth = score == "importance"
    total = sum(math.prod(n.array("lam").shape) for n in nodes.values())
    kinds = (x.dtype for x in zeros.values())
    return Allocation(
      count=jnp.zeros((), jnp.int32),
      sensitivity=zeros if smooth else {},
      uncertainty=jax.tree.map(jnp.copy, zeros) if smooth else {},
      scores=jnp.zeros((total,), np.result_type(*kinds)),
      kept=jnp.full((schedule.steps,), -1, jnp.int32),
      schedule=f"{schedule} betas={betas} score={score} ties={ties} sensitivity={sensitivity}",
    )

  def update(
    state: Allocation, old: Any, new: Any, grads: Any, record: Any = None
  ) -> tuple[Any, Allocation]:
    nodes, slopes = dict(_svds(new)), dict(_svds(grads))
    at = nodes if sensitivity == "post_step" else dict(_svds(old))
    slope = {
      f"{p}/{n}": _wide(jnp.abs(at[p].array(n) * slopes[p].array(n)))
      for p in nodes
      for n in _FIELDS
    }
    mean, spread, element = state.sensitivity, state.uncertainty, slope
    if score == "importance":
      mean = {p: betas[0] * mean[p] + (1 - betas[0]) * s for p, s in slope.items()}
      spread = {
        p: betas[1] * spread[p] + (1 - betas[1]) * jnp.abs(s - mean[p]) for p, s in slope.items()
      }
      element = {p: mean[p] * spread[p] for p in slope}
    values = [
      jnp.abs(n.array("lam")) if score == "magnitude" else _triplets(n, p, element, score)
      for p, n in nodes.items()
    ]
    scores = jnp.concatenate([jnp.asarray(v, state.scores.dtype).reshape(-1) for v in values])
    t, first = state.count, scores.size
    budgets, due = schedule.table(first, _matrices(nodes))
    frozen = t >= schedule.steps - schedule.final
    scores = jnp.where(frozen, state.scores, scores)
    now = jnp.minimum(t, schedule.steps - 1)
    keep = _kept(scores, jnp.asarray(budgets)[now], ties) | ~jnp.asarray(due)[now]
    masks, at_ = {}, 0
    for p, n in nodes.items():
      lam = n.array("lam")
      masks[f"{p}/lam"] = keep[at_ : at_ + lam.size].reshape(lam.shape)
      at_ += lam.size
    pruned = lambda x, path: jnp.where(masks[path], x, jnp.zeros_like(x)) if path in masks else x
    new = map_arrays(lambda kind, group, x, path: pruned(x, path), new, is_leaf=is_hole)
    alive = sum(jnp.sum(n.array("lam") != 0, dtype=jnp.int32) for _, n in _svds(new))
    kept = state.kept.at[t].set(alive, mode="drop")
    return new, state.replace(
      count=t + 1, sensitivity=mean, uncertainty=spread, scores=scores, kept=kept
    )

  return PostStep(start, update)


def _svds(tree: Any) -> Iterator[tuple[str, SvdWeight]]:
  """The nodes that train, by path."""
  for path, node in named_nodes(tree):
    if isinstance(node, SvdWeight) and not is_hole(node.array("lam")):
      yield path, node


def _wide(x: jax.Array) -> jax.Array:
  return jnp.asarray(x, wide(x))


def _matrices(nodes: dict[str, SvdWeight]) -> int:
  return sum(math.prod(n.array("lam").shape[:-1]) for n in nodes.values())


def _triplets(node: SvdWeight, path: str, element: dict[str, jax.Array], score: str) -> jax.Array:
  """A score per singular value: its own, plus the means over its two vectors."""
  own = element[f"{path}/lam"]
  if score == "value":
    return own
  a, b, lead = element[f"{path}/a"], element[f"{path}/b"], node.stacked
  means = jnp.mean(a, tuple(range(lead, a.ndim - 1))), jnp.mean(b, tuple(range(lead + 1, b.ndim)))
  return own + (means[0] + means[1])


def _kept(scores: jax.Array, budget: jax.Array, ties: str) -> jax.Array:
  """Which scores are among the `budget` largest of all."""
  if ties == "kth":  # all that is not above the (n - budget)-th smallest goes, ties too
    drop = scores.size - budget
    threshold = jnp.sort(scores)[jnp.maximum(drop - 1, 0)]
    return (scores > threshold) | (drop == 0)
  order = jnp.argsort(-scores, stable=True)
  place = (
    jnp.zeros((scores.size,), jnp.int32).at[order].set(jnp.arange(scores.size, dtype=jnp.int32))
  )
  return place < budget
