"""LoRA: low-rank adaptation (arXiv:2106.09685, equation 3; rsLoRA: arXiv:2312.03732)."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Weight, strip
from pelt_jax._site import Site, Target, Targets, find, matches
from pelt_jax._transform import (
  Transform,
  box_names,
  check_alpha,
  check_dropout,
  check_whole,
  letter_names,
  like_box,
  over,
  require,
  site_key,
)
from pelt_jax._walk import update_at
from pelt_jax.nodes import Dropout, FusedLora, LoraWeight, Tuned
from pelt_jax.nodes._lora import lora_axes, matrix_sizes

INITS = ("kaiming", "gaussian")
B_GROUP, EMBEDDING_GROUP = "lora_b", "lora_embedding"  # of LoRA+


def lora(
  rank: int = 8,
  alpha: float | None = None,
  *,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  init: str = "kaiming",
  rslora: bool = False,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  fused: tuple[tuple[int, ...], int] | None = None,
  plus: bool = False,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Adds `scaling * a @ b` to weights: y = x W + scaling * (dropout(x) a) b.

  scaling = alpha / rank (rsLoRA: alpha / sqrt(rank)). b is zero at first, so the model computes
  what it computed before; a is U(-1/sqrt(in), 1/sqrt(in)) as in loralib ("kaiming"; the paper says
  Gaussian) or N(0, 1/rank^2) as in PEFT ("gaussian"). In a table used by lookups the roles change:
  a is zero and b is N(0, 1), and dropout does not act. r (in + out) parameters per matrix. A kernel
  that its module only reads (a convolution's, raw experts) is a batch of matrices, its last two
  axes each: a pair for every leading index.

  Args:
    rank: rank of the change, at least 1.
    alpha: numerator of the scaling; by default the rank, so that the scaling is 1.
    targets: roles, `"all-linear"`, or path patterns of modules or leaves.
    layers: layer numbers to keep; all by default.
    dropout: share of the input of a dropped in training, 0 <= dropout < 1.
    init: `"kaiming"` or `"gaussian"`.
    rslora: divide alpha by sqrt(rank).
    rank_pattern: ranks of some paths, pattern -> rank; the first match in order counts.
    alpha_pattern: likewise for alpha.
    fused: `(chosen, parts)` for fused projections: a LoRA of its own on the chosen ones of `parts`
      equal parts of the output, such as `((0, 2), 3)` for query and value in GPT-2's c_attn.
    plus: label b `"lora_b"`, and both factors of a table `"lora_embedding"`, so that they learn at
      rates of their own (LoRA+): see `pelt.lora_plus`.
    dtype: dtype of a and b; by default the leaf's, float32 over a quantized one.
    group: label of a and b; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target matches nothing, is never called, is no
      matrix, is smaller than the rank, or trains already.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lora(rank=2, alpha=4, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> params["kernel"].a.shape, params["kernel"].b.shape, float(params["kernel"].scaling)
    ((4, 2), (2, 3), 2.0)
  """
  return on_lora(
    "lora",
    lambda site, node, key: node,
    rank,
    alpha,
    targets=targets,
    layers=layers,
    dropout=dropout,
    init=init,
    rslora=rslora,
    rank_pattern=rank_pattern,
    alpha_pattern=alpha_pattern,
    fused=fused,
    plus=plus,
    dtype=dtype,
    group=group,
  )


