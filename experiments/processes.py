"""Starts one command in several processes on this machine, as a scheduler would on several."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


class Processes:
  """Processes that find each other.

  Args:
    command: Of Python, without the interpreter.
    count: How many processes; a single one is told of no others.
    devices: Virtual CPU devices of each.
    **settings: More environment variables.
  """

  def __init__(self, command: list[str], count: int, devices: int = 1, **settings: str):
    paths = (str(REPOSITORY), os.environ.get("PYTHONPATH"))
    shared = os.environ | {
      "PYTHONPATH": os.pathsep.join(filter(None, paths)),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      **settings,
    }
    address = f"127.0.0.1:{free_port()}"
    self.jobs: list[subprocess.Popen] = []
    self._texts: list[str] | None = None
    self._written = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115
    for number, written in enumerate(self._written):
      own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(number)}
      own["JAX_NUM_PROCESSES"] = str(count)
      job = subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=shared | (own if count > 1 else {}),
        stdin=subprocess.DEVNULL,
        stdout=written,
        stderr=subprocess.STDOUT,
      )
      self.jobs.append(job)

  def wait(self, timeout: float = 600) -> list[int]:
    """Their exit codes, after all have ended; those that do not are killed."""
    try:
      return [job.wait(timeout) for job in self.jobs]
    finally:
      self.kill()

  def kill(self) -> None:
    """Ends those that have not ended."""
    for job in self.jobs:
      if job.poll() is None:
        job.send_signal(signal.SIGKILL)
        job.wait()
    self._texts = self.texts()
    for written in self._written:
      written.close()

  def texts(self) -> list[str]:
    """What each has written so far."""
    if self._texts is not None:
      return self._texts
    found = []
    for written in self._written:  # from the start, whatever position the child is at
      size = os.fstat(written.fileno()).st_size
      found.append(os.pread(written.fileno(), size, 0).decode(errors="replace"))
    return found


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]
