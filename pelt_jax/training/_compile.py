"""Ahead-of-time compilation: one program per batch shape, with what it costs."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax


class Compiled:
  """A function compiled for each shape of one of its arguments.

  `jax.jit` would do, but tells neither how long it compiled nor what the program costs.

  Args:
    function: To be jitted.
    by: Index of the argument whose shapes vary; of the others only dtypes may.
    **options: Of `jax.jit`.

  Attributes:
    seconds: Spent compiling so far.
  """

  def __init__(self, function: Callable, by: int, **options: Any):
    self._jitted = jax.jit(function, **options)
    self._by = by
    self._programs: dict[Any, Any] = {}
    self.seconds = 0.0

  def __call__(self, *args: Any) -> Any:
    leaves, structure = jax.tree.flatten(args[self._by])
    dtypes = tuple(str(x.dtype) for x in jax.tree.leaves(args))
    key = structure, tuple(x.shape for x in leaves), dtypes
    if key not in self._programs:
      start = time.perf_counter()
      with warnings.catch_warnings():
        # The CPU of some versions cannot reuse donated buffers, which costs memory and no more.
        warnings.filterwarnings("ignore", message="Some donated buffers")
        self._programs[key] = self._jitted.lower(*args).compile()
      self.seconds += time.perf_counter() - start
    return self._programs[key](*args)

  def cost(self) -> dict[str, int | None]:
    """`flops` and `temp` (bytes besides arguments and results) of the largest program so far.

    XLA counts the body of a loop once, so scanned layers count as one.
    """
    flops, temp = [], []
    for program in self._programs.values():
      analysis = program.cost_analysis() or {}
      analysis = analysis[0] if isinstance(analysis, list) else analysis
      if "flops" in analysis:
        flops.append(int(analysis["flops"]))
      memory = program.memory_analysis()
      if memory is not None:
        temp.append(int(memory.temp_size_in_bytes))
    return {"flops": max(flops, default=None), "temp": max(temp, default=None)}
