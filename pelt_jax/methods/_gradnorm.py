"""Layers that keep their adapters, chosen by the norm of the adapters' gradients.

An extension of AdapterDrop (arXiv:2010.11918), which drops the lowest layers and looks at no
gradient. No paper claims it; measure it before you rely on it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Bypass
from pelt_jax._site import layer_of
from pelt_jax._transform import check_whole
from pelt_jax._walk import walk
from pelt_jax.methods._adapter_drop import adapters_of, without_adapters


def gradnorm_layers(
  grads: Iterable[Any] | Mapping[str, Any],
  *,
  keep: int | None = None,
  threshold: float | None = None,
) -> dict[int, float]:
  """The layers whose adapters have the largest gradients, with the norms.

  A layer's norm is |mean over batches of dL/dTheta_l|₂ over all its adapters' numbers: that of the
  gradient of the loss over the batches together, if they are of one size. An extension that no
  paper claims; AdapterDrop itself leaves out the lowest layers (`adapter_drop`). The layers serve
  `adapter(layers=...)` for a fresh start, or `gradnorm_prune`.

  Args:
    grads: one tree per batch, such as `pelt.value_and_grad` gives, of looped or scanned layers. A
      generator will do: one is held at a time, and their mean.
    keep: how many layers to choose; of equal norms the lower layers.
    threshold: choose the layers whose norm is at least that.

  Returns:
    The norm of each chosen layer, by its number in ascending order.

  Raises:
    TypeError: if grads are no trees.
    ValueError: if not one of `keep` and `threshold` is given, or it chooses no layer or more than
      there are, or grads hold no adapters, those of two stacks of layers, or a norm is no number.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> adapter = lambda *up: pelt.nodes.After(pelt.nodes.Bottleneck(up=jnp.array(up)))
    >>> layers = {"0": {"bypass": adapter(3.0, 4.0)}, "1": {"bypass": adapter(0.0, 1.0)}}
    >>> pelt.gradnorm_layers([{"layers": layers}], keep=1)
    {0: 5.0}
  """
  if (keep is None) == (threshold is None):
    raise ValueError(f"give one of keep and threshold, got keep={keep} and threshold={threshold}")
  check_whole(keep=1 if keep is None else keep)
  norms = _norms(_mean([grads] if isinstance(grads, Mapping) else grads))
  shown = {layer: float(f"{norm:.3g}") for layer, norm in norms.items()}
  if bad := [layer for layer, norm in norms.items() if not np.isfinite(norm)]:
    raise ValueError(f"the gradients of layers {bad} are not finite: {shown}")
  if threshold is not None:
    chosen = [layer for layer, norm in norms.items() if norm >= threshold]
    if not chosen:
      raise ValueError(f"threshold={threshold} is above the norms of all layers: {shown}")
  else:
    assert keep is not None
    if keep > len(norms):
      raise ValueError(f"keep={keep}, but adapters are in {len(norms)} layers, {[*norms]}")
    chosen = sorted(sorted(norms, key=lambda layer: (-norms[layer], layer))[:keep])
  return {layer: norms[layer] for layer in chosen}


def gradnorm_prune(params: dict, layers: Iterable[int]) -> dict:
  """Params with adapters in some layers only: elsewhere they leave the tree and the program.

  With `gradnorm_layers` an extension that no paper claims. Norms and prefixes stay; what is kept
  keeps its values.

  Args:
    params: params with adapters, of looped layers.
    layers: numbers of the layers that keep theirs, such as `gradnorm_layers` gave.

  Raises:
    ValueError: if layers are stacked by a scan, none is given, or one has no adapter.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> adapter = pelt.nodes.After(pelt.nodes.Bottleneck(up=jnp.ones(2)))
    >>> params = {"layers": {str(i): {"bypass": adapter, "w": jnp.ones(2)} for i in range(3)}}
    >>> params = pelt.gradnorm_prune(params, [1])
    >>> [*params["layers"]["0"]], [*params["layers"]["1"]]
    (['w'], ['bypass', 'w'])
  """
  kept, adapters = set(layers), {p: n for p, n in walk(params) if adapters_of(n)}
  if not kept:
    raise ValueError("layers is empty: name at least one layer that keeps its adapters")
  if scanned := [path for path, node in adapters.items() if node.stacked]:
    raise ValueError(
      f"layers={sorted(kept)} takes adapters out of the program, but a scan stacks the layers at "
      f"{scanned[0]!r}; unstack first: models.to_looped(params, model), model.clone(scan=False)"
    )
  found = {layer for path in adapters if (layer := layer_of(path)) is not None}
  if missing := sorted(kept - found):
    raise ValueError(f"layers {missing} have no adapters; layers {sorted(found)} do")
  return without_adapters(params, found - kept)


def _mean(grads: Iterable[Any]) -> Any:
  total, count = None, 0
  wide = lambda x: jnp.asarray(x, np.promote_types(x.dtype, jnp.float32))
  for tree in grads:
    if not isinstance(tree, Mapping):
      raise TypeError(
        f"grads must be trees like the params, got {type(tree).__name__}; pelt.value_and_grad "
        "gives (loss, grads): take the second"
      )
    tree = {path: jax.tree.map(wide, node) for path, node in walk(tree) if adapters_of(node)}
    total = tree if total is None else jax.tree.map(jnp.add, total, tree)
    count += 1
  if not count:
    raise ValueError("grads is empty: give at least one batch's")
  return jax.tree.map(lambda x: x / count, total)


def _norms(grads: Mapping[str, Bypass]) -> dict[int, float]:
  """The norm of each layer's adapters, in the order of the layers."""
  squares: dict[int, float] = {}
  stacks = set()
  for path, node in grads.items():
    values = [np.square(np.asarray(x, np.float64)) for x in jax.tree.leaves(adapters_of(node))]
    number, layers = layer_of(path), {}
    if node.stacked:  # of one stack's path only the start is known
      stacks.add(path.split("/")[0])
      layers = dict(enumerate(zip(*values, strict=True)))
    elif number is not None and values:
      stacks.add(re.split(r"(?:^|[/_])\d+/", path, maxsplit=1)[0])
      layers[number] = values
    for layer, mine in layers.items():
      squares[layer] = squares.get(layer, 0.0) + sum(float(x.sum()) for x in mine)
  if not squares:
    raise ValueError("grads hold no adapters that train, such as pelt.adapter adds to layers")
  if len(stacks) > 1:
    raise ValueError(f"layers are those of one stack; the adapters are in {sorted(stacks)}")
  return {layer: squares[layer] ** 0.5 for layer in sorted(squares)}
