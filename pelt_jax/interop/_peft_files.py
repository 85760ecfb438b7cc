"""The two files of a PEFT adapter, whatever method they hold."""

import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pelt_jax.models._safetensors import Entry, read_header, write

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Fields of every configuration that say nothing about the function.
COMMON = {
  "peft_type",
  "task_type",
  "auto_mapping",
  "base_model_name_or_path",
  "revision",
  "inference_mode",
  "peft_version",
  "runtime_config",
}


def write_folder(
  folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes both files under temporary names, then renames them."""
  folder.mkdir(parents=True, exist_ok=True)
  temporary = {name: folder / f".{name}.{os.getpid()}.new" for name in (TENSORS, CONFIG)}
  try:
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    write(temporary[TENSORS], shapes, tensors.__getitem__, {"format": "pt"})
    temporary[CONFIG].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name, path in temporary.items():
      os.replace(path, folder / name)
  finally:
    for path in temporary.values():
      path.unlink(missing_ok=True)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The fields of `adapter_config.json`.

  Raises:
    FileNotFoundError: if the file is missing.
    ValueError: if it is damaged or names no method.
  """
  file = folder / CONFIG
  if not file.is_file():
    raise FileNotFoundError(f"no PEFT adapter in {folder}: {CONFIG} is missing")
  try:
    raw = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(raw["peft_type"], str):
      raise TypeError(f"peft_type is {raw['peft_type']!r}")
  except (ValueError, KeyError, TypeError) as error:
    if isinstance(error, KeyError) and "config" in raw:
      raise ValueError(f"{file} is of AdapterHub: use pelt.interop.adapterhub.load") from None
    raise ValueError(f"{file} is damaged: {error!r}") from error
  return raw


class Tensors:
  """The tensors of an adapter, by name.

  Args:
    folder: holds the file.

  Raises:
    FileNotFoundError: if the file is missing.
    ValueError: if it is damaged.
  """

  def __init__(self, folder: pathlib.Path):
    self.file = folder / TENSORS
    if not self.file.is_file():
      other = [p.name for p in folder.glob("adapter_model*")]
      raise FileNotFoundError(f"{self.file} is missing (found: {other}); only safetensors are read")
    self.entries: dict[str, Entry] = read_header(self.file)

  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor.

    Raises:
      ValueError: if it has another shape.
    """
    if self.entries[name].shape != shape:
      raise ValueError(
        f"{self.file}: {name} has shape {self.entries[name].shape}, expected {shape} by the base "
        "model and the configuration"
      )
    return np.asarray(self.entries[name].read())


def complain(items: Iterable[str], what: str, strict: bool) -> None:
  """Raises, or warns where the caller asked for leniency."""
  items = list(items)
  if not items:
    return
  shown = "\n  ".join(items[:20]) + (f"\n  and {len(items) - 20} more" if len(items) > 20 else "")
  if strict:
    raise ValueError(f"{what} (strict=False passes over it):\n  {shown}")
  warnings.warn(f"{what}:\n  {shown}", stacklevel=4)
