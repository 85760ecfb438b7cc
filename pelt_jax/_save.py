"""Adapter folders: `adapter.json` (structure) and a safetensors file (arrays).

The JSON names node classes (looked up in a registry, never imported), static fields, where each
array is, and a fingerprint of every leaf of the base, so that an adapter never runs on another.
"""

import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from pelt_jax._host import on_host
from pelt_jax._leaf import innermost
from pelt_jax._node import REGISTRY, Node, Weight, strip
from pelt_jax._walk import get_at, update_at, walk

_INDEX = "adapter.json"
_VERSION = 1


def save(folder: str | os.PathLike, params: dict) -> None:
  """Saves what a method added to params: nodes, their static fields and their arrays.

  An existing adapter in the folder is replaced in one step: a crash leaves the old or the new one.
  Of several processes (`jax.distributed`) all call this, and the first writes.

  Args:
    folder: made if absent.
    params: params with nodes.

  Raises:
    ValueError: if params hold no node.
    OSError: if the folder cannot be written; a previous adapter is then intact.

  Example:
    >>> import tempfile, jax.numpy as jnp, pelt_jax as pelt
    >>> base = {"bias": jnp.zeros(2), "kernel": jnp.ones((2, 2))}
    >>> params = {**base, "bias": pelt.nodes.Tuned(jnp.array([1.0, 2.0]))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pelt.save(folder, params)
    ...   print(pelt.load(folder, base)["bias"].value)
    [1. 2.]
  """
  arrays: dict[str, np.ndarray] = {}
  nodes, leaves = {}, {}
  for path, value in walk(params):
    if isinstance(value, Node):
      nodes[path] = _describe(value, path, arrays, leaves, path)
    else:
      leaves[path] = value
  if not nodes:
    raise ValueError("params hold no nodes, so there is no adapter to save; was it merged already?")
  base = {path: _identity(leaf) for path, leaf in leaves.items()}
  if jax.process_index() > 0:
    return
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  _write(folder, {"format": "pelt_jax", "version": _VERSION, "nodes": nodes, "base": base}, arrays)


def load(folder: str | os.PathLike, base: dict) -> dict:
  """Params with the saved nodes over `base`, bit for bit; needs neither model nor sites.

  Args:
    folder: what `save` wrote.
    base: the plain params the adapter was made for; or those quantized as they were then.

  Returns:
    Params with nodes.

  Raises:
    FileNotFoundError: if there is no adapter in the folder.
    ValueError: if a file is damaged, a node class is unknown, or a base leaf is missing, has
      another shape or another value; the leaf is named. Another dtype only warns.
  """
  from safetensors import SafetensorError, safe_open

  if isinstance(folder, Mapping):
    raise TypeError("load takes (folder, base); the first argument is a tree: are they swapped?")
  folder = pathlib.Path(folder)
  nodes = ((path, value) for path, value in walk(base) if isinstance(value, Node))
  if held := [path for path, node in nodes if "derived" not in node.kinds.values()]:
    raise ValueError(f"base holds nodes at {held[:4]}; pass the plain params of the model")
  index = _read_index(folder)
  known = {path for path, _ in walk(base)}
  have = set(index["base"]) | set(index["nodes"])
  extra = sorted(known - have)
  if extra:
    raise ValueError(f"{folder} was saved for another base: that one had no leaf {extra[:5]}")
  others = [p for p, i in index["base"].items() if _other_dtype(folder, p, i, get_at(base, p))]
  if others:
    was, now = index["base"][others[0]]["dtype"], strip(get_at(base, others[0])).dtype
    warnings.warn(
      f"{others[0]!r} was {was} when the adapter was saved and is {now} now, as {len(others) - 1} "
      "other leaves: outputs will differ a little, and their values were not compared",
      stacklevel=2,
    )
  try:
    with safe_open(folder / index["tensors"], framework="flax") as file:
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{folder / index['tensors']} is missing or damaged: {error}") from error
  built = {
    path: _build(node, path, arrays, get_at(base, path)) for path, node in index["nodes"].items()
  }
  for path, node in built.items():
    below = get_at(base, path)
    if below is not None and isinstance(node, Weight) and node.shape != strip(below).shape:
      raise ValueError(
        f"{folder} was saved for another base: its {path!r} has shape {node.shape}, here it has "
        f"{strip(below).shape}"
      )
  return update_at(base, built)


def fingerprint(leaf: Any) -> jax.Array:
  """A position-weighted uint32 sum of an array's words, the same on any sharding."""
  return _fingerprint(strip(leaf))


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = jnp.asarray(x, jnp.uint8)
  width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jnp.asarray(jax.lax.bitcast_convert_type(x, width), jnp.uint32).reshape(-1)
  weights = jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
  # A plain weighted sum would not see an even number of flipped sign bits, so words are mixed.
  mixed = words * (weights | jnp.uint32(1)) + weights
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(3266489917)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _identity(leaf: Any) -> dict:
  leaf = strip(leaf)
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": int(_fingerprint(leaf))}


