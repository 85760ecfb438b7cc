"""Where the arrays of params lie on a device mesh, nodes included."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._leaf import unbox
from pelt_jax._node import Node, Weight
from pelt_jax._walk import update_at, walk

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the rows of a batch

_log = logging.getLogger(__name__)
_NAMED = 5  # leaves in a warning


def shardings(
  params: Mapping[str, Any],
  base_specs: Any,
  mesh: Mesh,
  *,
  fsdp: str | Sequence[str] = ("fsdp", "data"),
) -> dict:
  """A `NamedSharding` for every array of params, nodes included.

  A node follows the leaf it stands for: of a kernel partitioned P(in, out), LoRA's a gets P(in,
  None) and b P(None, out). A prefix is split along its heads by the axis that splits the weights of
  its attention; what acts on the residual stream (adapters, fusion, gates) and what makes other
  arrays (generators) is on every device. Additions are never partitioned over the axes of fully
  sharded data parallelism, nor along the rank, nor along a bank's members. An axis that does not
  divide an array is dropped from it, of several the last one first; a warning is logged for leaves.

  Args:
    params: params with nodes.
    base_specs: the plain params' tree of `jax.sharding.PartitionSpec`.
    mesh: the device mesh.
    fsdp: names of the mesh axes used for fully sharded data parallelism.

  Returns:
    The structure of params.

  Raises:
    TypeError: if what base_specs has for a leaf is no `PartitionSpec`.
    ValueError: if a leaf of params has no spec, or one that fits neither its axes nor the mesh's.
  """
  # One sharding in place of each box: it serves the array inside.
  values = {path: unbox(value) for path, value in walk(params)}
  known, data = _specs(values, base_specs, mesh), axes_of(fsdp)

  def of(path: str, value: Any) -> Any:
    if path not in known:
      lead = (None,) * value.stacked
      return value.specs(lead, (*lead, _features(known, path, data)))
    spec = known[path]
    if not isinstance(value, Weight):
      return jax.sharding.PartitionSpec(*spec)
    return value.specs(spec, tuple(_without(axis, data) for axis in spec))

  wanted = {path: of(path, value) for path, value in values.items()}
  found = {path: fitted(values[path], specs, mesh) for path, specs in wanted.items()}
  lost = [what for path in known for what in _lost(path, values, wanted, found)]
  if lost:
    more = f"; and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    _log.warning(
      "%d dimensions of leaves do not divide over axes of the mesh, along which each device holds "
      "all of them: %s%s",
      len(lost),
      "; ".join(lost[:_NAMED]),
      more,
    )
  return update_at({}, found)


def gathered(
  params: Mapping[str, Any],
  base_specs: Any,
  mesh: Mesh,
  *,
  fsdp: str | Sequence[str] = ("fsdp", "data"),
) -> dict[str, jax.sharding.NamedSharding]:
  """How frozen kernels of 4 bits lie while a product uses them, for `bypass(apply, gathered=...)`.

  Under fully sharded data parallelism a kernel is brought together for each product. XLA by itself
  dequantizes the shards and moves what that gives, 8 times the bytes of the codes (4 in bfloat16).
  With this a product first asks for the codes without the FSDP axes, so codes travel. Tensor axes
  stay: there each device computes with its own part.

  Args:
    params: params with nodes.
    base_specs: as of `shardings`.
    mesh: the device mesh.
    fsdp: as of `shardings`.

  Returns:
    The sharding of one layer's kernel, by path, for every weight node.

  Raises:
    TypeError: as of `shardings`.
    ValueError: as of `shardings`.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> from jax.sharding import PartitionSpec as P
    >>> model, x = nn.Dense(8), jnp.ones((2, 64))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> params = pelt.nf4(targets="kernel").init(jax.random.key(1), params, pelt.sites(model, x))
    >>> mesh, specs = jax.make_mesh((1,), ("fsdp",)), {"kernel": P("fsdp", None), "bias": P()}
    >>> where = pelt.gathered(params, specs, mesh)
    >>> tuple(where["kernel"].spec)
    (None, None)
    >>> params = jax.device_put(params, pelt.shardings(params, specs, mesh))
    >>> pelt.bypass(model.apply, gathered=where)({"params": params}, x).shape
    (2, 8)
  """
  values = {path: unbox(value) for path, value in walk(params)}
  weights = {path: value for path, value in values.items() if isinstance(value, Weight)}
  known, data, found = _specs(weights, base_specs, mesh), axes_of(fsdp), {}
  for path, value in weights.items():
    tensor = (_without(axis, data) for axis in known[path][value.stacked :])
    found[path] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*tensor))
  return found


def _specs(values: Mapping[str, Any], base_specs: Any, mesh: Mesh) -> dict[str, tuple]:
  """Partition specs of leaves by path, one entry per axis."""
  P = jax.sharding.PartitionSpec
  known, found = dict(walk(base_specs)), {}
  for path, value in values.items():
    if isinstance(value, Node) and not isinstance(value, Weight):
      continue
    if path not in known:
      raise ValueError(f"base_specs has no PartitionSpec for {path!r}; give P() to replicate it")
    spec, shape = known[path], value.shape if isinstance(value, Weight) else jnp.shape(value)
    fits = isinstance(spec, P) and len(spec) <= len(shape)
    if not fits or {name for axis in spec for name in axes_of(axis)} - set(mesh.axis_names):
      raise (ValueError if isinstance(spec, P) else TypeError)(
        f"base_specs has {spec!r} for {path!r} of shape {shape}: expected a PartitionSpec with at "
        f"most one entry per axis, of the mesh's axes {mesh.axis_names}. Of logical names "
        "nn.logical_to_mesh(specs, rules) makes one, and PartitionSpec() is for a leaf that lies "
        "whole"
      )
    found[path] = (*spec, *(None,) * (len(shape) - len(spec)))
  return found


def _features(known: Mapping[str, tuple], path: str, fsdp: tuple[str, ...]) -> Any:
  """What splits the weights of the module at `path`, or of the nearest one round it with weights.

  None where they are whole, or split along several axes of the mesh: which one is not known.
  """
  inside: list[Any] = []
  while path and not inside:
    path = path.rpartition("/")[0]
    inside = [spec for name, spec in known.items() if name.startswith(f"{path}/" if path else "")]
  found = {_without(axis, fsdp) for spec in inside for axis in spec} - {None}
  return found.pop() if len(found) == 1 else None


def axes_of(given: str | Collection[str] | None) -> tuple[str, ...]:
  """The mesh axes that an entry of a spec, or an argument, names."""
  if given is None:
    return ()
  return (given,) if isinstance(given, str) else tuple(given)


def entry_of(axes: tuple[str, ...]) -> Any:
  """The entry of a spec that names these mesh axes."""
  return axes if len(axes) > 1 else (axes[0] if axes else None)


def _without(entry: Any, axes: tuple[str, ...]) -> Any:
  return entry_of(tuple(name for name in axes_of(entry) if name not in axes))


def fitted(value: Any, specs: Any, mesh: Mesh) -> Any:
  """Specs as shardings, without the axes that do not divide the array: of several the last go."""

  def fit(x: Any, spec: Any) -> jax.sharding.NamedSharding:
    shape, kept = jnp.shape(x), []
    for i, entry in enumerate(spec):
      axes = axes_of(entry)
      while shape[i] % math.prod(mesh.shape[name] for name in axes):
        axes = axes[:-1]
      kept.append(entry_of(axes))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))

  return jax.tree.map(fit, value, specs)


def _lost(path: str, *trees: Mapping[str, Any]) -> Iterator[str]:
  """What a leaf itself, not what was added to it, was to be split over and is not.

  Args:
    path: of the leaf.
    trees: values, their specs and their shardings, by path.
  """

  def leaf(value: Any) -> Any:
    inner = value.inner if isinstance(value, Weight) else None
    return value if inner is None else leaf(inner)

  arrays = zip(*(jax.tree.leaves(leaf(tree[path])) for tree in trees), strict=True)
  for x, spec, at in arrays:
    for i, (entry, kept) in enumerate(zip(spec, at.spec, strict=True)):
      if axes := axes_of(entry)[len(axes_of(kept)) :]:
        sizes = ", ".join(f"{name}={at.mesh.shape[name]}" for name in axes)
        yield f"{path}: dimension {i} of {x.shape[i]} over {sizes}"
