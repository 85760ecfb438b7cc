"""VeRA: vectors between one pair of frozen random matrices (arXiv:2310.11454, equation 2)."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import GENERATORS
from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, check_dropout, check_whole, like_box, require
from pelt_jax._walk import next_number, update_at
from pelt_jax.methods._lora import _dropout, _numbers
from pelt_jax.methods._matrices import Matrix, put, whole_matrices
from pelt_jax.nodes import VeraPair, VeraWeight


def vera(
  rank: int = 256,
  *,
  d_initial: float = 0.1,
  targets: Targets = ("query", "value"),
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  seed: int = 0,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Adds `(dropout(x) a * lambda_d) b * lambda_b` to y = x W: of a and b nothing trains.

  a and b are drawn once for the whole model, as large as its largest target needs, and stored once,
  in `generators/NNN_vera`; a target of (in, out) reads the first in rows of a, (in, rank), and the
  first out columns of b, (rank, out). a is U(-sqrt(6 / in), sqrt(6 / in)) for the largest in, b
  U(-sqrt(6 / rank), sqrt(6 / rank)), lambda_d is `d_initial` and lambda_b zero, so the model
  computes what it computed before. out + rank parameters per matrix. It is the LoRA of
  a * lambda_d and b * lambda_b with scaling 1.

  Args:
    rank: columns of a. A vector of that size costs little, so ranks are larger than LoRA's.
    d_initial: where lambda_d starts; not 0.
    targets: roles, `"all-linear"`, or path patterns of modules or leaves.
    layers: layer numbers to keep; all by default.
    dropout: share of the input of a dropped in training, 0 <= dropout < 1.
    seed: what a and b are drawn from. The key of `init` plays no part, so that the adapters of
      several tasks have one pair and fit one bank. The numbers are not those that PEFT draws.
    dtype: dtype of what is added; by default the leaf's, float32 over a quantized one.
    group: label of lambda_d and lambda_b; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target matches nothing, is never called, trains
      already, or is a table or no single matrix.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.vera(rank=8, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> pelt.count(params).trainable, params["generators"]["000_vera"].b.shape
    (11, (8, 3))
  """
  check_whole(rank=rank)
  check_dropout(dropout)
  if not math.isfinite(d_initial) or d_initial == 0:
    raise ValueError(f"d_initial must be a finite number other than 0, got {d_initial!r}")

  def init(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    found = whole_matrices("vera", sites, targets, layers)
    name = f"{next_number(params.get(GENERATORS, {})):03d}_vera"

    def of(matrix: Matrix, leaf: Any, _: jax.Array) -> VeraWeight:
      kind, wide = _numbers(leaf, dtype)
      return VeraWeight(
        leaf,
        _dropout(matrix.site, dropout, wide),
        matrix.axes,
        lambda_b=matrix.boxed(leaf, matrix.full((matrix.outputs,), 0, kind), "o"),
        lambda_d=matrix.boxed(leaf, matrix.full((rank,), d_initial, kind), "r"),
        a=None,
        b=None,
        pair=name,
        inputs=matrix.inputs,
        group=group,
        stacked=len(matrix.site.stacked),
      )

    leaf = require(params, found[0].site)
    inputs, outputs = max(m.inputs for m in found), max(m.outputs for m in found)
    keys, kind = jax.random.split(jax.random.key(seed)), _numbers(leaf, dtype)[0]
    a = _kaiming(keys[0], (inputs, rank), inputs, kind)
    b = _kaiming(keys[1], (rank, outputs), rank, kind)
    boxed = (like_box(leaf, x, (None, None)) for x in (a, b))
    pair = VeraPair(*boxed, name=name, group=group)
    params = put("vera", key, params, found, of)
    return update_at(params, {f"{GENERATORS}/{name}": pair})

  return Transform(init)


def _kaiming(key: jax.Array, shape: tuple[int, int], fan_in: int, dtype: Any) -> jax.Array:
  bound = math.sqrt(6.0 / fan_in)
  return jax.random.uniform(key, shape, jnp.dtype(dtype), -bound, bound)
