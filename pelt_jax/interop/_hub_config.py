"""AdapterHub's configurations: which options can be read, and how ours are written there."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pelt_jax.interop._hub_names import LOCATIONS
from pelt_jax.interop._peft_files import complain

ACTIVATIONS = {
  "relu": "relu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "swish": "silu",
  "silu": "silu",
  "tanh": "tanh",
  "linear": "identity",
}
# Ours: the name written there.
WRITTEN = {v: k for k, v in reversed(ACTIVATIONS.items())} | {"silu": "swish"}
# Files of before version 3 name two activations otherwise.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


class BottleneckConfig(NamedTuple):
  """One kind of bottleneck adapter.

  Attributes:
    locations: keys of `LOCATIONS`.
    style: `"houlsby"`, `"pfeiffer"` or `"parallel"`.
    activation: ours.
    scaling: a number, `"learned"` or `"channel"`.
    gated: whether a gate scales it.
    norm: whether an own norm stands before it.
    reduction: width // bottleneck, for all layers or by layer number (as text).
    leave_out: numbers of layers without it.
  """

  locations: tuple[str, ...]
  style: str
  activation: str = "relu"
  scaling: float | str = 1.0
  gated: bool = False
  norm: bool = False
  reduction: Any = 16
  leave_out: tuple[int, ...] = ()

  def bottleneck(self, width: int, layer: int) -> int:
    """The bottleneck of a layer, by AdapterHub's arithmetic."""
    factor = self.reduction
    if isinstance(factor, Mapping):
      factor = factor.get(str(layer), factor.get("default"))
    return max(1, int(width // factor))


class PrefixConfig(NamedTuple):
  """Prefixes in every layer; `hidden` is None for those no MLP makes."""

  length: int
  hidden: int | None
  dropout: float = 0.0
  gated: bool = False
  leave_out: tuple[int, ...] = ()


class LoraConfig(NamedTuple):
  """LoRA on the matrices that `targets` names (keys of `Family.loras`)."""

  targets: tuple[str, ...]
  rank: int
  alpha: float
  dropout: float = 0.0
  gated: bool = False
  leave_out: tuple[int, ...] = ()


Config = BottleneckConfig | PrefixConfig | LoraConfig


def read_configs(raw: Mapping[str, Any], file: pathlib.Path, strict: bool) -> list[Config]:
  """The methods of an `adapter_config.json`: one, or those of a union.

  Raises:
    ValueError: listing every option that cannot be read.
  """
  inner = raw["config"]
  if not isinstance(inner, Mapping):
    raise ValueError(f"{file}: config must be the fields of a configuration, got {inner!r}")
  union = inner.get("architecture") == "union"
  options = [_Options(c, file, raw, strict) for c in (inner["configs"] if union else [inner])]
  return [_READ[o.kind()](o) for o in options]


class _Options:
  """The fields of one configuration, ticked off as they are read."""

  def __init__(self, raw: Any, file: pathlib.Path, whole: Mapping[str, Any], strict: bool):
    if not isinstance(raw, Mapping):
      raise ValueError(f"{file} is damaged: a configuration is {raw!r}")
    self.raw, self.file, self.whole, self.strict = dict(raw), file, whole, strict
    self.known = {"architecture", "init_weights", "init_weights_seed"}
    self.problems: list[str] = []
    self.training: list[str] = []

  def kind(self) -> Any:
    kind = self.raw.get("architecture")
    if kind not in _READ:
      known = "bottleneck adapters (no architecture), " + ", ".join(k for k in _READ if k)
      raise ValueError(
        f"{self.file}: architecture={kind!r} cannot be read; those that can are {known} and unions "
        "of them"
      )
    return kind

  def get(self, name: str, default: Any) -> Any:
    self.known.add(name)
    value = self.raw.get(name, default)
    return default if value is None else value

  def refuse(self, name: str, plain: Any, why: str) -> None:
    """A value other than `plain` is a problem."""
    if (value := self.get(name, plain)) != plain:
      self.problems.append(f"{name}={value!r}: {why}")

  def in_training(self, name: str, plain: Any, why: str) -> None:
    """A value other than `plain` acts in training alone."""
    if (value := self.get(name, plain)) != plain:
      self.training.append(f"{name}={value!r}: {why}")

  def leave_out(self) -> tuple[int, ...]:
    return tuple(sorted({int(i) for i in self.get("leave_out", ())}))

  def whole_number(self, name: str, default: int) -> int:
    value = self.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      self.problems.append(f"{name}={value!r}: expected a whole number of at least 1")
      return 1
    return value

  def share(self, name: str) -> float:
    value = self.get(name, 0.0)
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
      self.problems.append(f"{name}={value!r}: expected a share, at least 0 and below 1")
      return 0.0
    return float(value)

  def done(self) -> None:
    """Raises if there are problems."""
    if self.problems:
      problems = "\n  ".join(self.problems)
      raise ValueError(f"{self.file} sets what cannot be read:\n  {problems}")
    unknown = sorted(set(self.raw) - self.known)
    complain(unknown, f"{self.file} has unknown fields that may change the function", self.strict)
    what = f"{self.file} sets what acts in training alone, and would act otherwise here"
    complain(self.training, what, self.strict)


def _read_bottleneck(o: _Options) -> BottleneckConfig:
  locations = tuple(name for name in LOCATIONS if o.get(name, False))
  if not locations:
    o.problems.append(f"none of {', '.join(LOCATIONS)} is set, so there is no adapter")
  style = "parallel" if o.get("is_parallel", False) else "houlsby"
  before, residual = o.get("original_ln_before", False), o.get("residual_before_ln", True)
  if style == "houlsby" and before:
    style = "pfeiffer"
    o.refuse("residual_before_ln", True, "the residual is another one, or counted twice")
  elif style == "houlsby" and residual not in (True, False):
    o.problems.append(f"residual_before_ln={residual!r}: it needs original_ln_before=true")
  o.refuse("original_ln_after", True, "the sublayer's own residual or norm is lost")
  o.refuse("ln_after", False, "an own norm after the adapter has no counterpart")
  o.get("adapter_residual_before_ln", False)  # says where ln_after stands
  o.refuse("phm_layer", False, "products of hypercomplex numbers (Compacter) have none")
  o.known |= {k for k in o.raw if "phm" in k or k == "hypercomplex_nonlinearity"}
  inverse = o.get("inv_adapter", None)
  old = o.get("invertible_adapter", None)
  o.get("inv_adapter_reduction_factor", None)
  if (inverse or old) and o.whole.get("type") != "text_task":  # old task adapters never used it
    o.problems.append(f"inv_adapter={inverse or old!r}: invertible adapters have no counterpart")
  name = str(o.get("non_linearity", "relu")).lower()
  name = name if "version" in o.whole else _OLD_ACTIVATIONS.get(name, name)
  if name not in ACTIVATIONS:
    o.problems.append(f"non_linearity={name!r}: known are {', '.join(ACTIVATIONS)}")
  scaling = o.get("scaling", 1.0)
  if isinstance(scaling, bool) or (
    not isinstance(scaling, (int, float)) and scaling not in ("learned", "channel")
  ):
    o.problems.append(f"scaling={scaling!r}: expected a number, 'learned' or 'channel'")
  o.in_training("dropout", 0.0, "it drops what the adapter gives, not its activations")
  o.in_training("stochastic_depth", 0.0, "it drops whole rows of what the adapter gives")
  config = BottleneckConfig(
    locations,
    style,
    ACTIVATIONS.get(name, "relu"),
    scaling if isinstance(scaling, str) else float(scaling),
    bool(o.get("use_gating", False)),
    bool(o.get("ln_before", False)),
    _reduction(o),
    o.leave_out(),
  )
  o.done()
  return config


def _reduction(o: _Options) -> Any:
  value = o.get("reduction_factor", None)
  factors: Iterable[Any] = value.values() if isinstance(value, Mapping) else [value]
  if any(isinstance(f, bool) or not isinstance(f, (int, float)) or f <= 0 for f in factors):
    o.problems.append(f"reduction_factor={value!r}: expected positive numbers")
  return value


def _read_prefix(o: _Options) -> PrefixConfig:
  flat = bool(o.get("flat", False))
  if not flat:
    o.refuse(
      "non_linearity", "tanh", "the MLP here has tanh; make it flat (eject_prefix_tuning) there"
    )
  gated = bool(o.get("use_gating", False))
  if gated:
    o.refuse("shared_gating", True, "keys and values have gates of their own, here one for both")
  o.known |= {"encoder_prefix", "cross_prefix", "shared_gating", "non_linearity"}
  hidden = o.whole_number("bottleneck_size", 512)
  config = PrefixConfig(
    o.whole_number("prefix_length", 30),
    None if flat else hidden,
    o.share("dropout"),
    gated,
    o.leave_out(),
  )
  o.done()
  return config


def _read_lora(o: _Options) -> LoraConfig:
  letters = o.get("attn_matrices", ["q", "v"])
  targets = tuple(letters) if o.get("selfattn_lora", True) else ()
  targets += tuple(k for k in ("intermediate_lora", "output_lora") if o.get(k, False))
  if unknown := sorted(set(letters) - set("qkv")):
    o.problems.append(f"attn_matrices={letters!r}: {unknown} have no counterpart")
  if not targets:
    o.problems.append("no matrix carries a LoRA")
  o.refuse("composition_mode", "add", "(IA)³ scales what it adapts, which has no counterpart yet")
  o.refuse("use_dora", False, "DoRA rescales the columns of the merged weight")
  o.refuse("vera_d", None, "VeRA shares its factors between layers")
  o.refuse("vera_b", None, "VeRA shares its factors between layers")
  o.known.add("dtype")
  rank, alpha = o.whole_number("r", 8), o.get("alpha", 8)
  if _scaled_wrongly(o.whole):
    alpha = rank
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0:
    o.problems.append(f"alpha={alpha!r}: expected a positive number")
  gated = bool(o.get("use_gating", False))
  config = LoraConfig(targets, rank, alpha, o.share("dropout"), gated, o.leave_out())
  o.done()
  return config


def _scaled_wrongly(whole: Mapping[str, Any]) -> bool:
  """Whether alpha is to be read as the rank, as AdapterHub does: before 1.1.0 it scaled nothing."""
  version = str(whole.get("version", ""))
  if not version.startswith("adapters.") or whole["config"].get("architecture") != "lora":
    return False
  numbers = version.removeprefix("adapters.").split(".")[:2]
  return all(n.isdigit() for n in numbers) and tuple(map(int, numbers)) < (1, 1)


_READ = {None: _read_bottleneck, "prefix_tuning": _read_prefix, "lora": _read_lora}
