"""Arrays to the host, from whatever devices they are on."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_host(x: Any) -> np.ndarray:
  """An array as NumPy's, whose parts may be on devices of other processes: then all call this."""
  if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)
