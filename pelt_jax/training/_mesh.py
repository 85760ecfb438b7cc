"""Placing params and batches on a device mesh."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._linen_sites import sites
from pelt_jax._shardings import BATCH_AXES, Mesh, axes_of, entry_of, shardings
from pelt_jax._site import Site
from pelt_jax._walk import update_at, walk
from pelt_jax.training._step import TrainStep

P = jax.sharding.PartitionSpec

TENSOR = "model"  # the mesh axis that splits matrices
_AXES = (*BATCH_AXES, TENSOR)
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
    raise ValueError(
      f"mesh {text!r} needs {needed} devices, {found} found. Take smaller sizes; a CPU has "
      f"more with XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
    )
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  devices = jax.devices()[:needed]
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def base_specs(sites: tuple[Site, ...], mesh: Mesh) -> dict:
  """Partition specs of a model's plain params, from the roles of its sites.

  Kernels of `query`, `key`, `value` and `ffn_in` are P(fsdp, model), those of `attention_out` and
  `ffn_out` and the embedding P(model, fsdp), a head's P(None, model): its product runs for a chunk
  of positions at a time, each of which would bring an axis of `fsdp` together anew. Everything else
  is replicated.

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
    if len(site.shape) == 2 and "head" in roles:
      return P(*lead, None, tensor)
    return P()

  return update_at({}, {site.path: of(site) for site in sites if site.kind == "leaf"})


def model_shardings(mesh: Mesh) -> Callable[[Any, Any], dict]:
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
    ...   where = model_shardings(make_mesh("model=1"))
    ...   _, params = pelt.models.from_pretrained(folder, shardings=where)
    >>> params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].sharding.spec[1]
    'model'
  """

  def place(model: Any, shapes: Any) -> dict:
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    known = dict(walk(base_specs(sites(model, ids), mesh)))
    specs = {path: known.get(path, P()) for path, _ in walk(shapes)}
    return shardings(shapes, update_at({}, specs), mesh)

  return place


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
  """A batch whose rows are split over the mesh's batch axes.

  Raises:
    ValueError: The fields differ in their rows, or these do not divide.
  """
  arrays = {name: np.asarray(value) for name, value in batch.items()}
  shapes = {name: value.shape for name, value in arrays.items()}
  counts = {shape[:1] for shape in shapes.values()}
  if len(counts) != 1 or () in counts:
    raise ValueError(f"batch: expected fields with the same number of rows, got shapes {shapes}")
  axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
  parts, rows = math.prod(mesh.shape[name] for name in axes), counts.pop()[0]
  if rows % parts:
    sizes = ", ".join(f"{name}={mesh.shape[name]}" for name in axes)
    raise ValueError(
      f"batch of {rows} rows does not divide over {parts} devices ({sizes}): take a multiple"
    )
  sharding = jax.sharding.NamedSharding(mesh, P(axes) if axes else P())
  # Each process has the whole batch and copies the rows of its own devices.
  part = lambda value: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
  return {name: part(value) for name, value in arrays.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
  """The tree with all of every array on every device, which the host can then read."""
  return jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, P()))(tree)


def state_shardings(
  trainable: Any, state: Any, mesh: Mesh, *, moments: str | Sequence[str] = ()
) -> tuple[Any, Any]:
  """Where a step's results lie: what `jax.jit(step, out_shardings=...)` takes, without the metrics.

  An array of the state whose path ends in that of a trainable array of its shape lies as that one
  does (moments, AdaLoRA's means); every other is whole on every device (counters, factored
  moments). What lies in the host's memory (`pelt.paged`) stays there.

  Args:
    trainable: Placed arrays, or `jax.ShapeDtypeStruct`s with shardings.
    state: Arrays or shapes, of an optimizer and of a post-step.
    mesh: What `make_mesh` returned.
    moments: Mesh axes that arrays of the state are split along besides, those that follow a
      trainable one: the longest of their axes that still divides. Each device then updates its part
      and the updates are gathered, as in ZeRO's first stage (Rajbhandari et al. 2020,
      arXiv:1910.02054). With `("data", "fsdp")` each of n devices holds an n-th of them.

  Returns:
    The shardings of trainable, and those of the state.

  Raises:
    ValueError: The mesh has no such axis.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> mesh = make_mesh("data=1")
    >>> w = jax.device_put(jnp.ones((4, 2)), jax.sharding.NamedSharding(mesh, P()))
    >>> state = optax.adam(1e-3).init({"w": w})
    >>> at, below = state_shardings({"w": w}, state, mesh, moments=["data"])
    >>> [tuple(s.spec) for s in (at["w"], below[0].mu["w"], below[0].count)]
    [(), ('data', None), ()]
  """
  names = _checked(mesh, moments)
  known = {_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(trainable)}
  whole = jax.sharding.NamedSharding(mesh, P())

  def of(path: Any, x: Any) -> Any:
    like, at = _longest(known, _path(path)), getattr(x, "sharding", None)
    made = whole
    if like is not None and like.shape == x.shape:
      made = _split(like.sharding, x.shape, mesh, names)
    return made if at is None else made.with_memory_kind(at.memory_kind)

  return jax.tree.map(lambda x: x.sharding, trainable), jax.tree_util.tree_map_with_path(of, state)


def on_mesh(train: TrainStep, mesh: Mesh, *, moments: str | Sequence[str] = ()) -> TrainStep:
  """A train step for params on a mesh: its `init` puts the state there too.

  `fit` gives results the shardings of what they replace; in a loop of your own do so by
  `out_shardings`, or the second step compiles anew.

  Args:
    train: What `train_step` returned.
    mesh: As of `state_shardings`.
    moments: As of `state_shardings`.

  Raises:
    ValueError: The mesh has no such axis.
  """
  _checked(mesh, moments)

  def init(params: Any) -> tuple[Any, Any, Any]:
    trainable, frozen, state = train.init(params)
    _, at = state_shardings(trainable, state, mesh, moments=moments)
    return trainable, frozen, jax.device_put(state, at)

  return TrainStep(init, train.step)


def _checked(mesh: Mesh, moments: str | Sequence[str]) -> tuple[str, ...]:
  names = axes_of(moments)
  if unknown := [name for name in names if name not in mesh.shape]:
    raise ValueError(f"moments={names}: the mesh has axes {tuple(mesh.axis_names)}, not {unknown}")
  return names


def _path(keys: Any) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def _longest(known: dict[str, Any], path: str) -> Any:
  """What is known under the longest end of a path."""
  while path not in known:
    _, more, path = path.partition("/")
    if not more:
      return known.get("")
  return known[path]


def _split(
  sharding: jax.sharding.NamedSharding, shape: tuple[int, ...], mesh: Mesh, names: tuple[str, ...]
) -> jax.sharding.NamedSharding:
  """The sharding with the longest axis that divides split along `names` too, if one does."""
  axes = [axes_of(entry) for entry in sharding.spec]
  axes += [()] * (len(shape) - len(axes))
  more = tuple(n for n in names if not any(n in axis for axis in axes))
  parts = lambda axis: math.prod(mesh.shape[n] for n in axis)
  fits = [i for i, size in enumerate(shape) if size % parts((*axes[i], *more)) == 0]
  if not more or not fits:
    return sharding
  longest = max(fits, key=lambda i: shape[i])
  axes[longest] = (*axes[longest], *more)
  return jax.sharding.NamedSharding(mesh, P(*map(entry_of, axes)))
