"""LoRA-FA: a LoRA with a frozen a (arXiv:2308.03303)."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform
from pelt_jax.methods._lora import on_lora
from pelt_jax.nodes import LoraFaWeight, LoraWeight


def lora_fa(
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
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """LoRA of which b alone trains: y = x W + scaling * (dropout(x) a) b, a as it was drawn.

  Half the parameters, r * out per matrix; and a backward pass that keeps x a, of width r, where
  LoRA's keeps x (equation 4). Files hold a. In a table b is drawn and a is what is zero: there b
  would be all that can never change anything, so tables are refused.

  Args:
    rank: as of `lora`.
    alpha: as of `lora`.
    targets: as of `lora`, no tables.
    layers: as of `lora`.
    dropout: as of `lora`.
    init: as of `lora`.
    rslora: as of `lora`.
    rank_pattern: as of `lora`.
    alpha_pattern: as of `lora`.
    dtype: as of `lora`.
    group: label of b; None freezes it.

  Returns:
    A `Transform`.

  Raises:
    ValueError: as `lora`; at init, if a target is a table.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lora_fa(rank=2, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> pelt.count(params).trainable  # b is (2, 3)
    6
  """

  def wrap(site: Site, node: LoraWeight, key: jax.Array) -> LoraFaWeight:
    if "lookup" in site.equations:
      raise ValueError(
        f"lora_fa: {site.path!r} is a table, whose a starts as zero and must train; use pelt.lora"
      )
    fields = {name: getattr(node, name) for name in node.kinds}
    return LoraFaWeight(**fields)

  return on_lora(
    "lora_fa",
    wrap,
    rank,
    alpha,
    targets=targets,
    layers=layers,
    dropout=dropout,
    init=init,
    rslora=rslora,
    rank_pattern=rank_pattern,
    alpha_pattern=alpha_pattern,
    dtype=dtype,
    group=group,
  )
