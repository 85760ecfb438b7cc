"""Placing params and batches on a device mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._linen_sites import sites
from pelt_jax._shardings import shardings
from pelt_jax._site import Site
from pelt_jax._walk import update_at, walk

P = jax.sharding.PartitionSpec

TENSOR, BATCH = "model", ("data", "fsdp")  # names of mesh axes: matrices, and rows of a batch
_AXES = (*BATCH, TENSOR)
_OUT = ("query", "key", "value", "ffn_in")  # split by output features, so that nothing is summed
_IN = ("attention_out", "ffn_out", "embedding")  # split by input features (a table: by ids)


def make_mesh(text: str) -> jax.sharding.Mesh:
  """A mesh from `"data=2,model=4"`.

  Args:
    text: Axes with their sizes: `data` copies params, `fsdp` spreads them, both split the batch;
      `model` splits matrices.

  Raises:
    ValueError: An axis is unknown, a size is no positive number, or devices are missing.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.strip().partition("=")
    if name not in _AXES or not size.isdigit() or int(size) < 1 or name in sizes:
      raise ValueError(
        f"mesh {text!r}: expected sizes of {', '.join(_AXES)}, as in data=2,model=4; got {part!r}"
      )
    sizes[name] = int(size)
  needed, found = math.prod(sizes.values()), jax.device_count()
  if needed > found:
    raise ValueError(f"mesh {text!r} needs {needed} devices, {found} found")
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  devices = jax.devices()[:needed]
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def base_specs(sites: tuple[Site, ...], mesh: jax.sharding.Mesh) -> dict:
  """Partition specs of a model's plain params, from the roles of its sites.

  Kernels of `query`, `key`, `value` and `ffn_in` are P(fsdp, model), those of `attention_out` and
  `ffn_out` and the embedding P(model, fsdp); everything else is replicated.

  Args:
    sites: What `pelt.sites` returned.
    mesh: What `make_mesh` returned.
  """
  tensor, fsdp = (name if name in mesh.shape else None for name in (TENSOR, "fsdp"))

  def of(site: Site) -> P:
    roles = {served.role for served in site.roles}
    lead = (None,) * len(site.stacked)
    if len(site.shape) == 2 and roles & set(_OUT):
      return P(*lead, fsdp, tensor)
    if len(site.shape) == 2 and roles & set(_IN):
      return P(*lead, tensor, fsdp)
    return P()

  return update_at({}, {site.path: of(site) for site in sites if site.kind == "leaf"})


def on_mesh(mesh: jax.sharding.Mesh) -> Callable[[Any, Any], dict]:
  """Where a model's parameters lie on the mesh, for `from_pretrained(shardings=...)`.

  Args:
    mesh: What `make_mesh` returned.

  Returns:
    `(model, shapes) -> shardings`, those that `pelt.shardings` gives for `base_specs`.

  Example:
    >>> import tempfile, jax, pelt_jax as pelt
    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    >>> sizes |= {"num_hidden_layers": 1, "vocab_size": 32, "model_type": "llama"}
    >>> tiny = pelt.models.from_config(sizes)
    >>> params = tiny.init(jax.random.key(0), jax.numpy.ones((1, 2), int))["params"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pelt.models.save_pretrained(folder, tiny, params)
    ...   where = on_mesh(make_mesh("model=1"))
    ...   _, params = pelt.models.from_pretrained(folder, shardings=where)
    >>> params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].sharding.spec
    PartitionSpec(None, 'model')
  """

  def place(model: Any, shapes: Any) -> dict:
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    known = dict(walk(base_specs(sites(model, ids), mesh)))
    specs = {path: known.get(path, P()) for path, _ in walk(shapes)}
    return shardings(shapes, update_at({}, specs), mesh)

  return place


def place_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """A batch whose rows are split over the mesh's batch axes.

  Raises:
    ValueError: The rows do not divide.
  """
  axes = tuple(name for name in BATCH if name in mesh.shape)
  parts = math.prod(mesh.shape[name] for name in axes)
  rows = len(batch["input_ids"])
  if rows % parts:
    raise ValueError(f"batch of {rows} rows does not divide over {parts} devices ({axes})")
  sharding = jax.sharding.NamedSharding(mesh, P(axes) if axes else P())
  # Each process has the whole batch and copies the rows of its own devices.
  part = lambda value: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
  return {name: part(np.asarray(value)) for name, value in batch.items()}


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The tree with all of every array on every device, which the host can then read."""
  return jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, P()))(tree)
