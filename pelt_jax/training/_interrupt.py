"""SIGTERM, which schedulers send before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
  """The run was asked to stop (SIGTERM) and saved a checkpoint first.

  Attributes:
    step: Of the checkpoint.
  """

  def __init__(self, step: int):
    super().__init__(f"stopped by SIGTERM after step {step}, which is saved: resume to go on")
    self.step = step


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[int], bool]]:
  """Turns SIGTERM into a question that is asked between steps.

  Yields:
    `asked(step)`: whether to save and stop before this step. Several processes must all ask, step
    after step: one that got the signal tells the others, and all stop before the same step.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
    yield lambda step: False
    return
  came: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
  try:
    yield lambda step: bool(came)
  finally:
    signal.signal(signal.SIGTERM, before)
