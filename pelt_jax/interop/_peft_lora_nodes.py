"""Nodes made of what a LoRA folder holds for one leaf."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Weight, strip
from pelt_jax._transform import box_names, like_box
from pelt_jax.methods._olora import basis
from pelt_jax.methods._pissa import principal
from pelt_jax.nodes import DoraWeight, Dropout, LoraWeight, Residual
from pelt_jax.nodes._axes import wide
from pelt_jax.nodes._lora import subscripts

_STARTS = {"pissa": principal, "olora": basis}


class Pair(NamedTuple):
  """One LoRA in our orientation: a ([experts], in, r), b ([experts], r, out)."""

  a: np.ndarray
  b: np.ndarray
  scaling: float
  axes: str
  magnitude: np.ndarray | None = None


def lora_node(
  leaf: Any, pairs: Mapping[int | None, Pair], rate: float, start: str | None
) -> Weight:
  """The node of a leaf from its layers' pairs, or the pair of a leaf that is not scanned.

  Args:
    leaf: plain or quantized.
    pairs: by layer.
    rate: dropout.
    start: the decomposition whose factors PEFT takes from the base, None for none.

  Raises:
    ValueError: if the leaf is not what that takes, or magnitudes lack for some layers.
  """
  some = next(iter(pairs.values()))
  lead = () if None in pairs else leaf.shape[:1]
  a, b, scaling = _joined(pairs, lead)
  number = np.promote_types(a.dtype, np.float32)
  layer = jnp.arange(lead[0], dtype=jnp.float32) if lead else None
  dropout = Dropout(jnp.full(lead, rate, number), layer, stacked=len(lead)) if rate else None
  letters = subscripts(some.axes)
  names = dict(zip(letters[0], box_names(leaf, leaf.ndim)[len(lead) :], strict=True))
  boxed = lambda x, axes: like_box(
    leaf, jnp.asarray(x), (*[None] * len(lead), *map(names.get, axes))
  )
  common = {"axes": some.axes, "stacked": len(lead)}
  scaling = jnp.asarray(scaling, number)
  below = leaf
  if start is not None:
    first = _joined(_started(leaf, pairs, start), lead)
    first_a, first_b = (boxed(x, axes) for x, axes in zip(first[:2], letters[1:], strict=True))
    below = Residual(None, first_a, first_b, scaling, None, group=None, **common).of(leaf)
  node = LoraWeight(below, boxed(a, letters[1]), boxed(b, letters[2]), scaling, dropout, **common)
  if some.magnitude is None:
    return node
  if lead and len(pairs) < lead[0]:
    raise ValueError(
      f"the file has magnitudes of the layers {sorted(p for p in pairs if p is not None)} alone: "
      "load the model with scan=False"
    )
  found = [pairs[i].magnitude for i in range(lead[0])] if lead else some.magnitude
  return DoraWeight(
    node.replace(dropout=None),
    boxed(np.asarray(found), "o"),
    dropout,
    axes="io:i,o",
    stacked=len(lead),
  )


def _started(leaf: Any, pairs: Mapping[int | None, Pair], start: str) -> dict[int | None, Pair]:
  """What PEFT takes out of the base, as it would."""
  if isinstance(leaf, Weight):
    raise ValueError(
      f"init_lora_weights={start!r} takes the plain weight apart, and it is a "
      f"{type(leaf).__name__} here; load over the plain base"
    )
  found = {}
  for i, pair in pairs.items():
    kernel = strip(leaf) if i is None else strip(leaf)[i]
    kernel = jnp.asarray(kernel, wide(kernel))
    scaling = jnp.asarray(pair.scaling, kernel.dtype)
    a, b = map(np.asarray, _STARTS[start](kernel, pair.a.shape[-1], scaling, None))
    found[i] = pair._replace(a=a, b=b)
  return found


def _joined(pairs: Mapping[int | None, Pair], lead: tuple[int, ...]) -> tuple:
  """a, b and the scaling of all layers, zeros where one has a lower rank or no pair at all."""
  some = next(iter(pairs.values()))
  if not lead:
    return some.a, some.b, some.scaling
  rank = max(p.a.shape[-1] for p in pairs.values())
  a = np.zeros((*lead, *some.a.shape[:-1], rank), some.a.dtype)
  b = np.zeros((*lead, *some.b.shape[:-2], rank, some.b.shape[-1]), some.b.dtype)
  scaling = [1.0] * lead[0]
  for i, pair in pairs.items():
    a[i, ..., : pair.a.shape[-1]] = pair.a
    b[i, ..., : pair.b.shape[-2], :] = pair.b
    scaling[i] = pair.scaling  # type: ignore[index]
  return a, b, scaling
