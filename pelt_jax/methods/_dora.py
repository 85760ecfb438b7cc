"""DoRA: a LoRA of the direction and a magnitude for every output (arXiv:2402.09353)."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from pelt_jax._node import Weight
from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, letter_names, like_box
from pelt_jax.methods._lora import B_GROUP, on_lora
from pelt_jax.methods._merge_aware import check_mergeable
from pelt_jax.nodes import DoraWeight, LoraWeight
from pelt_jax.nodes._axes import letters
from pelt_jax.nodes._lora import subscripts


def dora(
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
  detach_norm: bool = True,
  plus: bool = False,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Learns how long every output's column is, apart from where it points: y = m / n (x V).

  V = W + scaling * a @ b as of `lora`, n the norm of V over the inputs, one for every output (over
  the ids, in a table), m of the same shape. m starts as ||W + scaling * a b|| = ||W||, so that the
  model computes what it did, up to rounding. n follows V but counts as a constant in gradients
  (section 4.3; `detach_norm=False`: it does not). The change of one matrix has full rank.
  r (in + out) + out parameters. A kernel that its module only reads is a batch of matrices, as in
  `lora`, each with magnitudes of its own; PEFT has one per output channel of a convolution.

  In training, `dropout` acts as in PEFT: what it leaves, d(x), is the input of all that is changed,
  y = x W + m / n (d(x) V) - d(x) W.

  Args:
    rank: as of `lora`.
    alpha: as of `lora`.
    targets: as of `lora`.
    layers: as of `lora`.
    dropout: share of the input of the change dropped in training.
    init: as of `lora`.
    rslora: as of `lora`.
    rank_pattern: as of `lora`.
    alpha_pattern: as of `lora`.
    detach_norm: whether gradients take n for a constant.
    plus: as of `lora`; m learns at the rate of b.
    dtype: dtype of a and b; m has at least float32.
    group: label of a, b and m; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: as `lora`; at init, if what lies below depends on the input.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(1, use_bias=False), jnp.array([[1.0, 1.0]])
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> method = pelt.dora(rank=1, targets="kernel")
    >>> params = method.init(jax.random.key(0), params, pelt.sites(model, x))
    >>> float(params["kernel"].magnitude[0])
    5.0
    >>> params["kernel"] = params["kernel"].replace(magnitude=jnp.array([10.0]))
    >>> float(pelt.bypass(model.apply)({"params": params}, x)[0, 0])  # twice 3 + 4
    14.0
  """

  def wrap(site: Site, node: LoraWeight, key: jax.Array) -> DoraWeight:
    if isinstance(node.base, Weight):
      check_mergeable("dora", site.path, node.base)
    stacked, (kernel, _, _) = len(site.stacked), subscripts(node.axes)
    batch, inputs, outputs = letters(node.axes)
    made = DoraWeight(
      node.replace(dropout=None),
      None,
      node.dropout,
      axes=f"{kernel}:{batch}{inputs},{batch}{outputs}",
      detach_norm=detach_norm,
      group=B_GROUP if plus and group is not None else group,
      stacked=stacked,
    )
    lead, names = letter_names(node.base, stacked, kernel)
    norm = like_box(node.base, made.norm(), (*lead, *map(names.get, batch + outputs)))
    return made.replace(magnitude=norm)

  return on_lora(
    "dora",
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
    plus=plus,
    dtype=dtype,
    group=group,
  )
