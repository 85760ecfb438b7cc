"""The files of AdapterHub's folders: configurations and tensors of adapters, heads and fusions."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pelt_jax.interop._torch_file import read_torch_file
from pelt_jax.models._safetensors import read_header, write

VERSION = "adapters.1.3.0"  # whose format is written
SETUP = "adapter_setup.json"


class Kind(NamedTuple):
  """File names of one kind of module."""

  config: str
  tensors: str
  pickled: str


ADAPTER = Kind("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
HEAD = Kind("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
FUSION = Kind(
  "adapter_fusion_config.json",
  "model_adapter_fusion.safetensors",
  "pytorch_model_adapter_fusion.bin",
)
KINDS = (ADAPTER, HEAD, FUSION)


class Part(NamedTuple):
  """One module of a folder: its configuration and tensors."""

  config: dict[str, Any]
  tensors: dict[str, np.ndarray]


def read_json(file: pathlib.Path, *needed: str) -> dict[str, Any]:
  """A configuration, whose fields in `needed` are there.

  Raises:
    FileNotFoundError: if the file is missing.
    ValueError: if it is damaged.
  """
  if not file.is_file():
    raise FileNotFoundError(f"no files of AdapterHub in {file.parent}: {file.name} is missing")
  try:
    raw = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is damaged: {error}") from error
  if isinstance(raw, dict) and "peft_type" in raw:
    raise ValueError(f"{file} is of PEFT: use pelt.interop.peft.load")
  if not isinstance(raw, dict) or (gone := [k for k in needed if k not in raw]):
    raise ValueError(f"{file} is damaged: it lacks the fields {gone if raw else needed}")
  return raw


class Tensors:
  """The tensors of a module, by name.

  Args:
    folder: holds the file, as safetensors (which count if there are both) or as torch saves them.
    kind: of module.

  Raises:
    FileNotFoundError: if there is neither.
    ValueError: if the file is damaged.
  """

  def __init__(self, folder: pathlib.Path, kind: Kind):
    self.file = folder / kind.tensors
    self.values: dict[str, Any] = {}
    if self.file.is_file():
      self.values = {k: e.read() for k, e in read_header(self.file).items()}
    elif (folder / kind.pickled).is_file():
      self.file = folder / kind.pickled
      self.values = read_torch_file(self.file)
    else:
      raise FileNotFoundError(
        f"{folder} holds {kind.config}, but neither {kind.tensors} nor {kind.pickled}"
      )
    self.left = set(self.values)

  def read(self, name: str, shape: tuple[int, ...], why: str = "the base model") -> np.ndarray:
    """One tensor, which then counts as used.

    Raises:
      ValueError: if it is missing or has another shape.
    """
    if name not in self.values:
      near = [k for k in self.values if k.rpartition(".")[0] == name.rpartition(".")[0]]
      raise ValueError(f"{self.file} lacks the tensor {name} {shape} (beside it: {near[:3]})")
    self.left.discard(name)
    value = np.asarray(self.values[name])
    if value.shape != shape:
      raise ValueError(
        f"{self.file}: {name} has shape {value.shape}, expected {shape} by the configuration and "
        f"{why}"
      )
    return value

  @property
  def dtype(self) -> Any:
    """The widest dtype of all that JAX allows."""
    return jax.dtypes.canonicalize_dtype(np.result_type(*(v.dtype for v in self.values.values())))


def write_parts(folder: pathlib.Path, parts: Mapping[Kind, Part]) -> None:
  """Writes a folder's files under temporary names, then renames them.

  Raises:
    FileExistsError: if files of another export lie there, which would go on being read.
  """
  refuse_stale(folder, parts)
  folder.mkdir(parents=True, exist_ok=True)
  temporary: dict[str, pathlib.Path] = {}
  try:
    for kind, part in parts.items():
      for name in (kind.tensors, kind.config):
        temporary[name] = folder / f".{name}.{os.getpid()}.new"
      shapes = {name: (value.shape, value.dtype) for name, value in part.tensors.items()}
      write(temporary[kind.tensors], shapes, part.tensors.__getitem__, {"format": "pt"})
      text = json.dumps(part.config, indent=2, sort_keys=True) + "\n"
      temporary[kind.config].write_text(text, encoding="utf-8")
    for name, path in temporary.items():
      os.replace(path, folder / name)
  finally:
    for path in temporary.values():
      path.unlink(missing_ok=True)


def refuse_stale(folder: pathlib.Path, parts: Mapping[Kind, Any]) -> None:
  """Raises if a folder holds files that would stay beside the new ones and be read for them."""
  if folder.exists() and not folder.is_dir():
    raise FileExistsError(f"{folder} is a file")
  stale = [k.pickled for k in KINDS if (folder / k.pickled).exists()]
  stale += [k.tensors for k in KINDS if k not in parts and (folder / k.tensors).exists()]
  if stale:
    raise FileExistsError(
      f"{folder} holds {stale} of an earlier adapter, which AdapterHub would read with the new "
      "files or instead of them; remove them, or choose another folder"
    )
