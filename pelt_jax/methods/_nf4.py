"""NF4: the frozen weights in 4 bits (QLoRA, arXiv:2305.14314)."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from pelt_jax._node import Weight
from pelt_jax._site import Site, Targets, find
from pelt_jax._transform import Transform, chain, over, require
from pelt_jax._walk import update_at
from pelt_jax.methods._lora import lora, matrices
from pelt_jax.methods._merge_aware import merge_aware as aware
from pelt_jax.nodes._lora import lora_axes, subscripts
from pelt_jax.quantization import quantize
from pelt_jax.quantization._weight import check_options


def nf4(
  *,
  targets: Targets = "all-linear",
  layers: Iterable[int] | None = None,
  book: str | Sequence[float] = "nf4",
  block: int = 64,
  double_quant: bool = False,
  layout: str | None = None,
) -> Transform:
  """Replaces frozen weights by 4-bit codes; nothing trains. Comes first in a chain.

  W = values[code] * scale of its block, 4.5 bits a parameter (4.127 under double quantization);
  y = x W is computed in the dtype of x. Gradients pass through to x, the codes have none.

  Args:
    targets: roles, `"all-linear"` (all but head and embedding), or path patterns.
    layers: layer numbers to keep; all by default.
    book: `"nf4"`, `"fp4"`, another code book of `pelt.quantization`, or 2 to 16 numbers.
    block: numbers that share a scale.
    double_quant: code the scales in 8 bits.
    layout: how codes are packed, see `pelt.quantization.NF4Weight`; by default the platform's.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target matches nothing, is no matrix, or already has
      a node (it comes first in a chain).

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(32), jnp.ones((2, 64))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.chain(pelt.nf4(targets="kernel"), pelt.lora(rank=2, targets="kernel"))
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> params["kernel"].base.codes.nbytes, pelt.bypass(model.apply)({"params": params}, x).shape
    (1024, (2, 32))
  """
  check_options(book, block, layout)

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    changes = {}
    for target in matrices(find(sites, targets, kind="leaf", layers=layers), targets, "nf4"):
      site = target.site

      def make(leaf: Any, site: Site = site) -> Weight:
        if isinstance(leaf, Weight):
          raise ValueError(
            f"nf4 quantizes plain weights, and {site.path!r} has a {type(leaf).__name__}: "
            "put nf4 first, chain(nf4(...), lora(...))"
          )
        return quantize(
          leaf,
          book=book,
          block=block,
          double_quant=double_quant,
          layout=layout,
          outputs=_outputs(site),
          stacked=len(site.stacked),
        )

      changes[site.path] = over(require(params, site), make)
    return update_at(params, changes)

  return Transform(initialize)


def _outputs(site: Site) -> tuple[int, ...]:
  """The axes of a kernel that a torch weight has first: batches of matrices, then outputs."""
  if "lookup" in site.equations:
    return (0,)
  kernel, a, b = subscripts(lora_axes(next(iter(site.equations), None), len(site.shape)))
  batch = (i for i, c in enumerate(kernel) if c in a and c in b)
  return (*batch, *(i for i, c in enumerate(kernel) if c not in a))


def qlora(
  rank: int = 64,
  alpha: float | None = 16,
  *,
  targets: Targets = "all-linear",
  layers: Iterable[int] | None = None,
  dropout: float = 0.0,
  book: str | Sequence[float] = "nf4",
  block: int = 64,
  double_quant: bool = True,
  layout: str | None = None,
  dtype: Any = None,
  merge_aware: bool = False,
  plus: bool = False,
  group: str | None = "trainable",
) -> Transform:
  """`chain(nf4(...), lora(...))`: y = x dequantize(W) + alpha / rank (dropout(x) a) b.

  Defaults are the paper's: rank 64, alpha 16, every linear layer but the head, double
  quantization. (Its dropout is 0.1 up to 13B parameters and 0.05 above; none here.)

  Args:
    rank: rank of the change.
    alpha: numerator of its scaling.
    targets: weights that are quantized and changed.
    layers: layer numbers to keep; all by default.
    dropout: share of the input of a dropped in training.
    book: as of `nf4`.
    block: as of `nf4`.
    double_quant: as of `nf4`.
    layout: as of `nf4`.
    dtype: dtype of a and b; by default the weights'.
    merge_aware: train what a merge into 4 bits will hold, see `pelt.merge_aware`.
    plus: as of `lora`.
    group: label of a and b; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: as `nf4`, `lora` and `merge_aware`.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.qlora(rank=16, alpha=32)
  """
  return chain(
    nf4(
      targets=targets,
      layers=layers,
      book=book,
      block=block,
      double_quant=double_quant,
      layout=layout,
    ),
    lora(
      rank,
      alpha,
      targets=targets,
      layers=layers,
      dropout=dropout,
      plus=plus,
      dtype=dtype,
      group=group,
    ),
    *((aware(),) if merge_aware else ()),
  )
