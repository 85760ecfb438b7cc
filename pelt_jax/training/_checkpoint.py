"""Checkpoints of a run: arrays through orbax, everything else in a JSON file beside them.

Orbax keeps arrays only: node types, static fields and names are in the JSON, and are compared
before any array is read, so that a checkpoint never lands in a run of another method. Both parts
appear by one rename; whatever interrupts a save leaves the checkpoint before it as it was.

The JSON also has a sum over the bits of every array, the same on any mesh: what is restored must
have it. Arrays are copied to the host when a save begins and written while training goes on; until
that is done, the checkpoint before is the last. Each process writes and reads the shards that it
holds, so the folder lies where all processes reach it.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from pelt_jax._node import Node
from pelt_jax._save import fingerprint

_SLACK = 1 << 16  # bytes that the metadata of a checkpoint takes, at least


class CheckpointMismatch(ValueError):
  """The checkpoint was made by a run with another method or other options."""


class Checkpoints:
  """A folder of checkpoints, written in the background; the last may be restored on another mesh.

  Several processes of one run must all take part in each call.

  Args:
    folder: Made if missing.
    options: What a resumed run must agree on, as JSON (method, batch size, seed, …).
    keep: How many checkpoints to keep.

  Raises:
    NotADirectoryError: `folder` is a file.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> checkpoints = Checkpoints(tempfile.mkdtemp())
    >>> checkpoints.save(7, {"w": jnp.arange(3)}, {"note": "half way"})
    >>> checkpoints.wait()
    >>> step, tree, meta = checkpoints.restore({"w": jnp.zeros(3, int)})
    >>> step, tree["w"].tolist(), meta
    (7, [0, 1, 2], {'note': 'half way'})
  """

  def __init__(self, folder: str | os.PathLike, options: dict | None = None, keep: int = 2):
    self._folder = pathlib.Path(folder).absolute()
    if self._folder.exists() and not self._folder.is_dir():
      raise NotADirectoryError(f"folder={str(folder)!r} is a file: name a folder, or a new one")
    self._options = json.loads(json.dumps(options or {}))  # as it comes back: tuples are lists
    self._writing: int | None = None
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
      ),
    )

  def latest(self) -> int | None:
    """The step of the last checkpoint that is known to be complete."""
    return max((n for n in self._manager.all_steps() if n != self._writing), default=None)

  def save(self, step: int, tree: Any, meta: dict) -> None:
    """Begins to write a checkpoint, once the one before is written.

    Args:
      step: Its number.
      tree: A pytree of arrays; nodes and holes are fine. What becomes of them later is no matter.
      meta: Anything that JSON can hold.

    Raises:
      OSError: This one or the one before could not be written (a full disk, say); earlier
        checkpoints are as they were.
    """
    self.wait()
    sidecar = {"options": self._options, "structure": structure(tree), "meta": meta}
    arrays = {_name(i): _plain(x) for i, x in enumerate(jax.tree.leaves(tree))}
    self._check_space(step, sum(x.nbytes for x in arrays.values()))
    sidecar["sums"] = _sums(arrays)
    self._writing = step
    with self._named(step):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays), sidecar=ocp.args.JsonSave(sidecar)
        ),
        force=True,
      )

  def wait(self) -> None:
    """Waits until what was saved is written.

    Raises:
      OSError: It could not be written; earlier checkpoints are as they were.
    """
    if self._writing is not None:
      with self._named(self._writing):
        self._manager.wait_until_finished()
      self._writing = None

  @contextlib.contextmanager
  def _named(self, step: int) -> Iterator[None]:
    """Errors that say which checkpoint failed and which is left."""
    try:
      yield
    except Exception as error:
      for left in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
      full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
      failed = self._failed(step, "the disk is full" if full else str(error))
      self._writing = None
      raise failed from error

  def _check_space(self, step: int, size: int) -> None:
    free = shutil.disk_usage(self._folder).free
    if jax.process_count() > 1:  # all save, or none
      free = float(multihost_utils.process_allgather(np.float32(free)).min())
    if free < size + _SLACK:
      raise self._failed(
        step, f"the disk is full: {free / 1e6:.1f} MB are free, {size / 1e6:.1f} MB needed"
      )

  def _failed(self, step: int, why: str) -> OSError:
    last, full = self.latest(), "disk is full" in why
    kept = "there is none before it" if last is None else f"that of step {last} is intact"
    return OSError(
      errno.ENOSPC if full else errno.EIO,
      f"the checkpoint of step {step} could not be written ({why}); {kept}. "
      + ("Free some space and resume" if full else "Start again, and resume"),
      str(self._folder),
    )

  def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict]:
    """Reads a checkpoint.

    Args:
      like: A tree of the same structure, as a new run has it at its start; arrays are placed as its
        arrays are.
      step: Which; None takes the last.

    Returns:
      The step, the tree, and what was given as `meta`.

    Raises:
      FileNotFoundError: There is no checkpoint.
      CheckpointMismatch: Options, nodes, static fields, shapes or dtypes differ; names the first.
      OSError: The checkpoint is damaged; names the one before it.
    """
    self.wait()
    step = self.latest() if step is None else step
    if step is None:
      raise FileNotFoundError(f"{self._folder}: there is no checkpoint to resume from")
    if step not in (there := sorted(self._manager.all_steps())):
      raise FileNotFoundError(
        f"{self._folder}: there is no checkpoint of step {step}, but of {there}"
      )
    with self._readable(step):
      sidecar = self._manager.restore(
        step, args=ocp.args.Composite(sidecar=ocp.args.JsonRestore())
      )["sidecar"]
    now = structure(like)
    _compare(self._folder / str(step), sidecar, self._options, now)
    leaves, treedef = jax.tree.flatten(like)
    targets = {_name(i): _target(x) for i, x in enumerate(leaves)}
    with self._readable(step):
      arrays = self._manager.restore(
        step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
      )["arrays"]
      _check_sums(sidecar.get("sums"), arrays, list(now["arrays"]))
    restored = [_like(arrays[_name(i)], x) for i, x in enumerate(leaves)]
    return step, jax.tree.unflatten(treedef, restored), sidecar["meta"]

  @contextlib.contextmanager
  def _readable(self, step: int) -> Iterator[None]:
    """Errors that say which checkpoint is damaged and which to take instead."""
    try:
      yield
    except Exception as error:
      where, first = self._folder / str(step), str(error).strip().partition("\n")[0]
      before = max((n for n in self._manager.all_steps() if n < step), default=None)
      rest = "to start anew" if before is None else f"to resume from that of step {before}"
      raise OSError(
        errno.EIO, f"the checkpoint {where} is damaged ({first[:300]}); remove it {rest}"
      ) from error

  def close(self) -> None:
    """Ends background work; raises as `wait` does."""
    self.wait()
    self._manager.close()


def structure(tree: Any) -> dict[str, Any]:
  """What a tree is besides its numbers: nodes with static fields, and arrays, by path.

  Args:
    tree: Any pytree.

  Returns:
    `{"nodes": {path: [type, {static field: text}]}, "arrays": {path: [shape, dtype]}}`, as JSON.
  """
  nodes = {}

  def visit(value: Any, path: str) -> None:
    if isinstance(value, Node):
      fields = {n: repr(getattr(value, n)) for n, k in value.kinds.items() if k == "static"}
      nodes[path] = [type(value).__name__, fields]
      for name, child in value.children():
        visit(child, f"{path}.{name}")
    else:  # one level at a time, so that nodes inside nodes are seen
      below = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value)[0]
      for key, child in below:
        if key:
          visit(child, path + jax.tree_util.keystr(key))

  visit(tree, "")
  found = jax.tree_util.tree_flatten_with_path(tree)[0]
  arrays = {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in found}
  return {"nodes": nodes, "arrays": arrays}


def _compare(where: pathlib.Path, saved: dict, options: dict, now: dict) -> None:
  differences = []
  for kind, before, after in (
    ("option", saved["options"], options),
    ("node", saved["structure"]["nodes"], now["nodes"]),
    ("array", saved["structure"]["arrays"], now["arrays"]),
  ):
    for name in sorted(before.keys() | after.keys()):
      a, b = before.get(name), after.get(name)
      if a != b:
        differences.append(f"{kind} {name}: saved {_show(a)}, now {_show(b)}")
  if differences:
    more = f"\n  … and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise CheckpointMismatch(
      f"{where} was made by another run; resume with the same method and options, or start anew "
      "in another folder:\n  " + "\n  ".join(differences[:5]) + more
    )


def _show(value: Any) -> str:
  return "nothing" if value is None else repr(value)


def _name(i: int) -> str:
  return f"{i:06d}"


def _is_key(x: Any) -> bool:
  return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
  if _is_key(x):
    x = jax.random.key_data(x)
  # What each of several processes has for itself is the same in all, and no array of all of them.
  shared = isinstance(x, jax.Array) and not (jax.process_count() > 1 and x.is_fully_addressable)
  return x if shared else np.asarray(x)


def _sums(arrays: dict[str, Any]) -> dict[str, int]:
  def on_device(x: Any) -> Any:
    if isinstance(x, jax.Array) and x.sharding.memory_kind == "pinned_host":
      return jax.device_put(x, x.sharding.with_memory_kind("device"))
    return x

  # One after the other: of sums over devices in flight at once, virtual devices of a CPU lose some.
  jax.block_until_ready(arrays)
  return {name: int(fingerprint(on_device(x))) for name, x in arrays.items()}


def _check_sums(saved: dict[str, int] | None, arrays: dict[str, Any], paths: list[str]) -> None:
  if saved is None:  # an older checkpoint
    return
  for path, (name, found) in zip(paths, sorted(_sums(arrays).items()), strict=True):
    if saved[name] != found:
      raise ValueError(f"the bits of {path} are not those that were saved")


def _target(x: Any) -> Any:
  x = _plain(x)
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x


def _like(value: Any, x: Any) -> Any:
  if isinstance(x, jax.Array):
    value = jnp.asarray(value)
  return jax.random.wrap_key_data(value, impl=jax.random.key_impl(x)) if _is_key(x) else value
