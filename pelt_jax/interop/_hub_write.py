"""What the writers of AdapterHub's files share: tensors, problems, gates."""

from collections.abc import Collection
from typing import Any

import numpy as np

from pelt_jax._node import strip
from pelt_jax.interop._hub_names import count_layers
from pelt_jax.nodes import MeanGate


def at_layer(value: Any, index: int | None) -> np.ndarray:
  """One layer of an array."""
  array = np.asarray(strip(value))
  return array if index is None else np.asarray(array[index])


class Notes:
  """Tensors to write, and what stands in the way.

  Attributes:
    problems: what no folder can hold.
    otherwise: what AdapterHub would compute in another way: in training, or with padding.
  """

  def __init__(self, model: Any):
    self.model = model
    self.tensors: dict[str, np.ndarray] = {}
    self.problems: list[str] = []
    self.otherwise: list[str] = []

  def problem(self, path: str, why: str) -> None:
    """Notes what no folder can hold."""
    self.problems.append(f"{path}: {why}")

  def put(self, name: str, value: np.ndarray) -> None:
    """Notes a tensor."""
    self.tensors[name] = np.ascontiguousarray(value)

  def drops(self, path: str, dropout: Any, why: str) -> None:
    """Notes a dropout that would act otherwise."""
    if dropout is not None and np.any(np.asarray(dropout.array("rate"))):
      self.otherwise.append(f"{path}: dropout in training; {why}")

  def gate(self, path: str, gate: Any) -> bool:
    """Whether a gate can be written."""
    if not isinstance(gate, MeanGate) or gate.pool != "mean":
      self.problem(path, "its gate is no mean over the row, as AdapterHub's are (gate_pool)")
      return False
    if gate.mask is not None:
      self.otherwise.append(
        f"{path}: its gate is a mean over real tokens, AdapterHub's over padding too "
        "(gate_pool='mean_all')"
      )
    return True

  def put_gate(self, name: str, gate: Any, index: int | None) -> None:
    """Notes a gate's tensors."""
    self.put(f"{name}.weight", at_layer(gate.array("kernel"), index).T)
    self.put(f"{name}.bias", at_layer(gate.array("bias"), index))

  def left(self, layers: Collection[int]) -> tuple[int, ...]:
    """The layers without an adapter."""
    return tuple(i for i in range(count_layers(self.model)) if i not in layers)
