"""LoRA's configuration: which options can be read, and PEFT's rules for naming modules."""

import pathlib
import re
from collections.abc import Iterable
from typing import Any

from pelt_jax.interop._peft_files import COMMON, complain
from pelt_jax.interop._places import LINEAR, Place

# Options that change the function. None of them is ignored: a file that sets one is refused.
REFUSED = {
  "use_qalora": "QA-LoRA pools the input of A",
  "use_bdlora": "block-diagonal LoRA has factors of another form",
  "lora_bias": "it adds a bias to B",
  "alora_invocation_tokens": "activated LoRA acts from an invocation token on",
  "arrow_config": "Arrow routes between adapters",
  "kasa_config": "KaSA adds singular values",
  "monteclora_config": "MonteCLoRA samples its factors",
  "velora_config": "VeLoRA projects activations",
  "layer_replication": "it repeats layers of the base model",
  "trainable_token_indices": "it trains rows of the embedding table",
  "megatron_config": "it shards layers Megatron's way",
}
# Initialisations that leave the base as it is; any other string changes it when PEFT loads, which
# can be done again for those that are computed from the base alone.
_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal")
_STARTS = ("pissa", "olora")
KNOWN = COMMON | {
  "r",
  "lora_alpha",
  "lora_dropout",
  "use_rslora",
  "use_dora",
  "target_modules",
  "exclude_modules",
  "target_parameters",
  "layers_to_transform",
  "layers_pattern",
  "rank_pattern",
  "alpha_pattern",
  "modules_to_save",
  "bias",
  "fan_in_fan_out",  # nothing to read from it: orientation is the base module's
  "init_lora_weights",
  "ensure_weight_tying",
  "megatron_core",
  # These act while adapters are made, or with an init_lora_weights that is refused.
  "loftq_config",
  "eva_config",
  "corda_config",
  "lora_ga_config",
  "qalora_group_size",
}


class Config:
  """The fields of an `adapter_config.json` of peft_type LORA, checked.

  Args:
    raw: the fields.
    file: where they are from, for messages.
    strict: raise for unknown fields instead of warning.

  Raises:
    ValueError: if they set what cannot be read.
  """

  def __init__(self, raw: dict[str, Any], file: pathlib.Path, strict: bool):
    problems = [f"{k}={raw[k]!r}: {why}" for k, why in REFUSED.items() if raw.get(k)]
    init = str(raw.get("init_lora_weights", True)).lower()
    if raw.get("use_dora") and raw.get("target_parameters"):
      problems.append("use_dora=True with target_parameters, which PEFT does not know")
    if init in _STARTS and raw.get("target_parameters"):
      problems.append(f"init_lora_weights={init!r} with target_parameters")
    if init not in (*_PLAIN_INITS, *_STARTS):
      problems.append(
        f"init_lora_weights={init!r}: it changes the base; save it with PEFT's "
        "path_initial_model_for_weight_conversion, which writes a plain LoRA"
      )
    if raw.get("bias", "none") not in ("none", "lora_only", "all"):
      problems.append(f"bias={raw['bias']!r}: expected 'none', 'lora_only' or 'all'")
    if problems:
      raise ValueError(f"{file} sets what cannot be read:\n  " + "\n  ".join(problems))
    unknown = sorted(set(raw) - KNOWN - set(REFUSED))
    complain(unknown, f"{file} has unknown fields that may change the function", strict)
    self.raw = raw
    self.start = init if init in _STARTS else None
    self.dora = bool(raw.get("use_dora"))
    self.bias: str = raw.get("bias", "none")
    self.dropout = float(raw.get("lora_dropout") or 0.0)
    self.tied = bool(raw.get("ensure_weight_tying"))
    self.modules_to_save: list[str] = list(raw.get("modules_to_save") or ())
    self.target_parameters: list[str] = list(raw.get("target_parameters") or ())
    self.task: str | None = raw.get("task_type")

  def targets(self, place: Place) -> bool:
    """Whether a module with a weight carries a LoRA."""
    name = place.module
    if _listed(self.raw.get("exclude_modules") or (), name):
      return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in self.modules_to_save):
      return False
    targets = self.raw.get("target_modules") or ()
    if isinstance(targets, str) and targets.lower() == "all-linear":
      heads = ("score", "classifier") if self.task == "SEQ_CLS" else ("lm_head",)
      return place.leaf == LINEAR and name not in heads
    if isinstance(targets, str) or name in targets:
      return _listed(targets, name)
    return _listed(targets, name) and self._in_layers(name)

  def _in_layers(self, name: str) -> bool:
    layers = self.raw.get("layers_to_transform")
    if layers is None or layers == []:
      return True
    patterns = self.raw.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    regexes = [rf"(?:^|.*?\.){p}\.(?P<i>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<i>\d+)\."]
    found = next((m for m in (re.match(r, name) for r in regexes) if m), None)
    wanted = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found["i"]) in wanted

  def targets_parameter(self, place: Place) -> bool:
    """Whether a raw parameter carries a LoRA: by its full name or a dotted tail of it."""
    return _listed(self.target_parameters, place.tensor)

  def rank(self, name: str) -> int:
    """The rank of a module, or of a raw parameter."""
    return int(self._of("rank_pattern", name, self.raw.get("r", 8)))

  def scaling(self, name: str) -> float:
    """Alpha / rank, or alpha / sqrt(rank) for rsLoRA; both looked up on their own."""
    alpha, rank = self._of("alpha_pattern", name, self.raw.get("lora_alpha", 8)), self.rank(name)
    return float(alpha) / (rank**0.5 if self.raw.get("use_rslora") else rank)

  def _of(self, patterns: str, name: str, default: Any) -> Any:
    for key, value in (self.raw.get(patterns) or {}).items():
      if _fits(key, name):
        return value
    return default

  def idle(self, names: Iterable[str]) -> list[str]:
    """The patterns of ranks and alphas that fit none of the adapted modules."""
    names = list(names)
    return [
      f"{patterns}: {key!r}"
      for patterns in ("rank_pattern", "alpha_pattern")
      for key in self.raw.get(patterns) or {}
      if not any(_fits(key, name) for name in names)
    ]


def _fits(pattern: str, name: str) -> bool:
  return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _listed(patterns: str | Iterable[str], name: str) -> bool:
  """PEFT's rule: a string is a regular expression for all of it, a list names dotted tails."""
  if isinstance(patterns, str):
    return re.fullmatch(patterns, name) is not None
  return any(name == p or name.endswith(f".{p}") for p in patterns)
