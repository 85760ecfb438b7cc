"""Bottleneck adapters: Houlsby (1902.00751), Pfeiffer (2005.00247), parallel (2110.04366)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Bypass
from pelt_jax._site import Site, Target, Targets, find
from pelt_jax._transform import Transform, add_bypass, chain, check_dropout, check_whole, site_key
from pelt_jax.methods._lora import _dropout
from pelt_jax.methods._train import train
from pelt_jax.nodes import After, AroundNorm, Before, Bottleneck, Normalized, Tuned
from pelt_jax.nodes._branches import ACTIVATIONS

INITS = ("houlsby", "bert", "zero_up")


class Style(NamedTuple):
  """What a style's options are when they are not given."""

  targets: Targets
  reads: str  # "output", "sum", or what a parallel branch may choose: "input", "residual"
  activation: str
  init: str
  bottleneck: int | None
  reduction: int | None
  scaling: float | None
  train_norms: bool


STYLES = {
  "houlsby": Style(
    ("attention_block", "ffn"), "output", "gelu_tanh", "houlsby", 64, None, None, True
  ),
  "pfeiffer": Style("ffn", "sum", "relu", "bert", None, 16, None, False),
  "parallel": Style("ffn", "input", "relu", "zero_up", None, 2, None, False),
  "scaled_parallel": Style("ffn", "input", "relu", "zero_up", None, 2, 4.0, False),
}


