"""Starts one command in several processes on this machine, as a scheduler would on several."""

import os
import pathlib
import socket
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def start(
  command: list[str], count: int, devices: int = 1, **settings: str
) -> list[subprocess.Popen]:
  """Processes that will find each other, with their output as pipes.

  Args:
    command: Of Python, without the interpreter.
    count: How many processes; one is told of no others.
    devices: Virtual CPU devices of each.
    **settings: More environment variables.
  """
  shared = os.environ | settings
  shared |= {
    "PYTHONPATH": os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if p),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  address = f"127.0.0.1:{free_port()}"

  def one(number: int) -> subprocess.Popen:
    own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(number)}
    own["JAX_NUM_PROCESSES"] = str(count)
    return subprocess.Popen(
      [sys.executable, *command],
      cwd=REPOSITORY,
      env=shared | (own if count > 1 else {}),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return [one(number) for number in range(count)]


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def outputs(jobs: list[subprocess.Popen], timeout: float = 600) -> list[str]:
  """What they wrote, after all have ended; those that do not are killed."""
  try:
    return [job.communicate(timeout=timeout)[0] for job in jobs]
  finally:
    for job in jobs:
      if job.poll() is None:
        job.kill()
