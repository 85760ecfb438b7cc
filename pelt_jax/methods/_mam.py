"""MAM adapter: prefixes in attention, scaled parallel adapters beside FFNs (arXiv:2110.04366)."""

from collections.abc import Iterable
from typing import Any

from pelt_jax._transform import Transform, chain
from pelt_jax.methods._adapter import adapter
from pelt_jax.methods._prefix_tuning import prefix_tuning


def mam(
  length: int = 30,
  *,
  bottleneck: int = 512,
  scaling: float | str = 4.0,
  hidden: int = 800,
  reparametrize: bool = True,
  activation: str = "relu",
  dropout: float = 0.0,
  layers: Iterable[int] | None = None,
  shift_positions: bool | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """`chain(prefix_tuning(...), adapter("scaled_parallel", ...))` as the paper mixes them.

  A short prefix changes the attention heads, a wide branch h + s (ReLU(x W_down) W_up) beside every
  feed-forward network does the rest. The defaults are those for generation; for GLUE the paper has
  `length=16, bottleneck=16, scaling=2.0`. Without biases and MLP 2 l d numbers per attention and 2
  r d per feed-forward network are stored. The prefix makes it no identity at the start.

  Args:
    length: l, keys and values of each prefix.
    bottleneck: r.
    scaling: s, as for `adapter`.
    hidden: width of the prefix's MLP.
    reparametrize: whether an MLP makes the prefix in training.
    activation: as for `adapter`.
    dropout: share of the branch's activations dropped in training.
    layers: layer numbers to keep; all by default.
    shift_positions: as for `prefix_tuning`.
    dtype: dtype of the arrays; by default that of the activations.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: as `prefix_tuning` and `adapter`.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.mam(16, bottleneck=16, scaling=2.0), pelt.train("head"))
  """
  prefix = prefix_tuning(
    length,
    reparametrize=reparametrize,
    hidden=hidden,
    layers=layers,
    shift_positions=shift_positions,
    dtype=dtype,
    group=group,
  )
  beside = adapter(
    "scaled_parallel",
    bottleneck=bottleneck,
    scaling=scaling,
    activation=activation,
    dropout=dropout,
    layers=layers,
    dtype=dtype,
    group=group,
  )
  return chain(prefix, beside)
