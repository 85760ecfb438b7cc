"""Reads a compiled program's text: how often each instruction runs, and its FLOPs.

`cost_analysis()` counts the body of a loop once. Here it counts as often as it runs; where every
loop is said to run once, both counts agree (`aot_scale.py` notes the ratio).
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "bf16": 16}
_CALLED = re.compile(r"(?:calls|body|condition|\w+_computations?)=")
_ELEMENTWISE = re.compile(
  "abs|add|and|atan2|ceil|clamp|clz|compare|convert|divide|floor|maximum|minimum|multiply|negate|not"
  "|or|popcnt|real|imag|remainder|round-nearest-afz|round-nearest-even|select|shift-left"
  "|shift-right-arithmetic|shift-right-logical|sign|subtract|xor"
)


@dataclasses.dataclass
class Instruction:
  """One line: `%name = type opcode(operands), attributes`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  line: str

  @property
  def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array of the result."""
    return arrays(self.type)


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """`(dtype, shape)` of what is written as `bf16[2,3]{1,0:T(8,128)}`; no tokens, no contexts."""
  found = re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", text)
  return [(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found]


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
  bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
  return math.prod(shape) * bits // 8


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """Instructions by name, by computation; and the entry's name."""
  found, entry, current = {}, "", {}
  for line in text.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
      current = found.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?)\s([a-z][\w-]*)\((.*)", line):
      name, kind, opcode, rest = match.groups()
      operands = tuple(re.findall(r"%([\w.-]+)", rest.partition(")")[0]))
      current[name] = Instruction(name, kind, opcode, operands, line)
  if not entry:
    raise ValueError("no ENTRY computation: expected the text of a compiled program")
  return found, entry


def trips(loop: Instruction, near: dict[str, Instruction], found: dict) -> int:
  """How often a loop runs: what the compiler noted, or what its counter says.

  Args:
    loop: a `while`.
    near: the instructions of its computation.
    found: all computations.

  Raises:
    ValueError: it does not count from a constant in constant steps up to a constant.
  """
  if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.line):
    return int(known[1])
  condition, body = (
    found[re.search(rf"{n}=%?([\w.-]+)", loop.line)[1]] for n in ("condition", "body")
  )
  test = next((i for i in condition.values() if i.line.lstrip().startswith("ROOT")), None)
  try:
    if test.opcode != "compare" or "direction=LT" not in test.line:
      raise KeyError(test.opcode)
    counter, limit = (condition[o] for o in test.operands)
    slot = int(attribute(counter, "index"))
    root = next(i for i in body.values() if i.line.lstrip().startswith("ROOT"))
    added = body[root.operands[slot]]
    if added.opcode != "add":
      raise KeyError(added.opcode)
    step = next(body[o] for o in added.operands if body[o].opcode == "constant")
    start = source(near[loop.operands[0]].operands[slot], near)
    first, last, by = (int(attribute(i, "constant")) for i in (start, limit, step))
  except (KeyError, TypeError, StopIteration, IndexError) as error:
    raise ValueError(f"cannot tell how often {loop.name} runs") from error
  return -(-(last - first) // by)


def source(name: str, near: dict[str, Instruction]) -> Instruction:
  """The instruction of that name, or the one whose result it copies."""
  while near[name].opcode in ("copy", "bitcast"):
    name = near[name].operands[0]
  return near[name]


def attribute(instruction: Instruction, name: str) -> str | None:
  """The value of a numeric attribute, such as `channel_id`; a constant's is called `constant`."""
  line = instruction.line.replace("constant(", "constant=")
  found = re.search(rf"(?<=[ ,]){name}=(\d+)", line.partition("metadata=")[0])
  return found and found[1]


def _callees(instruction: Instruction) -> list[str]:
  """Computations that run when the instruction does; not those that a reduction applies."""
  called = re.compile(r"to_apply=") if instruction.opcode == "call" else _CALLED
  names = []
  for match in called.finditer(instruction.line):
    rest = instruction.line[match.end() :]
    group = re.match(r"\{([^}]*)\}", rest)
    names += re.findall(r"[\w.-]+", group[1] if group else rest.partition(",")[0])
  return names


def runs(text: str, loops: bool = True) -> Iterator[tuple[int, Instruction, dict]]:
  """Every instruction with how often it runs, and the instructions of its computation by name.

  A computation comes once for each place that calls it, after the caller's own instructions.

  Args:
    text: `compiled.as_text()`.
    loops: False counts each loop's body once, as `cost_analysis()` does.
  """
  found, entry = computations(text)

  def visit(name: str, times: int) -> Iterator[tuple[int, Instruction, dict]]:
    near = found[name]
    yield from ((times, i, near) for i in near.values())
    for i in near.values():
      if i.opcode.endswith(("-done", "-update")):
        continue  # names again what its start runs
      inner = times * (trips(i, near, found) if i.opcode == "while" and loops else 1)
      for callee in _callees(i):
        yield from visit(callee, inner)

  return visit(entry, 1)


def flops(text: str, loops: bool = True) -> dict[str, int]:
  """FLOPs of a run of the program on one device: of matrix products, and of all else.

  A product costs 2 per multiply-add, elementwise work 1 per number, a reduction 1 per number of
  its input: the convention of `cost_analysis()`, which counts no exponentials.
  """
  count = {"products": 0, "other": 0}
  for times, i, near in runs(text, loops):
    if i.opcode in ("convolution", "dot"):
      count["products"] += times * (_convolution if i.opcode == "convolution" else _dot)(i, near)
    elif _ELEMENTWISE.fullmatch(i.opcode):
      count["other"] += times * math.prod(i.arrays[0][1])
    elif i.opcode == "reduce" and i.operands:
      count["other"] += times * math.prod(near[i.operands[0]].arrays[0][1])
  return count


def _dot(i: Instruction, near: dict[str, Instruction]) -> int:
  left = near[i.operands[0]].arrays[0][1]
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.line)[1]
  depth = math.prod(left[int(d)] for d in contracted.split(",") if d)
  return 2 * math.prod(i.arrays[0][1]) * depth


