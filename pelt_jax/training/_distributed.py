"""Several processes, one computation."""

import os
from collections.abc import Mapping

import jax

_NUMBERS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ADDRESS = "JAX_COORDINATOR_ADDRESS"


def initialize_distributed(environment: Mapping[str, str] = os.environ) -> None:
  """Joins this process to the others; before anything else is asked of JAX.

  On Cloud TPUs and under Slurm, Open MPI or Kubernetes JAX finds the others by itself. Elsewhere
  each process is started with `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0).

  Args:
    environment: Where these variables are.

  Raises:
    ValueError: Some of them are set and others are not, or they are no numbers.
  """
  given = [environment.get(name, "") for name in _NUMBERS]
  if not any(given):
    jax.distributed.initialize()
    return
  address = environment.get(_ADDRESS, "")
  if not (address and all(text.isdigit() for text in given)) or int(given[1]) >= int(given[0]):
    found = dict(zip((_ADDRESS, *_NUMBERS), (address, *given), strict=True))
    raise ValueError(
      f"{found}: expected host:port of process 0, how many there are, and which this is, from 0"
    )
  jax.distributed.initialize(address, int(given[0]), int(given[1]))
