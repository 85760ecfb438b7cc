"""Imports of packages that only training needs."""

import importlib
from types import ModuleType


def need(module: str) -> ModuleType:
  """The module called `module`, imported now.

  Raises:
    ImportError: It is not installed; the message says how to get it.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    package = module.partition(".")[0]
    if error.name is None or error.name.partition(".")[0] != package:
      raise  # the module is here, something it needs is not
    raise ImportError(
      f'this part of pelt_jax.training needs {package!r}: pip install "pelt_jax[train]"'
    ) from error
