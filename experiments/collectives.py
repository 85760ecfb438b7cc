"""What a compiled program moves between devices, read from its HLO text."""

import collections
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


class Move(NamedTuple):
  """One array that a device takes part in moving; tuples count one by one.

  Attributes:
    operation: one of `OPERATIONS`.
    dtype: as HLO writes it.
    shape: of what the device has afterwards.
    times: how often per run; a loop whose trip count is not known counts as one.
  """

  operation: str
  dtype: str
  shape: tuple[int, ...]
  times: int

  @property
  def bytes(self) -> int:
    """Of one of them."""
    bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
    return math.prod(self.shape) * bits // 8


def collectives(text: str) -> list[Move]:
  """All of a program, `compiled.as_text()`."""
  inside, called, entry = collections.defaultdict(list), collections.defaultdict(list), ""
  name, chained = "", set()
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
      name = head[2]
      entry = name if head[1] else entry
      continue
    inside[name] += _moves(line, chained)
    if re.search(r" async-(update|done)\(", line):  # names again what its start runs
      continue
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    for key, callees in re.findall(r"(\w+)=\{?((?:%[\w.-]+(?:, )?)+)", line):
      times = int(trips[1]) if trips and key == "body" else 1
      called[name] += [(callee, times) for callee in re.findall(r"%([\w.-]+)", callees)]
  return _run(entry, inside, called)


def _run(name: str, inside: dict, called: dict) -> list[Move]:
  below = (
    m._replace(times=m.times * times)
    for callee, times in called[name]
    for m in _run(callee, inside, called)
  )
  return [*inside[name], *below]


def _moves(line: str, chained: set[str]) -> list[Move]:
  match = re.search(rf"= (.*?) ({'|'.join(OPERATIONS)})(-start)?\(", line)
  if not match:
    return []
  channel = re.search(r"channel_id=(\d+)", line)
  if channel and "chain_id" in line:  # the steps of one that runs beside other work
    if channel[1] in chained:
      return []
    chained.add(channel[1])
  found = re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", match[1])
  if match[3] and match[2] != "all-reduce":  # operands come first
    found = found[len(found) // 2 :]
  shape = lambda dims: tuple(int(d) for d in dims.split(",") if d)
  return [Move(match[2], dtype, shape(dims), 1) for dtype, dims in found]


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
