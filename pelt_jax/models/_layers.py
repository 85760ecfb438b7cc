"""Stacks of layers, looped or scanned, and the conversion of their parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from pelt_jax._shardings import BATCH_AXES
from pelt_jax.models._attention import Array

Remat = bool | str  # "offload" is the one word

# Boxes of sharding names look for this key when an axis comes or goes; the layer axis has none.
_AXIS: dict[Any, Any] = {nn.PARTITION_NAME: None}


class _Loop(nn.Module):
  """Holds the layers "0", "1", …: Hugging Face's ModuleList."""

  make: Callable[[str], nn.Module]
  step: Callable[[Any, Array, Any], Array]
  flags: tuple[Any, ...]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i, flag in enumerate(self.flags):
      x = self.step(self.make(str(i)), x, flag)
    return x


def run_layers(
  make: Callable[[str], nn.Module],
  step: Callable[[Any, Array, Any], Array],
  x: Array,
  *,
  name: str,
  flags: Sequence[Any],
  scan: bool,
  remat: Remat,
) -> Array:
  """Runs `x = step(layer, x, flag)` over a stack of equal layers, inside a compact method.

  Looped, layer i's parameters live at `name/i/…`; scanned, at `name/…` with a leading layer axis.

  Args:
    make: `make(module_name)` builds one layer.
    step: calls a layer; closes over whatever is the same for all layers.
    x: the residual stream.
    name: the stack's module name.
    flags: one static value per layer. A scan has one body, so there they become an array unless
      they are all equal.
    scan: one compiled body instead of `len(flags)`.
    remat: keep only each layer's input for the backward pass; "offload" keeps it on the host.

  Returns:
    The residual stream after the last layer.
  """
  if not scan:
    return _Loop(make, _closed(step, remat) if remat else step, tuple(flags), name=name)(x)
  same = len(set(flags)) == 1

  def body(layer: nn.Module, x: Array, flag: Any) -> tuple[Array, None]:
    return step(layer, x, flags[0] if same else flag), None

  if remat:  # a scan's body is compiled once, so nothing can be merged across it
    body = _remat(body, remat, prevent_cse=False)
  lifted = nn.scan(
    body,
    variable_axes={"params": 0, "cache": 0, "intermediates": 0},
    split_rngs={"params": True, "dropout": True},
    length=len(flags),
    metadata_params=_AXIS,
  )
  x, _ = lifted(make(name), x, None if same else jnp.asarray(flags))
  return x


def _closed(step: Callable[[Any, Array, Any], Array], remat: Remat) -> Callable:
  # The flag is static, hence closed over: nn.remat would trace it.
  def run(layer: Any, x: Array, flag: Any) -> Array:
    return _remat(lambda layer, x, _: step(layer, x, flag), remat)(layer, x, None)

  return run


def _remat(body: Callable, remat: Remat, **options: Any) -> Callable:
  """A layer of which the backward pass has the input alone, on the device or on the host."""
  if remat != "offload":
    return nn.remat(body, **options)
  policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["residual"],
    offload_src="device",
    offload_dst="pinned_host",
  )
  named = lambda layer, x, flag: body(layer, checkpoint_name(x, "residual"), flag)
  return nn.remat(named, policy=policy, **options)


def constrain(x: Array) -> Array:
  """Keeps activations (B, …) split over the batch axes of the mesh in use, if there are any.

  Left alone, the partitioner may keep FSDP weights in place and all-reduce activations instead.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes: tuple[str, ...] = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
  while axes and x.shape[0] % _size(mesh, axes):
    axes = axes[:-1]  # a batch of one (generation) cannot be split
  if not axes:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *[None] * (x.ndim - 1)))


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
  size = 1
  for a in axes:
    size *= mesh.shape[a]
  return size


def to_scanned(params: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
  """Stacks the parameters of looped layers for the same model with `scan=True`.

  Every dict with keys "0" … "n-1" becomes one dict whose arrays have a leading layer axis; nodes
  are stacked too and told of their new axis.

  Args:
    params: parameters of a looped model, with or without nodes.
    model: unused; accepted so that both conversions are called alike.

  Returns:
    A new tree.

  Raises:
    ValueError: the layers differ in structure or shape (an adapter on some layers only, other
      ranks), which one scanned body cannot express. The first difference is named.

  >>> to_scanned({"layers": {"0": {"w": jnp.zeros(2)}, "1": {"w": jnp.ones(2)}}})["layers"][
  ...   "w"
  ... ].shape
  (2, 2)
  """
  del model

  def walk(tree: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    if tree and all(re.fullmatch(r"\d+", k) for k in tree):
      return stack_layers([tree[str(i)] for i in range(len(tree))], "/".join(path))
    return {k: walk(v, (*path, k)) for k, v in tree.items()}

  return walk(params, ())


def to_looped(params: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
  """Splits the parameters of scanned layers for the same model with `scan=False`.

  Args:
    params: parameters of a scanned model, with or without nodes, arrays or shapes.
    model: tells where the stack lives and how many layers it has.

  Returns:
    A new tree.
  """

  def walk(tree: Mapping[str, Any], rest: Sequence[str], length: int) -> dict[str, Any]:
    if rest:
      return {k: walk(v, rest[1:], length) if k == rest[0] else v for k, v in tree.items()}
    return {str(i): unstack_layer(tree, i) for i in range(length)}

  out: Any = params
  for path, length in stacks(model):
    out = walk(out, path.split("/"), length)
  return out


def stacks(model: nn.Module) -> tuple[tuple[str, int], ...]:
  """Paths of a model's stacks of layers and how many layers each has."""
  return model.stacks if hasattr(model, "stacks") else (model.stack,)


def unstack_layer(tree: Any, i: int) -> Any:
  """Layer i of a stacked tree."""

  def one(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return x[i]

  return meta.remove_axis(jax.tree.map(one, tree), 0, _AXIS)


def stack_layers(layers: Sequence[Any], where: str) -> Any:
  """Stacks equal trees on a new leading axis; `where` is named in errors."""
  first = jax.tree_util.tree_structure(layers[0])
  for i, layer in enumerate(layers):
    other = jax.tree_util.tree_structure(layer)
    if other != first:
      a, b = ({jax.tree_util.keystr(p) for p, _ in _flat(t)} for t in (layers[0], layer))
      raise ValueError(
        f"layers 0 and {i} of {where!r} differ in structure, so they cannot be scanned: "
        f"{sorted(a ^ b)[:4] or f'{first} against {other}'}. Adapt all layers alike or loop."
      )

  def stack(path: Any, *leaves: Any) -> Any:
    if len({x.shape for x in leaves}) > 1:
      raise ValueError(
        f"{where}{jax.tree_util.keystr(path)} has other shapes in other layers "
        f"({sorted({x.shape for x in leaves})}), so they cannot be scanned"
      )
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)

  stacked = jax.tree_util.tree_map_with_path(stack, *layers)
  return meta.add_axis(stacked, 0, _AXIS)


def _flat(tree: Any) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_flatten_with_path(tree)[0]
