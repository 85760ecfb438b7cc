"""Model configurations: a Hugging Face `config.json` read into frozen, hashable dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_COMMON = {"initializer_range": 0.02, "pad_token_id": None}
_LLAMA = _COMMON | {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": None,
  "head_dim": None,
  "hidden_act": "silu",
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_dropout": 0.0,
}
_QWEN = _LLAMA | {
  "vocab_size": 151936,
  "intermediate_size": 22016,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "sliding_window": 4096,
}
_BERT = _COMMON | {
  "vocab_size": 30522,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "hidden_act": "gelu",
  "hidden_dropout_prob": 0.1,
  "attention_probs_dropout_prob": 0.1,
  "max_position_embeddings": 512,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
  "pad_token_id": 0,
}

# Hugging Face leaves out of config.json what equals the family's default, so these are part of the
# format.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": _LLAMA,
  "mistral": _LLAMA
  | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
  },
  "qwen2": _QWEN,
  "qwen3": _QWEN | {"head_dim": 128},
  "bert": _BERT,
  "roberta": _BERT | {"vocab_size": 50265, "pad_token_id": 1},
}

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding settings; the names are those of `rope_parameters` in config.json."""

  rope_type: str = "default"
  rope_theta: float = 10000.0
  factor: float = 1.0
  original_max_position_embeddings: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class _Config:
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


@dataclasses.dataclass(frozen=True)
class DecoderConfig(_Config):
  """Llama, Mistral, Qwen2 and Qwen3. `windows` holds each layer's sliding window (None: full)."""

  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  tie_word_embeddings: bool
  attention_dropout: float
  rope: Rope
  windows: tuple[int | None, ...]
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  qk_norm: bool


@dataclasses.dataclass(frozen=True)
class EncoderConfig(_Config):
  """BERT and RoBERTa."""

  type_vocab_size: int
  layer_norm_eps: float
  hidden_dropout_prob: float
  attention_probs_dropout_prob: float


Config = DecoderConfig | EncoderConfig


def read_config(raw: Mapping[str, Any], *, source: str | None = None) -> Config:
  """Makes a configuration from the contents of a Hugging Face `config.json`.

  Args:
    raw: the parsed JSON. Keys that equal the family's default may be absent, as in files that
      Hugging Face writes.
    source: the folder the file came from, if any.

  Returns:
    A `DecoderConfig` (llama, mistral, qwen2, qwen3) or an `EncoderConfig` (bert, roberta).

  Raises:
    ValueError: an unknown `model_type`, or an option that would change the function computed and
      is not implemented; it is named.

  >>> config = read_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
  >>> config.head_dim, config.vocab_size, config.rope.rope_type
  (16, 32000, 'default')
  """
  kind = raw.get("model_type")
  if kind not in _DEFAULTS:
    raise ValueError(f"model_type {kind!r} is not supported; known: {', '.join(_DEFAULTS)}")
  if raw.get("quantization_config"):
    raise ValueError(
      "config.json has a quantization_config: only plain checkpoints are read. "
      "Load the unquantized one and quantize it here (`transform=pelt.nf4(...)`)."
    )
  # An explicit null means "the default" only where the default itself says what null means.
  got = _DEFAULTS[kind] | {k: v for k, v in raw.items() if v is not None or k == "sliding_window"}
  labels = got.get("num_labels", len(got.get("id2label") or {}) or 2)
  common = {
    "model_type": kind,
    "num_labels": labels,
    "classifier_dropout": got.get("classifier_dropout"),
    "raw": dict(raw),
    "source": source,
  }
  family = EncoderConfig if kind in ("bert", "roberta") else DecoderConfig
  own = _encoder(got) if family is EncoderConfig else _decoder(kind, got)
  names = {f.name for f in dataclasses.fields(family)}
  fields: dict[str, Any] = {k: v for k, v in got.items() if k in names} | common | own
  return family(**fields)


def _encoder(got: Mapping[str, Any]) -> dict[str, Any]:
  _refuse(got, "position_embedding_type", "absolute")
  _refuse(got, "is_decoder", False)
  _refuse(got, "add_cross_attention", False)
  _divides(got["hidden_size"], got["num_attention_heads"], "hidden_size", "num_attention_heads")
  return {}


def _decoder(kind: str, got: Mapping[str, Any]) -> dict[str, Any]:
  heads = got["num_attention_heads"]
  kv_heads = got["num_key_value_heads"] or heads
  if not got["head_dim"]:
    _divides(got["hidden_size"], heads, "hidden_size", "num_attention_heads")
  _divides(heads, kv_heads, "num_attention_heads", "num_key_value_heads")
  bias = bool(got.get("attention_bias", False)) and kind in ("llama", "qwen3")
  return {
    "num_key_value_heads": kv_heads,
    "head_dim": got["head_dim"] or got["hidden_size"] // heads,
    "rope": _rope(got),
    "windows": _windows(kind, got),
    "qkv_bias": bias or kind == "qwen2",
    "out_bias": bias,
    "mlp_bias": bool(got.get("mlp_bias", False)) and kind == "llama",
    "qk_norm": kind == "qwen3",
  }


def _windows(kind: str, got: Mapping[str, Any]) -> tuple[int | None, ...]:
  layers, window = got["num_hidden_layers"], got.get("sliding_window")
  if kind == "llama":
    return (None,) * layers
  if kind == "mistral":
    return (window,) * layers
  if not got.get("use_sliding_window", False) or window is None:
    return (None,) * layers
  types = got.get("layer_types")
  if types is None:
    first = got.get("max_window_layers", 28)
    return tuple(window if i >= first else None for i in range(layers))
  unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
  if unknown or len(types) != layers:
    raise ValueError(
      f"layer_types must name 'full_attention' or 'sliding_attention' for each of the {layers} "
      f"layers, got {len(types)} entries{f', among them {unknown}' if unknown else ''}"
    )
  return tuple(window if t == "sliding_attention" else None for t in types)


def _rope(got: Mapping[str, Any]) -> Rope:
  # "rope_scaling" beside "rope_theta" until transformers 4, one "rope_parameters" since 5.
  values = dict(got.get("rope_scaling") or {}) | dict(got.get("rope_parameters") or {})
  kind = values.pop("rope_type", values.pop("type", "default"))
  if kind not in ROPE_KINDS:
    raise ValueError(f"rope type {kind!r} is not implemented; known: {', '.join(ROPE_KINDS)}")
  if got.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
    raise ValueError("partial_rotary_factor other than 1 is not implemented")
  if kind != "default" and "factor" not in values:
    raise ValueError(f"rope type {kind!r} needs a 'factor' in rope_parameters (rope_scaling)")
  values.setdefault("rope_theta", got.get("rope_theta", 10000.0))
  if not values.get("original_max_position_embeddings"):
    values["original_max_position_embeddings"] = got["max_position_embeddings"]
  if kind == "dynamic":  # its reference length is the trained one, whatever else the file says
    values["original_max_position_embeddings"] = got["max_position_embeddings"]
  names = {f.name for f in dataclasses.fields(Rope)}
  return Rope(rope_type=kind, **{k: v for k, v in values.items() if k in names and v is not None})


def _refuse(got: Mapping[str, Any], name: str, only: Any) -> None:
  if got.get(name, only) != only:
    raise ValueError(f"{name}={got[name]!r} is not implemented; only {only!r} is")


def _divides(whole: int, part: int, whole_name: str, part_name: str) -> None:
  if whole % part:
    raise ValueError(f"{whole_name} ({whole}) is not a multiple of {part_name} ({part})")
