"""Model configurations: a Hugging Face `config.json` read into frozen, hashable dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pelt_jax.models import _config_gpt2, _config_seq2seq
from pelt_jax.models._config_base import COMMON, BaseConfig, divides, refuse
from pelt_jax.models._config_gpt2 import GPT2Config
from pelt_jax.models._config_seq2seq import BartConfig, T5Config

_LLAMA = COMMON | {
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
_BERT = COMMON | {
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
  "gpt2": _config_gpt2.DEFAULTS,
  "t5": _config_seq2seq.T5_DEFAULTS,
  "bart": _config_seq2seq.BART_DEFAULTS,
}
# Our name of a field: the file's, where they differ.
_NAMES: dict[str, dict[str, str]] = {
  "gpt2": _config_gpt2.NAMES,
  "t5": _config_seq2seq.T5_NAMES,
  "bart": _config_seq2seq.BART_NAMES,
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
class DecoderConfig(BaseConfig):
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
class EncoderConfig(BaseConfig):
  """BERT and RoBERTa."""

  type_vocab_size: int
  layer_norm_eps: float
  hidden_dropout_prob: float
  attention_probs_dropout_prob: float


Config = DecoderConfig | EncoderConfig | GPT2Config | T5Config | BartConfig
_CLASSES: dict[str, Any] = {
  "bert": EncoderConfig,
  "roberta": EncoderConfig,
  "gpt2": GPT2Config,
  "t5": T5Config,
  "bart": BartConfig,
}


def read_config(raw: Mapping[str, Any], *, source: str | None = None) -> Config:
  """Makes a configuration from the contents of a Hugging Face `config.json`.

  Args:
    raw: the parsed JSON. Keys that equal the family's default may be absent, as in files that
      Hugging Face writes.
    source: the folder the file came from, if any.

  Returns:
    A `DecoderConfig` (llama, mistral, qwen2, qwen3), `EncoderConfig` (bert, roberta), `GPT2Config`,
    `T5Config` or `BartConfig`.

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
  how = raw.get("quantization_config") or {}
  if how and not (how.get("quant_method") == "bitsandbytes" and how.get("load_in_4bit")):
    raise ValueError(
      f"config.json has a quantization_config of {how.get('quant_method', 'an unknown method')!r}: "
      "read are plain checkpoints and those of bitsandbytes in 4 bits. Load the unquantized one "
      "and quantize it here (`transform=pelt.nf4(...)`)."
    )
  # An explicit null means "the default" only where the default itself says what null means.
  got = {k: v for k, v in raw.items() if v is not None or k == "sliding_window"}
  renamed = {ours: got[theirs] for ours, theirs in _NAMES.get(kind, {}).items() if theirs in got}
  got = _DEFAULTS[kind] | got | renamed
  labels = got.get("num_labels", len(got.get("id2label") or {}) or 2)
  common = {
    "model_type": kind,
    "num_labels": labels,
    "classifier_dropout": got.get("classifier_dropout"),
    "raw": dict(raw),
    "source": source,
  }
  family = _CLASSES.get(kind, DecoderConfig)
  own = _OWN[family](got)
  names = {f.name for f in dataclasses.fields(family)}
  fields: dict[str, Any] = {k: v for k, v in got.items() if k in names} | common | own
  return family(**fields)


def _encoder(got: Mapping[str, Any]) -> dict[str, Any]:
  refuse(got, "position_embedding_type", "absolute")
  refuse(got, "is_decoder", False)
  refuse(got, "add_cross_attention", False)
  divides(got["hidden_size"], got["num_attention_heads"], "hidden_size", "num_attention_heads")
  return {}


def _decoder(got: Mapping[str, Any]) -> dict[str, Any]:
  kind = got["model_type"]
  heads = got["num_attention_heads"]
  kv_heads = got["num_key_value_heads"] or heads
  if not got["head_dim"]:
    divides(got["hidden_size"], heads, "hidden_size", "num_attention_heads")
  divides(heads, kv_heads, "num_attention_heads", "num_key_value_heads")
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


_OWN: dict[Any, Any] = {
  DecoderConfig: _decoder,
  EncoderConfig: _encoder,
  GPT2Config: _config_gpt2.read,
  T5Config: _config_seq2seq.read_t5,
  BartConfig: _config_seq2seq.read_bart,
}