def _convolution(i: Instruction, near: dict[str, Instruction]) -> int:
  """TPU programs write products as convolutions, batch axes as windows that meet one position."""
  left, right = (near[o].arrays[0][1] for o in i.operands[:2])
  result = i.arrays[0][1]
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.line)
  window = dict(
    re.findall(r"(\w+)=([\d_x-]+)", (re.search(r"window=\{(.*?)\}", i.line) or "  ")[1])
  )
  spatial = sorted(set(labels[1]) - {"b", "f"})
  total = 2 * result[labels[3].index("b")] * result[labels[3].index("f")]
  total *= right[labels[2].index("i")]

  def of(key: str, axis: int, default: int) -> int:
    return int(window[key].split("x")[axis]) if key in window else default

  for axis, digit in enumerate(spatial):
    size, stride = of("size", axis, 1), of("stride", axis, 1)
    before = int(window["pad"].split("x")[axis].partition("_")[0]) if "pad" in window else 0
    dilate, spread = of("lhs_dilate", axis, 1), of("rhs_dilate", axis, 1)
    length, outputs = left[labels[1].index(digit)], result[labels[3].index(digit)]
    total *= _meetings(size, stride, before, dilate, spread, length, outputs)
  return total


def _meetings(
  size: int, stride: int, before: int, dilate: int, spread: int, length: int, outputs: int
) -> int:
  """How many pairs of a window's element and an output touch an element of the input."""
  if size == 1 and dilate == 1 and before == 0:
    return outputs
  count = 0
  for o in range(outputs):
    for k in range(size):
      at = o * stride + k * spread - before
      count += at >= 0 and at % dilate == 0 and at // dilate < length
  return count