def adapter(
  style: str = "houlsby",
  *,
  bottleneck: int | Mapping[int, int] | None = None,
  reduction: int | None = None,
  activation: str | None = None,
  scaling: float | str | None = None,
  init: str | None = None,
  tap: str | None = None,
  dropout: float = 0.0,
  norm: bool = False,
  train_norms: bool | None = None,
  targets: Targets | None = None,
  layers: Iterable[int] | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains small networks u(x) = s (act(x W_down + b_down) W_up + b_up) inside every layer.

  With h a sublayer's output after its dropout, x what the sublayer reads and r the residual stream
  that h is added to:

  - `"houlsby"`: h + u(h) after attention and after the feed-forward network; the model's norms
    train too, and a head beside it (`pelt.train("head")`).
  - `"pfeiffer"`: once per layer, after the feed-forward network. Where a norm follows the sum
    (BERT), LN(h + r + u(LN(h + r))) with the one norm twice; elsewhere, h + u(h + r).
  - `"parallel"`, `"scaled_parallel"`: h + u(x) beside the feed-forward network, the second with
    s = 4. `tap="residual"` reads r instead of x: where a norm stands between them that is another
    number.

  2 m d + m + d numbers each. Adapters of zero `W_up` start as the identity, those of both styles
  with two small matrices near it. They cannot be merged: the activation stands between the factors.

  Args:
    style: `"houlsby"`, `"pfeiffer"`, `"parallel"` or `"scaled_parallel"`.
    bottleneck: m, for all layers, or by layer number (others have d // `reduction`); by default 64
      for Houlsby's.
    reduction: m = d // reduction, at least 1; by default 16 for Pfeiffer's and 2 for parallel ones.
    activation: `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"`, `"tanh"` or `"identity"`; by default
      `"gelu_tanh"` for Houlsby's, as its code, and `"relu"` for the others.
    scaling: s, `"learned"` for one number that trains from 1, or `"channel"` for one per channel.
    init: `"houlsby"`: both matrices from N(0, 0.01²) cut at two deviations, as in that paper (its
      code has 0.001); `"bert"`: N(0, 0.02²); `"zero_up"`: W_down as LoRA's A, W_up zero. By default
      each style's own, `"zero_up"` for parallel ones. Biases start at zero.
    tap: `"input"` or `"residual"`, for parallel styles.
    dropout: share of the activations dropped in training.
    norm: whether an own LayerNorm that trains stands before the branch, useful where a style reads
      a stream that no norm bounds.
    train_norms: whether the model's norms train; by default for Houlsby's.
    targets: roles or paths of the sublayers: `"ffn"`, `"attention_block"`,
      `"cross_attention_block"`; `"attention_heads"` puts a branch on the heads' outputs before
      their projection: a parallel one (multi-head parallel), or Houlsby's, which reads them.
    layers: layer numbers to keep; all by default.
    dtype: dtype of the arrays; by default that of the activations.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target has no placement that the style could use, or
      `bottleneck` differs by layer where a scan stacks them.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.adapter("pfeiffer", reduction=16), pelt.train("head"))
  """
  if style not in STYLES:
    raise ValueError(f"style must be one of {', '.join(STYLES)}; got {style!r}")
  own = STYLES[style]
  activation = activation or own.activation
  init = init or own.init
  _check_options(style, own, activation, init, tap, scaling)
  check_dropout(dropout)
  if isinstance(bottleneck, Mapping):
    check_whole(**{f"bottleneck[{layer}]": m for layer, m in bottleneck.items()})
  elif bottleneck is not None:
    check_whole(bottleneck=bottleneck)
    if reduction is not None:
      raise ValueError(f"bottleneck={bottleneck} and reduction={reduction}: give one of them")
  check_whole(reduction=1 if reduction is None else reduction)
  scaling = own.scaling if scaling is None else scaling
  where = own.targets if targets is None else targets
  reads = tap or own.reads

  def width(site: Site, d: int) -> int:
    if isinstance(bottleneck, Mapping):
      if site.stacked:
        raise ValueError(
          f"bottleneck={dict(bottleneck)} differs by layer, but a scan stacks the layers at "
          f"{site.path!r}; load the model with scan=False, or use to_looped first"
        )
      if site.layer is not None and site.layer in bottleneck:
        return bottleneck[site.layer]
    elif bottleneck is not None:
      return bottleneck
    if reduction is None and own.bottleneck is not None:
      return own.bottleneck
    factor = reduction or own.reduction
    assert factor is not None
    return max(1, d // factor)

  def branch(key: jax.Array, site: Site, n_in: int, n_out: int) -> Any:
    m, lead, wanted = width(site, n_in), site.stacked, jnp.dtype(dtype or site.dtype)
    down, up = _drawn(key, lead, (n_in, m, n_out), init, wanted)
    zeros = lambda n: jnp.zeros((*lead, n), wanted)
    made: Any = Bottleneck(
      down,
      zeros(m),
      up,
      zeros(n_out),
      _scaling(scaling, site, n_out, wanted, group),
      _dropout(site, dropout, jnp.float32),
      activation=activation,
      group=group,
      stacked=len(lead),
    )
    if norm:
      ones = jnp.ones((*lead, n_in), wanted)
      made = Normalized(ones, zeros(n_in), made, 1e-5, group=group, stacked=len(lead))
    return made

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    if isinstance(bottleneck, Mapping):
      have = {t.site.layer for t in _placed(sites, where, reads, None) if not t.site.stacked}
      if have and (odd := [layer for layer in bottleneck if layer not in have]):
        have = sorted(layer for layer in have if layer is not None)
        raise ValueError(f"bottleneck names layers {odd}; {where!r} is in layers {have}")
    for target in _placed(sites, where, reads, layers):
      site, (make, fields) = target.site, _placement(target, style, reads)
      inside = branch(site_key(key, site.path), site, *_widths(make, fields.get("tap"), site))
      node = make(branch=inside, **fields, group=group, stacked=len(site.stacked))
      params = add_bypass(params, sites, site.path, node)
    return params

  method = Transform(initialize)
  norms = own.train_norms if train_norms is None else train_norms
  return chain(method, train("norm", group=group)) if norms else method


def _check_options(
  style: str, own: Style, activation: str, init: str, tap: str | None, scaling: Any
) -> None:
  if activation not in ACTIVATIONS:
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
  if init not in INITS:
    raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
  if tap not in (None, "input", "residual"):
    raise ValueError(f"tap must be 'input' or 'residual', got {tap!r}")
  if tap is not None and own.reads in ("output", "sum"):
    raise ValueError(f"tap={tap!r} is for parallel styles; {style!r} reads the sublayer's output")
  if isinstance(scaling, str) and scaling not in ("learned", "channel"):
    raise ValueError(f"scaling must be a number, 'learned' or 'channel'; got {scaling!r}")
  number = scaling is None or isinstance(scaling, str) or not np.ndim(scaling)
  if not number or (isinstance(scaling, float) and not np.isfinite(scaling)):
    raise ValueError(f"scaling must be a finite number, got {scaling!r}")


def _placed(
  sites: tuple[Site, ...], targets: Targets, reads: str, layers: Iterable[int] | None
) -> list[Target]:
  """The sites of targets; of those that a norm of the sum follows, that norm where it is read."""
  names = (targets,) if isinstance(targets, str) else tuple(targets)
  if reads == "sum":
    known = {s.role for site in sites for s in site.roles}
    sums = {n: f"{n.removesuffix('_block')}_sum" for n in names}
    names = tuple(sums[n] if sums[n] in known else n for n in names)
  return find(sites, names, kind="call", layers=layers)


def _placement(
  target: Target, style: str, reads: str
) -> tuple[Callable[..., Bypass], dict[str, Any]]:
  """The placement's class and its own fields."""
  site, served = target
  kind = None if served is None else served.placement
  if kind == "around_norm" and reads == "sum":
    return AroundNorm, {}
  if kind == "before" and served is not None and reads == "input":
    return Before, {"tap": served.tap}
  if reads == "output" and kind in ("after", None):
    return After, {}
  if reads == "output" and kind == "before":
    return Before, {}
  if kind == "after" and served is not None:
    residual = served.residual or served.tap
    if reads == "sum":
      return After, {"tap": residual, "plus": True}
    return After, {"tap": residual if reads == "residual" else served.tap}
  if kind is None and reads == "input":
    return After, {"tap": "in"}
  raise ValueError(
    f"adapter({style!r}): {site.path!r} does not say where its {reads} is. State the role, for "
    'example roles={"ffn": (pelt.Role("mlp", "after", "in", "../norm:in"),)} in pelt.sites, and '
    "target it by that name"
  )


def _widths(make: Callable[..., Bypass], tap: str | None, site: Site) -> tuple[int, int]:
  """How many numbers a branch reads and gives; what the heads give may be wider than the model."""
  given = site.shape[-1] if make is Before else site.out[-1]
  if tap is None:
    return given, given
  return site.shape[-1] if tap == "in" else site.out[-1], given


def _drawn(
  key: jax.Array, lead: tuple[int, ...], sizes: tuple[int, int, int], init: str, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  n_in, m, n_out = sizes
  first, second = jax.random.split(key)
  if init == "zero_up":
    down = jax.random.uniform(first, (*lead, n_in, m), dtype, -(n_in**-0.5), n_in**-0.5)
    return down, jnp.zeros((*lead, m, n_out), dtype)
  if init == "bert":
    draw = lambda k, *shape: 0.02 * jax.random.normal(k, (*lead, *shape), dtype)
  else:
    draw = lambda k, *shape: (
      0.01 * jax.random.truncated_normal(k, -2.0, 2.0, (*lead, *shape), dtype)
    )
  return draw(first, n_in, m), draw(second, m, n_out)


def _scaling(scaling: Any, site: Site, width: int, dtype: Any, group: str | None) -> Any:
  if scaling is None:
    return None
  wide = np.promote_types(dtype, jnp.float32)
  if isinstance(scaling, str):
    shape = (*site.stacked, *((width,) if scaling == "channel" else ()))
    return Tuned(jnp.ones(shape, wide), group=group, stacked=len(site.stacked))
  return jnp.full(site.stacked, float(scaling), wide)
