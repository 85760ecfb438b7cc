"""AdapterDrop: no adapters in the lowest layers (arXiv:2010.11918)."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pelt_jax._node import Bypass, Chain
from pelt_jax._site import Site, find, layer_of
from pelt_jax._transform import Transform, add_bypass
from pelt_jax._walk import every_node, map_nodes, update_at, walk
from pelt_jax.methods._adapter import adapter
from pelt_jax.nodes import DropBelow, Guard


def adapter_drop(
  drop: int = 5,
  *,
  robust: bool = False,
  style: str = "pfeiffer",
  bottleneck: int | None = None,
  reduction: int | None = None,
  activation: str | None = None,
  scaling: float | str | None = None,
  dropout: float = 0.0,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains adapters in all layers but the `drop` lowest, which stay as they were pretrained.

  Specialised (the default): those layers have no adapters in training and inference, so the
  backward pass ends above them and several tasks share what they compute. Robust: n is drawn anew
  for every batch from 0, ..., L - 1, so that one adapter serves every n afterwards; `drop` is the n
  of evaluation, and `pelt.drop_to` sets another. One program does all n, and runs dropped layers
  without adapters and without a backward pass; nothing else that trains may lie below, a head or
  another adapter above is fine.

  (L - drop) times an adapter's numbers train; robust, all L.

  Args:
    drop: n, from 0 (all adapters) to the number of layers (none).
    robust: draw n in training. It needs a random stream named `"dropout"`.
    style: of `adapter`, as are the other options.
    bottleneck: as for `adapter`.
    reduction: as for `adapter`.
    activation: as for `adapter`.
    scaling: as for `adapter`.
    dropout: as for `adapter`.
    dtype: as for `adapter`.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if the model has fewer layers than `drop`, or a fixed
      `drop` meets layers stacked by a scan, which are one program.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.adapter_drop(5), pelt.train("head"))
  """
  if isinstance(drop, bool) or not isinstance(drop, int) or drop < 0:
    raise ValueError(f"drop must be a whole number of at least 0, got {drop!r}")
  options = {
    "bottleneck": bottleneck,
    "reduction": reduction,
    "activation": activation,
    "scaling": scaling,
    "dropout": dropout,
    "dtype": dtype,
    "group": group,
    "train_norms": False,
  }
  everywhere = adapter(style, **options)

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    layers = stack_of(sites, "adapter_drop")
    count = layers[0].stacked[0] if layers[0].stacked else len(layers)
    if drop > count:
      raise ValueError(f"drop={drop}, but the model has {count} layers: give drop= up to that")
    if robust:
      params = everywhere.init(key, params, sites)
      for number, site in enumerate(layers):
        own = jnp.arange(count) if site.stacked else jnp.asarray(number)
        node = DropBelow(
          jnp.asarray(own, jnp.float32),
          jnp.full(site.stacked, drop, jnp.float32),
          most=count - 1,
          group=None,
          stacked=len(site.stacked),
        )
        params = add_bypass(params, sites, site.path, node)
      return params
    if layers[0].stacked and drop:
      raise ValueError(
        f"drop={drop} takes layers out of the program, but a scan stacks them at "
        f"{layers[0].path!r}; unstack first: models.to_looped(params, model), "
        "model.clone(scan=False); or take robust=True"
      )
    if drop == count:
      return params
    kept = None if drop == 0 else range(drop, count)
    return adapter(style, layers=kept, **options).init(key, params, sites)

  return Transform(initialize)


def stack_of(sites: tuple[Site, ...], name: str) -> list[Site]:
  """The layers in their order, one site if a scan stacks them; `name` is who asks.

  Raises:
    ValueError: if the model has several stacks.
  """
  layers = [t.site for t in find(sites, "layer", kind="call")]
  stacks = {s.parent if not s.stacked else s.path for s in layers}
  if len(stacks) > 1:
    raise ValueError(f"{name} needs one stack of layers; this model has {sorted(stacks)}")
  return sorted(layers, key=lambda site: site.layer or 0)  # sites have 10 before 2


def adapters_of(value: Any) -> tuple[Bypass, ...]:
  """The adapters among the bypass nodes of one site: those that have a branch."""
  nodes = value.nodes if isinstance(value, Chain) else (value,)
  return tuple(n for n in nodes if isinstance(n, Bypass) and hasattr(n, "branch"))


def without_adapters(params: dict, layers: Collection[int], *, robust: bool = True) -> dict:
  """Params of looped layers without the adapters in some.

  Args:
    params: params with adapters.
    layers: numbers of the layers that lose them, and the node that may leave them out.
    robust: whether the other layers keep that node.
  """

  def goes(node: Bypass, dropped: bool) -> bool:
    if isinstance(node, DropBelow):
      return dropped or not robust
    return dropped and bool(adapters_of(node))

  table = {}
  for path, value in walk(params):
    if isinstance(value, Bypass):
      nodes = value.nodes if isinstance(value, Chain) else (value,)
      kept = tuple(n for n in nodes if not goes(n, layer_of(path) in layers))
      if not kept:
        continue
      if len(kept) < len(nodes):
        value = kept[0] if len(kept) == 1 else value.replace(nodes=kept)
    table[path] = value
  bare = set(layers) - {layer_of(p) for p, v in table.items() if isinstance(v, Bypass)}
  idle = lambda path, value: isinstance(value, Guard) and layer_of(path) in bare
  return update_at({}, {p: v.base if idle(p, v) else v for p, v in table.items()})


def drop_to(params: dict, drop: Any) -> dict:
  """Params of robust adapters with another n for evaluation; it may be traced.

  Args:
    params: what `adapter_drop(robust=True)` made.
    drop: n, from 0 to the number of layers.

  Raises:
    ValueError: if params hold no such adapters, or a concrete n is out of range.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> layer = pelt.nodes.DropBelow(jnp.zeros(()), jnp.zeros(()), most=3)
    >>> params = pelt.drop_to({"layers": {"0": {"bypass": layer}}}, 2)
    >>> float(params["layers"]["0"]["bypass"].drop)
    2.0
  """
  if not any(isinstance(n, DropBelow) for n in every_node(params)):
    raise ValueError("params hold no adapters of adapter_drop(robust=True)")

  def changed(node: Any) -> Any:
    if not isinstance(node, DropBelow):
      return node
    if not isinstance(drop, Tracer) and drop not in range(node.most + 2):
      raise ValueError(f"drop={drop!r}: expected 0 to {node.most + 1}, the number of layers")
    return node.replace(drop=jnp.broadcast_to(jnp.asarray(drop, jnp.float32), node.drop.shape))

  return map_nodes(changed, params)
