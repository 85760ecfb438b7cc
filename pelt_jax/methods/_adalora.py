"""AdaLoRA: the rank of every matrix by its importance (arXiv:2303.10512)."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._site import Site, Targets, find
from pelt_jax._transform import (
  Transform,
  box_names,
  check_alpha,
  check_dropout,
  check_whole,
  like_box,
)
from pelt_jax._walk import every_node
from pelt_jax.methods._allocator import DECAYS, SCORES, SENSITIVITIES, TIES, Schedule, allocator
from pelt_jax.methods._lora import matrices, on_lora
from pelt_jax.nodes import LoraWeight, SvdWeight
from pelt_jax.nodes._svd import RANKNUM

_STD = 0.02


def adalora(
  steps: int,
  rank: int = 12,
  target_rank: float = 8,
  alpha: float | None = None,
  *,
  targets: Targets = "all-linear",
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  warmup: int | None = None,
  final: int | None = None,
  interval: int = 10,
  betas: tuple[float, float] = (0.85, 0.85),
  gamma: float = 0.1,
  orth: str = "code",
  decay: str = "cubic",
  score: str = "importance",
  ties: str = "topk",
  sensitivity: str = "post_step",
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Low-rank changes whose ranks share one budget, which shrinks while training.

  y = x W + scaling ((dropout(x) a) * lam) b, the paper's P Λ Q (equation 3) with a = Qᵀ, lam the
  diagonal of Λ, b = Pᵀ; scaling = alpha / (rank + 1e-5), which pruning never changes. lam is zero
  at first; a and b are N(0, 0.02²) and kept near orthogonality by a regulariser that
  `pelt.penalty` hands to the loss.

  The post-step scores every triplet (a column of a, its lam, its row of b):
  S = s(lam) + mean s(a) + mean s(b), where s = Ī Ū, the moving mean of I = |w dL/dw| times that of
  |I - Ī| (equations 8 to 11). Every `interval` steps, lam is set to zero but for the b(t) largest
  scores **of all matrices together**: a matrix may keep all its rank, or none. a and b stay, so a
  triplet can come back until the next choice. b(t) falls from rank n to target_rank n for n
  matrices by (1 - u)³ (equation 12); in the last `final` steps the choice is fixed.

  Departures from the released code, which PEFT shares: exactly b(t) triplets stay where scores tie
  (`ties="kth"` drops all that tie), and nothing is pruned while b(t) is rank n, where it fails.

  Args:
    steps: optimizer steps of the whole run.
    rank: of every matrix at the start.
    target_rank: mean rank at the end.
    alpha: numerator of the scaling; by default the rank.
    targets: roles, `"all-linear"`, or path patterns of modules or leaves.
    layers: layer numbers to keep; all by default.
    dropout: share of the input of a dropped in training.
    warmup: steps before the first choice; by default a tenth of `steps`.
    final: steps after the last choice; by default half of `steps`.
    interval: steps from one choice to the next.
    betas: decay of the moving means of I and of |I - Ī|.
    gamma: weight of the regulariser.
    orth: `"code"`: mean over all factors of |G - I|; `"paper"`: their sum of |G - I|² (equation 4),
      for a much smaller gamma. G is the Gram matrix of a's columns or b's rows.
    decay: `"cubic"`, or the variants `"linear"` and `"cosine"`.
    score: `"importance"`, or the paper's ablations: `"sensitivity"` (s = I), `"magnitude"` (|lam|);
      or `"value"` (I of lam alone).
    ties: `"topk"` or `"kth"`.
    sensitivity: which w stands in I: `"post_step"` (released code: w after the step, the gradient
      from before) or `"pre_step"` (paper).
    dtype: dtype of a, b and lam; by default the leaf's, float32 over a quantized one.
    group: label of the arrays; None freezes them, and then there is no budget to keep.

  Returns:
    A `Transform` with a post-step: give it to `training.train_step` as `method`, or call
    `method.post_step.update(state, old, new, grads)` after each optimizer step. `pelt.ranks` tells
    the ranks, `pelt.shrink` cuts what is pruned.

  Raises:
    ValueError: for a bad option, phases that do not fit into `steps` or a target above `rank`; at
      init, as `lora`, and for stacks of matrices that a module only reads (raw experts).

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.adalora(steps=100, rank=3, target_rank=2, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> params["kernel"].a.shape, params["kernel"].lam.shape, params["kernel"].b.shape
    ((4, 3), (3,), (3, 3))
  """
  check_whole(steps=steps, rank=rank, interval=interval)
  check_alpha(alpha)
  check_dropout(dropout)
  warmup = steps // 10 if warmup is None else warmup
  final = steps // 2 if final is None else final
  for name, value in (("warmup", warmup), ("final", final)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      raise ValueError(f"{name} must be a whole number of steps, at least 0, got {value!r}")
  if final < 1:
    raise ValueError(
      f"final={final}, of steps={steps}, must be at least 1: what is pruned would come back after "
      "the last choice"
    )
  if warmup + final >= steps:
    raise ValueError(
      f"warmup={warmup} and final={final} leave none of steps={steps} to reduce ranks in; make "
      "them shorter or train longer"
    )
  if not (math.isfinite(target_rank) and 0 <= target_rank <= rank):
    raise ValueError(f"target_rank must be from 0 to rank={rank}, got {target_rank!r}")
  if not all(0.0 < beta < 1.0 for beta in betas) or len(betas) != 2:
    raise ValueError(f"betas must be two numbers above 0 and below 1, got {betas!r}")
  if not (math.isfinite(gamma) and gamma >= 0):
    raise ValueError(f"gamma must be at least 0, got {gamma!r}")
  for name, value, known in (
    ("orth", orth, ("code", "paper")),
    ("decay", decay, tuple(DECAYS)),
    ("score", score, SCORES),
    ("ties", ties, TIES),
    ("sensitivity", sensitivity, SENSITIVITIES),
  ):
    if value not in known:
      raise ValueError(f"{name} must be one of {known}, got {value!r}")
  alpha = float(rank) if alpha is None else alpha
  layers = layers if layers is None or isinstance(layers, int) else tuple(layers)

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    if any(isinstance(node, SvdWeight) for node in every_node(params)):
      raise ValueError(
        "adalora: params hold the matrices of another adalora, and a budget is over all of them: "
        "name both in the targets of one"
      )
    found = matrices(find(sites, targets, kind="leaf", layers=layers), targets, "adalora")
    count = sum(math.prod(target.site.stacked) for target in found)
    each = gamma / (2 * count) if orth == "code" else gamma

    def svd(site: Site, node: LoraWeight, key: jax.Array) -> SvdWeight:
      _, _, factors = node.axes.partition(":")
      a_axes, _, b_axes = factors.partition(",")
      if len(set(a_axes) & set(b_axes)) > 1:
        raise ValueError(
          f"adalora: {site.path!r} is a stack of matrices that its module only reads, whose "
          "singular values cannot be told apart; leave it out of targets"
        )
      keys = dict(zip("ab", jax.random.split(key), strict=True))
      drawn = {
        name: jax.tree.map(
          lambda x, k=k: _STD * jax.random.normal(k, x.shape, x.dtype), getattr(node, name)
        )
        for name, k in keys.items()
      }
      lead, dtype = node.array("a").shape[: node.stacked], node.array("a").dtype
      names = (*box_names(node.base, len(lead) + 1)[: len(lead)], None)
      return SvdWeight(
        node.base,
        drawn["a"],
        drawn["b"],
        like_box(node.base, jnp.zeros((*lead, rank), dtype), names),
        jnp.full_like(node.scaling, alpha / (rank + RANKNUM)),
        jnp.full_like(node.scaling, each),
        node.dropout,
        axes=node.axes,
        orth=orth,
        group=group,
        stacked=node.stacked,
      )

    changes = on_lora(
      "adalora",
      svd,
      rank,
      alpha,
      targets=targets,
      layers=layers,
      dropout=dropout,
      dtype=dtype,
      group=group,
    )
    return changes.init(key, params, sites)

  schedule = Schedule(steps, warmup, final, interval, float(target_rank), decay)
  post = allocator(schedule, (betas[0], betas[1]), score, ties, sensitivity)
  return Transform(initialize, None if group is None else post)
