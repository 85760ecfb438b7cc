"""What every configuration has, and the checks that reading one uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

COMMON = {"initializer_range": 0.02, "pad_token_id": None}


@dataclasses.dataclass(frozen=True)
class BaseConfig:
  """Fields that all families share, under one name each."""

  model_type: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  hidden_act: str
  max_position_embeddings: int
  initializer_range: float
  pad_token_id: int | None
  num_labels: int
  classifier_dropout: float | None
  # What came from config.json (written back by `save_pretrained`) and where it came from. Neither
  # shapes the program, so neither takes part in equality and hash.
  raw: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
  source: str | None = dataclasses.field(compare=False, repr=False)

  def replace(self, **changes: Any) -> Any:
    """Returns a copy with some fields changed."""
    return dataclasses.replace(self, **changes)


def refuse(got: Mapping[str, Any], name: str, only: Any) -> None:
  """Raises if an option has another value than the one implemented."""
  if got.get(name, only) != only:
    raise ValueError(f"{name}={got[name]!r} is not implemented; only {only!r} is")


def divides(whole: int, part: int, whole_name: str, part_name: str) -> None:
  """Raises unless `part` divides `whole`."""
  if whole % part:
    raise ValueError(f"{whole_name} ({whole}) is not a multiple of {part_name} ({part})")