def _other_dtype(folder: pathlib.Path, path: str, identity: dict, leaf: Any) -> bool:
  """Whether a leaf of the base has another dtype than when saved; raises if it is another leaf."""
  if leaf is None:
    raise ValueError(f"{folder} was saved for another base: this one has no leaf {path!r}")
  if isinstance(leaf, Node):
    raise ValueError(
      f"{folder} was saved for a base with a plain {path!r}, which is a {type(leaf).__name__} here"
    )
  leaf = strip(leaf)
  if list(leaf.shape) != identity["shape"]:
    raise ValueError(
      f"{folder} was saved for another base: {path!r} had shape {identity['shape']}, here it has "
      f"{list(leaf.shape)}"
    )
  if str(leaf.dtype) != identity["dtype"]:
    return True
  if int(_fingerprint(leaf)) != identity["sum"]:
    raise ValueError(
      f"{folder} was saved for another base: {path!r} holds other values. Load the base that the "
      "adapter was trained on"
    )
  return False


def _describe(node: Node, path: str, arrays: dict, leaves: dict, at: str) -> dict:
  """The JSON of a node; its arrays and base leaves are collected on the way."""

  def entry(name: str, value: Any, kind: str, at: str) -> Any:
    if value is None:
      return None
    if isinstance(value, Node):
      return {"node": _describe(value, path, arrays, leaves, at)}
    if type(value) is tuple:
      return {"tuple": [entry(name, v, kind, f"{at}/{i}") for i, v in enumerate(value)]}
    if kind == "base":
      leaves[path] = value
      return "base"
    if kind == "derived":
      return "derived"
    arrays[at] = on_host(strip(value))
    box = {"box": list(value.names)} if meta.is_axis_metadata(value) else {}
    return {"array": at, **box}

  fields = {n: entry(n, v, node.kinds[n], f"{at}/{n}") for n, v in node.children()}
  statics = {n: getattr(node, n) for n, k in node.kinds.items() if k == "static"}
  return {"type": type(node).__name__, "static": statics, "fields": fields}


def _build(node: dict, path: str, arrays: dict, below: Any) -> Node:
  if node["type"] not in REGISTRY:
    raise ValueError(
      f"{path!r} holds a {node['type']}, which is not a known node class; import the module that "
      f"defines it first. Known: {sorted(REGISTRY)}"
    )
  cls = REGISTRY[node["type"]]

  def value(entry: Any) -> Any:
    if entry is None or entry == "derived":
      return None
    if entry == "base":
      if below is None:
        raise ValueError(f"the adapter has a node over {path!r}, and the base has no such leaf")
      return below
    if "node" in entry:
      return _build(entry["node"], path, arrays, below)
    if "tuple" in entry:
      return tuple(value(e) for e in entry["tuple"])
    if entry["array"] not in arrays:
      raise ValueError(f"the adapter's tensors lack {entry['array']!r}")
    array = arrays[entry["array"]]
    if "box" in entry:
      return meta.replace_boxed(_box(below), array).replace(names=tuple(entry["box"]))
    return array

  fields = {n: value(e) for n, e in node["fields"].items()}
  built = cls(**fields, **{n: _static(v) for n, v in node["static"].items()})
  if any(e == "derived" for e in node["fields"].values()):
    if below is None:
      raise ValueError(f"the adapter has a node over {path!r}, and the base has no such leaf")
    try:
      built = built.rebuild(below)
    except ValueError as error:
      raise ValueError(f"the adapter was saved for another base: {path!r}: {error}") from error
  return built


def _box(below: Any) -> Any:
  below = innermost(below)
  if not meta.is_axis_metadata(below):
    raise ValueError(
      "the adapter was saved from boxed params; pass a base boxed likewise, or save unboxed"
    )
  return below


def _static(value: Any) -> Any:
  return tuple(_static(v) for v in value) if isinstance(value, list) else value


def _read_index(folder: pathlib.Path) -> dict:
  path = folder / _INDEX
  if not path.is_file():
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"no adapter in {folder}: {_INDEX} is missing (found: {found})")
  try:
    index = json.loads(path.read_text())
    version = index["version"] if index["format"] == "pelt_jax" else None
    _ = version == _VERSION and (index["nodes"], index["base"], index["tensors"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if version != _VERSION:
    raise ValueError(f"{path} has version {version}; this library reads version {_VERSION}")
  return index


def _write(folder: pathlib.Path, index: dict, arrays: dict[str, np.ndarray]) -> None:
  """Tensors go under a name of their own; renaming the JSON that names them makes the switch."""
  from safetensors.numpy import save as to_bytes

  # not ascontiguousarray, which makes a () array (1,)
  data = to_bytes({k: np.asarray(v, order="C") for k, v in arrays.items()}, {"format": "pelt_jax"})
  name = f"adapter-{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
  replace_file(folder / name, data)
  replace_file(folder / _INDEX, json.dumps({**index, "tensors": name}, indent=1).encode())
  for old in folder.glob("adapter-*.safetensors"):
    if old.name != name:
      old.unlink()


def replace_file(path: pathlib.Path, data: bytes) -> None:
  """Writes a file under a temporary name, then renames it: never half-written."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
