"""IA3: keys, values and feed-forward activations scaled by learned vectors (arXiv:2205.05638)."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import GENERATORS
from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, like_box, over, require
from pelt_jax._walk import next_number, update_at
from pelt_jax.methods._lora import _numbers
from pelt_jax.methods._matrices import Matrix, put, whole_matrices
from pelt_jax.nodes import ScaledWeight, SharedScales
from pelt_jax.nodes._lora import subscripts


def ia3(
  targets: Targets = ("key", "value"),
  *,
  feedforward: Targets = ("ffn_out",),
  layers: Iterable[int] | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Scales what projections give, y = l * (x W + bias), or take, y = (x * l) W + bias.

  The paper's equation 1 and the feed-forward activation beside it: of every layer keys and values
  are scaled as they come out of their projections, and what the nonlinearity gives as it goes into
  the second feed-forward matrix. l is one at first, so the model computes what it computed before.
  With the default targets L (2 d + d_ff) parameters. Merges into kernels and biases; a bias is the
  leaf named `bias` beside its kernel.

  A bias of a target is scaled by the l of its kernel, which has it as a parameter: a generator at
  the root, `generators/NNN_ia3`, fills it in.

  Args:
    targets: whose outputs are scaled: roles or path patterns; may be empty.
    feedforward: whose inputs are scaled; may be empty. What both name is scaled at its input.
    layers: layer numbers to keep; all by default.
    dtype: dtype of l; by default the kernel's, float32 over a quantized one.
    group: label of l; None freezes it.

  Returns:
    A `Transform`.

  Raises:
    ValueError: at init, if nothing is named, or a target matches nothing, is never called, trains
      already, or is a table or no single matrix.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.ia3("kernel", feedforward=())
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> params["kernel"] = params["kernel"].replace(scale=jnp.array([1.0, 2.0, 0.0]))
    >>> merged = pelt.merge({**params, "bias": params["bias"].replace(base=jnp.ones(3))})
    >>> merged["bias"].tolist(), pelt.count(params).stored
    ([1.0, 2.0, 0.0], 3)
  """
  targets, feedforward = ((t,) if isinstance(t, str) else tuple(t) for t in (targets, feedforward))
  if not targets + feedforward:
    raise ValueError("targets and feedforward are both empty; name at least one role or pattern")

  def init(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    named = lambda t: whole_matrices("ia3", sites, t, layers) if t else []
    inputs = {m.site.path: m for m in named(feedforward)}
    outputs = {m.site.path: m for m in named(targets) if m.site.path not in inputs}
    beside = {path: bias for path, m in outputs.items() if (bias := _bias(sites, m)) is not None}
    name = f"{next_number(params.get(GENERATORS, {})):03d}_ia3"

    def scaled(matrix: Matrix, leaf: Any, _: jax.Array) -> ScaledWeight:
      site = matrix.site
      kernel, *sides = subscripts(matrix.axes)
      letters = sides[site.path in outputs]
      size = dict(zip(kernel, site.shape, strict=True))
      lead, names = matrix.names(leaf)
      ones = jnp.ones((*site.stacked, *(size[c] for c in letters)), _numbers(leaf, dtype)[0])
      return ScaledWeight(
        leaf,
        like_box(leaf, ones, (*lead, *map(names.get, letters))),
        axes=f"{kernel}:{letters}",
        shared=name if site.path in beside else "",
        group=group,
        stacked=len(site.stacked),
      )

    params = put("ia3", key, params, (inputs | outputs).values(), scaled)
    if not beside:
      return params
    changes: dict[str, Any] = {f"{GENERATORS}/{name}": SharedScales(name=name)}
    for path, bias in beside.items():
      letters = subscripts(outputs[path].axes)[2]
      more: dict[str, Any] = {"axes": f"{letters}:{letters}", "shared": name, "group": group}
      waiting = lambda x, s=bias, m=more: ScaledWeight(x, stacked=len(s.stacked), **m)
      changes[bias.path] = over(require(params, bias), waiting)
    return update_at(params, changes)

  return Transform(init)


def _bias(sites: tuple[Site, ...], matrix: Matrix) -> Site | None:
  """The bias beside a kernel."""
  path = f"{matrix.site.parent}/bias".lstrip("/")
  bias = next((s for s in sites if s.kind == "leaf" and s.path == path), None)
  kernel, _, outputs = subscripts(matrix.axes)
  size = dict(zip(kernel, matrix.site.shape, strict=True))
  if bias is not None and bias.shape != tuple(size[c] for c in outputs):
    raise ValueError(
      f"ia3: {path!r} has shape {bias.shape}, which is not that of the outputs of "
      f"{matrix.site.path!r}, {matrix.site.shape}; name the module in feedforward, or leave it out"
    )
  return bias
