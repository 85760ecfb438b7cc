"""What a compiled program moves between devices, read from its HLO text."""

import collections
from collections.abc import Iterable
from typing import NamedTuple

import hlo

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


class Move(NamedTuple):
  """One array that a device takes part in moving; tuples count one by one.

  Attributes:
    operation: one of `OPERATIONS`.
    dtype: as HLO writes it.
    shape: of what the device has afterwards.
    times: how often per run.
    gathers: an all-reduce that adds nothing up: each device's shard lies among zeros. XLA brings
      narrow shards together so.
  """

  operation: str
  dtype: str
  shape: tuple[int, ...]
  times: int
  gathers: bool = False

  @property
  def bytes(self) -> int:
    """Of one of them."""
    return hlo.bytes_of(self.dtype, self.shape)


def collectives(text: str) -> list[Move]:
  """All of a program, `compiled.as_text()`.

  Raises:
    ValueError: how often a loop runs cannot be told.
  """
  found, chained = [], set()
  for times, i, near in hlo.runs(text):
    operation = i.opcode.removesuffix("-start")
    if operation not in OPERATIONS:
      continue
    if "chain_id" in i.line:  # the steps of one that runs beside other work
      channel = hlo.attribute(i, "channel_id")
      if channel in chained:
        continue
      chained.add(channel)
    arrays, count = i.arrays, len(i.operands)
    if i.opcode.endswith("-start") and operation != "all-reduce":
      arrays = arrays[count : 2 * count]  # operands come first, contexts last
    for name, (dtype, shape) in zip(i.operands, arrays, strict=True):
      made = hlo.source(name, near).name if name in near else ""
      gathers = operation == "all-reduce" and "dynamic-update-slice" in made
      found.append(Move(operation, dtype, shape, times, gathers))
  return found


def traffic(moves: Iterable[Move]) -> dict[str, int]:
  """Bytes per run by operation: of results, on one device."""
  found: dict[str, int] = dict.fromkeys(OPERATIONS, 0)
  for move in moves:
    found[move.operation] += move.bytes * move.times
  return {operation: size for operation, size in found.items() if size}


def largest(moves: Iterable[Move]) -> dict[str, dict]:
  """By operation and dtype: how many there are in the program, and the bytes of the largest."""
  found = collections.defaultdict(list)
  for move in moves:
    found[f"{move.operation} {move.dtype}"].append(move.bytes)
  return {n: {"count": len(sizes), "largest": max(sizes)} for n, sizes in sorted(found.items())}
