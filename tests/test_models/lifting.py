"""torch with float64 in float32's place, for reference models that cast on their own."""

import types
from typing import Any


class Lifted(types.SimpleNamespace):
  """torch whose float32 is float64: Hugging Face's models cast to float32 even in `.double()`."""

  def __init__(self, torch: Any):
    super().__init__(torch=torch, float32=torch.float64, float=torch.float64)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.__dict__["torch"], name)
