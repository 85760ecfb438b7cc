"""What the writers of AdapterHub's files share: tensors, problems, gates, configurations."""

from collections.abc import Collection
from typing import Any

import numpy as np

from pelt_jax._node import strip
from pelt_jax.interop._hub_config import WRITTEN, Config, LoraConfig, PrefixConfig
from pelt_jax.interop._hub_names import LOCATIONS, count_layers
from pelt_jax.nodes import Closable, MeanGate


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
    if isinstance(gate, Closable):
      self.problem(path, "its gate can be closed; use pelt.prune_gates first")
      return False
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


def write_config(config: Config) -> dict[str, Any]:
  """The fields that AdapterHub reads."""
  leave_out = list(config.leave_out)
  if isinstance(config, PrefixConfig):
    return {
      "architecture": "prefix_tuning",
      "prefix_length": config.length,
      "flat": config.hidden is None,
      "bottleneck_size": config.hidden or 512,
      "non_linearity": "tanh",
      "dropout": config.dropout,
      "use_gating": config.gated,
      "shared_gating": True,
      "encoder_prefix": True,
      "cross_prefix": True,
      "leave_out": leave_out,
    }
  if isinstance(config, LoraConfig):
    letters = [t for t in config.targets if len(t) == 1]
    return {
      "architecture": "lora",
      "selfattn_lora": bool(letters),
      "intermediate_lora": "intermediate_lora" in config.targets,
      "output_lora": "output_lora" in config.targets,
      "attn_matrices": letters,
      "r": config.rank,
      "alpha": config.alpha,
      "dropout": config.dropout,
      "composition_mode": "add",
      "use_gating": config.gated,
      "leave_out": leave_out,
    }
  parallel = config.style == "parallel"
  return {
    **{name: name in config.locations for name in LOCATIONS},
    "is_parallel": parallel,
    "original_ln_before": config.style == "pfeiffer",
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": config.norm,
    "ln_after": False,
    "non_linearity": WRITTEN[config.activation],
    "reduction_factor": config.reduction,
    "scaling": config.scaling,
    "use_gating": config.gated,
    "init_weights": "mam_adapter" if parallel else "bert",
    "dropout": 0.0,
    "phm_layer": False,
    "inv_adapter": None,
    "leave_out": leave_out,
  }
