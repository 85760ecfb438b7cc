"""Several processes, one computation."""

import os
from collections.abc import Mapping

import jax

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize_distributed(environment: Mapping[str, str] = os.environ) -> None:
  """Joins this process to the others; before anything else is asked of JAX.

  On Cloud TPUs and under Slurm, Open MPI or Kubernetes JAX finds the others by itself. Elsewhere
  each process is started with `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0).

  Args:
    environment: Where these variables are.

  Raises:
    ValueError: Some of them are set and others are not, or they are no numbers; or none is, and JAX
      finds no others.
  """
  found = {name: environment.get(name, "") for name in _VARIABLES}
  address, *numbers = found.values()
  wanted = (
    f"{found}: expected host:port of process 0, how many there are, and which this is, from 0"
  )
  if not any(numbers):
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise ValueError(f"{wanted}, as JAX finds no others by itself ({error})") from error
    return
  count, mine = numbers
  if not (address and count.isdigit() and mine.isdigit()) or int(mine) >= int(count):
    raise ValueError(wanted)
  jax.distributed.initialize(address, int(count), int(mine))