def on_lora(
  method: str,
  wrap: Callable[[Site, Any, jax.Array], Weight],
  rank: int,
  alpha: float | None,
  *,
  targets: Targets,
  layers: Iterable[int] | None,
  dropout: float = 0.0,
  init: str = "kaiming",
  rslora: bool = False,
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  fused: tuple[tuple[int, ...], int] | None = None,
  plus: bool = False,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """`lora` with `wrap(site, node, key)` in the place of each node; errors name `method`."""
  layers = layers if layers is None or isinstance(layers, int) else tuple(layers)
  ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
  check_whole(rank=rank, **{f"rank_pattern[{k!r}]": v for k, v in ranks.items()})
  check_dropout(dropout)
  if init not in INITS:
    raise ValueError(f"init must be one of {INITS}, got {init!r}")
  for value in (alpha, *alphas.values()):
    check_alpha(value)
  if fused is not None and not (fused[0] and set(fused[0]) <= set(range(fused[1]))):
    raise ValueError(
      f"fused must be (chosen parts, number of parts) such as ((0, 2), 3), got {fused}"
    )

  def of(site: Site, leaf: Any, key: jax.Array) -> Weight:
    r = _first(ranks, site, rank)
    a = _first(alphas, site, alpha)
    a = float(r) if a is None else float(a)
    sizes = matrix_sizes(_axes(site), site.shape)
    if r > min(sizes) and min(sizes) > 0:
      raise ValueError(
        f"{method}: rank {r} exceeds the matrix at {site.path!r}, which is {sizes[0]} x {sizes[1]} "
        f"(kernel {site.shape}); lower rank, or leave that path out of targets"
      )
    if dropout and not site.equations:
      raise ValueError(
        f"dropout={dropout}: {site.path!r} is only read by {site.module or 'its module'}, which "
        "never hands over the input that dropout acts on. Give the module a rule (pelt.rule), "
        "leave it out of targets, or set dropout=0"
      )
    scaling = a / (math.sqrt(r) if rslora else r)
    b_group = B_GROUP if plus else None
    if plus and group is not None and "lookup" in site.equations:
      of_pair, b_group = EMBEDDING_GROUP, None
    else:
      of_pair = group
    common = (site, leaf, key, r, scaling, dropout, init, dtype)
    made = _lora(*common) if fused is None else _fused(*common, fused)
    return wrap(site, made.replace(group=of_pair, b_group=b_group), key)

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    found = matrices(find(sites, targets, kind="leaf", layers=layers), targets, method)
    return put_over(method, key, params, [target.site for target in found], of)

  return Transform(initialize)


def put_over(
  method: str,
  key: jax.Array,
  params: dict,
  sites: Iterable[Site],
  make: Callable[[Site, Any, jax.Array], Weight],
) -> dict:
  """Params with `make(site, leaf, key)` over each of some leaves.

  Raises:
    ValueError: if one trains already.
  """
  changes = {}
  for site in sites:
    leaf = require(params, site)
    if isinstance(getattr(leaf, "base", leaf), Tuned) or isinstance(leaf, Tuned):
      raise ValueError(f"{method}: {site.path!r} trains already; two methods cannot train one leaf")
    folded = site_key(key, site.path, leaf)
    changes[site.path] = over(leaf, lambda x, s=site, k=folded: make(s, x, k))
  return update_at(params, changes)


def matrices(found: list[Target], targets: Targets, method: str) -> list[Target]:
  """The targets that are matrices: biases and scales beside a kernel are left out.

  Raises:
    ValueError: if none is, or a matrix was never called.
  """
  paths = are_matrices(t.site for t in found)
  kept = [t for t in found if t.site.path in paths]
  if not kept:
    raise ValueError(
      f"{method} needs matrices; {targets!r} names only {[t.site.path for t in found][:5]}"
    )
  idle = [t.site.path for t in kept if not t.site.called]
  if idle:
    raise ValueError(
      f"{method}: the traced arguments never call {idle[:5]}, so a node there would do nothing. "
      "Pass pelt.sites the inputs of the task, or drop the target"
    )
  return kept


def are_matrices(sites: Iterable[Site]) -> set[str]:
  """The paths of those leaves that are matrices."""
  # A bias of several heads has two axes too: beside a leaf that multiplies, one that only adds is
  # no matrix.
  sites = list(sites)
  used = {s.parent for s in sites if s.equations}
  return {s.path for s in sites if len(s.shape) >= 2 and (s.equations or s.parent not in used)}


def _first(patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
  hits = (v for p, v in patterns.items() if matches(p, site.path) or matches(p, site.parent))
  return next(hits, default)


def _numbers(leaf: Any, dtype: Any) -> tuple[Any, Any]:
  """Dtypes of new arrays, and of numbers such as the scaling (at least float32)."""
  dtype = jnp.dtype(dtype or (leaf.dtype if isinstance(leaf, Weight) else strip(leaf).dtype))
  if not jnp.issubdtype(dtype, jnp.floating):
    dtype = jnp.dtype(jnp.float32)
  return dtype, np.promote_types(dtype, jnp.float32)


def _dropout(site: Site, rate: float, dtype: Any) -> Dropout | None:
  """None at rate 0; the layers of a scan are numbered, since it may share one random stream."""
  if rate == 0.0:
    return None
  layer = jnp.arange(math.prod(site.stacked), dtype=jnp.float32).reshape(site.stacked)
  full = jnp.full(site.stacked, rate, dtype)
  return Dropout(full, layer if site.stacked else None, stacked=len(site.stacked))


def _drawn(key: jax.Array, shape: tuple[int, ...], fan_in: int, rank: int, init: str, dtype: Any):
  if init == "gaussian":
    return jax.random.normal(key, shape, dtype) / jnp.asarray(rank, dtype)
  bound = 1.0 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def _axes(site: Site) -> str:
  """The axes of kernel and factors at a site; a table looked up is (ids, width)."""
  if "lookup" in site.equations:
    return lora_axes(None, 2)
  return lora_axes(next(iter(site.equations), None), len(site.shape))


def _lora(site, leaf, key, rank, scaling, dropout, init, dtype) -> LoraWeight:
  axes, table = _axes(site), "lookup" in site.equations
  kernel, _, factors = axes.partition(":")
  a_axes, _, b_axes = factors.partition(",")
  r = next(c for c in a_axes if c not in kernel)
  size = dict(zip(kernel, site.shape, strict=True)) | {r: rank}
  a_shape, b_shape = (site.stacked + tuple(size[c] for c in s) for s in (a_axes, b_axes))
  dtype, wide = _numbers(leaf, dtype)
  fan_in = math.prod(size[c] for c in a_axes if c != r and c not in b_axes)
  if table:
    a, b = jnp.zeros(a_shape, dtype), jax.random.normal(key, b_shape, dtype)
  else:
    a, b = _drawn(key, a_shape, fan_in, rank, init, dtype), jnp.zeros(b_shape, dtype)
  scaling = jnp.full(site.stacked, scaling, wide)
  drop = None if table else _dropout(site, dropout, wide)
  return pair_over(leaf, a, b, scaling, axes=axes, dropout=drop)


def pair_over(
  leaf: Any,
  a: jax.Array,
  b: jax.Array,
  scaling: jax.Array,
  *,
  axes: str,
  dropout: Dropout | None = None,
  group: str | None = None,
) -> LoraWeight:
  """A pair over a leaf, in boxes like the leaf's; the scaling has the stacked axes."""
  stacked = scaling.ndim
  kernel, _, factors = axes.partition(":")
  a_axes, _, b_axes = factors.partition(",")
  lead, name = letter_names(leaf, stacked, kernel)
  return LoraWeight(
    leaf,
    like_box(leaf, a, (*lead, *map(name.get, a_axes))),
    like_box(leaf, b, (*lead, *map(name.get, b_axes))),
    scaling,
    dropout,
    axes=axes,
    group=group,
    stacked=stacked,
  )


def _fused(site, leaf, key, rank, scaling, dropout, init, dtype, fused) -> FusedLora:
  chosen, parts = tuple(fused[0]), fused[1]
  eq = next((e for e in site.equations if e != "lookup"), "...i,io->...o")
  if eq not in ("...i,io->...o", "...i,oi->...o") or len(site.shape) != 2:
    raise ValueError(f"lora(fused=...): {site.path!r} is used as {eq!r}, not as one plain product")
  axis = 1 if eq == "...i,io->...o" else 0
  width, n_in = site.shape[axis], site.shape[1 - axis]
  if width % parts:
    raise ValueError(
      f"lora(fused={fused}): {site.path!r} has {width} outputs, not {parts} equal parts"
    )
  dtype, wide = _numbers(leaf, dtype)
  a = _drawn(key, (*site.stacked, len(chosen), n_in, rank), n_in, rank, init, dtype)
  b = jnp.zeros((*site.stacked, len(chosen), rank, width // parts), dtype)
  *lead, first, second = box_names(leaf, len(site.stacked) + 2)
  return FusedLora(
    leaf,
    like_box(leaf, a, (*lead, None, first if axis else second, None)),
    like_box(leaf, b, (*lead, None, None, None)),  # shards of the fused axis cross its parts
    jnp.full(site.stacked, scaling, wide),
    _dropout(site, dropout, wide),
    chosen=chosen,
    parts=parts,
    fused=axis,
    stacked=len(site.stacked),
  )
