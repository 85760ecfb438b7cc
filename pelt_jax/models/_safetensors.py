"""Reading and writing safetensors one tensor at a time.

The format is a JSON header and one block of bytes. Reading maps the file into memory, so a tensor
costs nothing until it is touched; writing streams, so no second copy of a model is ever made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_CODES = {np.dtype(v): k for k, v in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one tensor lies."""

  file: Path
  shape: tuple[int, ...]
  dtype: np.dtype
  offset: int

  def read(self) -> np.ndarray:
    """The tensor, mapped into memory and read only."""
    if 0 in self.shape:
      return np.empty(self.shape, self.dtype)
    return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

  def part(self, index: Sequence[slice]) -> np.ndarray:
    """A slice of the tensor, one slice per axis without steps: only its bytes are asked for."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
    out = np.empty(tuple(stop - start for start, stop in bounds), self.dtype)
    if not out.size:
      return out
    # Axes that are taken whole lie together with the one before them: one read brings them all.
    axis = out.ndim
    while axis > 0 and out.shape[axis - 1] == self.shape[axis - 1]:
      axis -= 1
    outer = max(axis - 1, 0)
    strides = [self.dtype.itemsize * math.prod(self.shape[i + 1 :]) for i in range(out.ndim)]
    first = self.offset + sum(b[0] * s for b, s in zip(bounds, strides, strict=True))
    target = out.reshape(-1).view(np.uint8).data
    run = len(target) // math.prod(out.shape[:outer])
    with self.file.open("rb", buffering=0) as file:
      for n, at in enumerate(np.ndindex(out.shape[:outer])):
        offset = first + sum(i * s for i, s in zip(at, strides[:outer], strict=True))
        _read_into(file.fileno(), target[n * run : (n + 1) * run], offset, self.file)
    return out


def _read_into(descriptor: int, target: memoryview, offset: int, file: Path) -> None:
  while len(target):  # the system gives 2 GB at a time
    got = os.preadv(descriptor, [target], offset)
    if not got:
      raise ValueError(f"{file} became shorter while it was read: it ends at byte {offset}")
    target, offset = target[got:], offset + got


def read_header(file: Path) -> dict[str, Entry]:
  """Lists the tensors of a safetensors file.

  Raises:
    ValueError: the file is cut short, is no safetensors file, or holds an unknown dtype.
  """
  size = file.stat().st_size
  with file.open("rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
      raise ValueError(
        f"{file} is truncated or no safetensors file: {size} bytes, but its header alone says "
        f"{length}. Download it again."
      )
    try:
      header = json.loads(f.read(length))
    except ValueError as error:
      raise ValueError(f"{file} is no safetensors file: its header is not JSON") from error
  entries = {}
  start = 8 + length
  for name, item in header.items():
    if name == "__metadata__":
      continue
    if item["dtype"] not in _DTYPES:
      raise ValueError(f"{file}: {name} has dtype {item['dtype']}; known: {', '.join(_DTYPES)}")
    shape, dtype = tuple(item["shape"]), np.dtype(_DTYPES[item["dtype"]])
    begin, end = item["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
      raise ValueError(f"{file}: {name} has {end - begin} bytes for {dtype} of shape {shape}")
    if start + end > size:
      raise ValueError(
        f"{file} is truncated: {name} ends at byte {start + end}, the file at {size}. "
        "Download it again."
      )
    entries[name] = Entry(file, shape, dtype, start + begin)
  return entries


def write(
  file: Path,
  shapes: Mapping[str, tuple[tuple[int, ...], Any]],
  get: Callable[[str], np.ndarray],
  metadata: Mapping[str, str],
) -> None:
  """Writes a safetensors file, tensor by tensor, under a temporary name and then renames it.

  Args:
    file: the target.
    shapes: shape and dtype of every tensor.
    get: gives a tensor by name; called once each, in order.
    metadata: string pairs for the header.
  """
  header: dict[str, Any] = {"__metadata__": dict(metadata)}
  offset = 0
  # Widest dtypes first, as the reference writer does: every tensor is then aligned.
  order = sorted(shapes, key=lambda n: (-np.dtype(shapes[n][1]).itemsize, n))
  for name in order:
    shape, dtype = shapes[name]
    size = math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": _CODES[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [offset, offset + size],
    }
    offset += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)

  def chunks() -> Iterable[Any]:
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
      # Bytes and not the array itself: bfloat16 knows no buffer protocol.
      yield np.ascontiguousarray(get(name)).reshape(-1).view(np.uint8).data

  write_atomically(file, chunks())


def write_atomically(file: Path, chunks: Iterable[Any]) -> None:
  """Writes bytes to a temporary name beside `file`, then renames: readers see all or nothing."""
  temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("wb") as f:
      for chunk in chunks:
        f.write(chunk)
    os.replace(temporary, file)
  finally:
    temporary.unlink(missing_ok=True)
