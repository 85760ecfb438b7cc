"""Where the arrays of params lie on a device mesh, nodes included."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._leaf import unbox
from pelt_jax._node import Node, Weight
from pelt_jax._walk import update_at, walk

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the rows of a batch


def shardings(
  params: Mapping[str, Any],
  base_specs: Any,
  mesh: Mesh,
  *,
  fsdp: Sequence[str] = ("fsdp", "data"),
) -> dict:
  """A `NamedSharding` for every array of params, nodes included.

  A node follows the leaf it stands for: of a kernel partitioned P(in, out), LoRA's a gets P(in,
  None) and b P(None, out). A prefix is split along its heads by the axis that splits the weights of
  its attention; what acts on the residual stream (adapters, fusion, gates) and what makes other
  arrays (generators) is on every device. Additions are never partitioned over the axes of fully
  sharded data parallelism, nor along the rank, nor along a bank's members. An axis that does not
  divide an array is dropped from it.

  Args:
    params: params with nodes.
    base_specs: the plain params' tree of `jax.sharding.PartitionSpec`.
    mesh: the device mesh.
    fsdp: names of the mesh axes used for fully sharded data parallelism.

  Returns:
    The structure of params.

  Raises:
    ValueError: if a leaf of params has no spec.
  """
  P = jax.sharding.PartitionSpec
  known = dict(walk(base_specs))

  def of(path: str, value: Any) -> Any:
    value = unbox(value)  # one sharding in place of each box: it serves the array inside
    if isinstance(value, Node) and not isinstance(value, Weight):
      lead = (None,) * value.stacked
      return fitted(value, value.specs(lead, (*lead, _features(known, path, tuple(fsdp)))), mesh)
    spec = _spec_of(known, path, value)
    if not isinstance(value, Weight):
      return fitted(value, P(*spec), mesh)
    tensor = tuple(_without(axis, tuple(fsdp)) for axis in spec)
    return fitted(value, value.specs(spec, tensor), mesh)

  return update_at({}, {path: of(path, value) for path, value in walk(params)})


def gathered(
  params: Mapping[str, Any],
  base_specs: Any,
  mesh: Mesh,
  *,
  fsdp: Sequence[str] = ("fsdp", "data"),
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
    ValueError: if a node has no spec.

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
  known = dict(walk(base_specs))
  found = {}
  for path, value in walk(params):
    value = unbox(value)
    if not isinstance(value, Weight):
      continue
    spec = _spec_of(known, path, value)[value.stacked :]
    tensor = (_without(axis, tuple(fsdp)) for axis in spec)
    found[path] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*tensor))
  return found


def _spec_of(known: Mapping[str, Any], path: str, value: Any) -> tuple:
  """A leaf's partition spec, one entry per axis."""
  if path not in known:
    raise ValueError(f"base_specs has no PartitionSpec for {path!r}; give P() to replicate it")
  ndim = value.ndim if isinstance(value, Weight) else jnp.ndim(value)
  return (*known[path], *(None,) * (ndim - len(known[path])))


def _features(known: Mapping[str, Any], path: str, fsdp: tuple[str, ...]) -> Any:
  """What splits the weights of the module at `path`, or of the nearest one round it with weights.

  None where they are whole, or split along several axes of the mesh: which one is not known.
  """
  inside: list[Any] = []
  while path and not inside:
    path = path.rpartition("/")[0]
    inside = [spec for name, spec in known.items() if name.startswith(f"{path}/" if path else "")]
  found = {_without(axis, fsdp) for spec in inside for axis in spec} - {None}
  return found.pop() if len(found) == 1 else None


def _without(axis: Any, names: tuple[str, ...]) -> Any:
  left = tuple(a for a in (axis if isinstance(axis, tuple) else (axis,)) if a not in (*names, None))
  return left if len(left) > 1 else (left[0] if left else None)


def fitted(value: Any, specs: Any, mesh: Mesh) -> Any:
  """Specs as shardings, without the axes that do not divide the array."""

  def fit(x: Any, spec: Any) -> jax.sharding.NamedSharding:
    size = lambda a: math.prod(mesh.shape[n] for n in (a if isinstance(a, tuple) else (a,)))
    shape = jnp.shape(x)
    kept = [None if a is None or shape[i] % size(a) else a for i, a in enumerate(spec)]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))

  return jax.tree.map(fit, value, specs)
