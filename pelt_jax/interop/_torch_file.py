"""Reading the tensors of `torch.save`'s files, without torch.

Such a file is a zip archive of one pickle and the tensors' bytes. The pickle may name only the few
classes and functions that tensors are made of, and stand-ins here replace those: nothing else runs.
"""

import collections
import importlib
import pathlib
import pickle
import sys
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES: dict[str, Any] = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}


def read_torch_file(file: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a state dict, by name.

  Files in the format of before torch 1.6, no zip archives, are given to torch where it is
  installed, with `weights_only=True`.

  Raises:
    ValueError: if the file is damaged, holds anything but tensors, or needs torch.
  """
  if not zipfile.is_zipfile(file):
    return _old(file)
  try:
    with zipfile.ZipFile(file) as archive:
      found = _Unpickler(archive).load()
  except (pickle.UnpicklingError, zipfile.BadZipFile, *_DAMAGE) as error:
    raise ValueError(f"{file} is damaged or no file of tensors: {error}") from error
  return _checked(file, found)


# What broken bytes make the pickle machine raise.
_DAMAGE = (KeyError, IndexError, ValueError, TypeError, AttributeError, EOFError, MemoryError)


class _Unpickler(pickle.Unpickler):
  """Makes arrays of the archive's tensors, and refuses every other class."""

  def __init__(self, archive: zipfile.ZipFile):
    names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(names) != 1:
      raise pickle.UnpicklingError(f"the archive holds {len(names)} pickles, expected 1")
    self.archive, self.root = archive, names[0].removesuffix("data.pkl")
    order = f"{self.root}byteorder"
    big = order in archive.namelist() and archive.read(order) == b"big"
    self.swapped = big != (sys.byteorder == "big")
    super().__init__(archive.open(names[0]))

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if module == "torch" and name in _STORAGES:
      return np.dtype(_STORAGES[name])
    if module == "torch._utils" and name == "_rebuild_tensor_v2":
      return _tensor
    if module == "torch._utils" and name == "_rebuild_parameter":
      return _parameter
    raise pickle.UnpicklingError(f"it names {module}.{name}, which no state dict needs")

  def persistent_load(self, pid: Any) -> np.ndarray:
    kind, dtype, key, _, numel = pid
    info = self.archive.getinfo(f"{self.root}data/{key}")
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise pickle.UnpicklingError(f"it refers to a {kind!r}")
    # torch compresses nothing: a small file cannot stand for a huge tensor.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < numel * dtype.itemsize:
      raise pickle.UnpicklingError(f"the storage {key!r} is cut short or compressed")
    flat = np.frombuffer(self.archive.read(info), dtype, count=numel)
    return flat.byteswap() if self.swapped and dtype.itemsize > 1 else flat


def _tensor(
  storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *unused: Any
) -> np.ndarray:
  size = storage.dtype.itemsize
  strides = tuple(s * size for s in strides)
  # numpy checks that all of it lies in the buffer.
  return np.ndarray(tuple(shape), storage.dtype, storage, offset * size, strides)


def _parameter(value: np.ndarray, *unused: Any) -> np.ndarray:
  return value


def _old(file: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    torch: Any = importlib.import_module("torch")
  except ImportError:
    raise ValueError(
      f"{file} is cut short, or in the format of before torch 1.6, which only torch reads. Install "
      "torch, or write it anew where it is installed: "
      "torch.save(torch.load(file, weights_only=True), file)"
    ) from None
  try:
    found = torch.load(file, map_location="cpu", weights_only=True)
    return _checked(file, {name: _numpy(torch, value) for name, value in found.items()})
  except Exception as error:  # whatever a broken file makes torch raise
    raise ValueError(f"{file} is damaged or no file of tensors: {error}") from error


def _numpy(torch: Any, value: Any) -> np.ndarray:
  value = value.detach()
  if value.dtype == torch.bfloat16:
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return value.numpy()


def _checked(file: pathlib.Path, found: Any) -> dict[str, np.ndarray]:
  if not isinstance(found, dict) or not all(
    isinstance(k, str) and isinstance(v, np.ndarray) for k, v in found.items()
  ):
    raise ValueError(f"{file} holds a {type(found).__name__}, expected names and their tensors")
  return dict(found)
