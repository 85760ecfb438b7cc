"""Configurations of the encoder-decoders: T5 and BART."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pelt_jax.models._config_base import COMMON, BaseConfig, divides, refuse

# Our name of a field: the file's.
T5_NAMES = {
  "hidden_size": "d_model",
  "intermediate_size": "d_ff",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "head_dim": "d_kv",
  "layer_norm_eps": "layer_norm_epsilon",
  "max_position_embeddings": "n_positions",
  "initializer_range": "initializer_factor",
  "relative_buckets": "relative_attention_num_buckets",
  "relative_distance": "relative_attention_max_distance",
}
T5_DEFAULTS: dict[str, Any] = COMMON | {
  "vocab_size": 32128,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_hidden_layers": 6,
  "num_decoder_layers": None,
  "num_attention_heads": 8,
  "head_dim": 64,
  "feed_forward_proj": "relu",
  "relative_buckets": 32,
  "relative_distance": 128,
  "layer_norm_eps": 1e-6,
  "dropout_rate": 0.1,
  "initializer_range": 1.0,
  "max_position_embeddings": 512,  # no table depends on it
  "pad_token_id": 0,
  "decoder_start_token_id": 0,
}
BART_NAMES = {
  "hidden_size": "d_model",
  "num_hidden_layers": "encoder_layers",
  "num_decoder_layers": "decoder_layers",
  "num_attention_heads": "encoder_attention_heads",
  "decoder_heads": "decoder_attention_heads",
  "intermediate_size": "encoder_ffn_dim",
  "decoder_intermediate_size": "decoder_ffn_dim",
  "hidden_act": "activation_function",
  "dropout_rate": "dropout",
  "initializer_range": "init_std",
}
BART_DEFAULTS: dict[str, Any] = COMMON | {
  "vocab_size": 50265,
  "hidden_size": 1024,
  "num_hidden_layers": 12,
  "num_decoder_layers": 12,
  "num_attention_heads": 16,
  "decoder_heads": 16,
  "intermediate_size": 4096,
  "decoder_intermediate_size": 4096,
  "hidden_act": "gelu",
  "max_position_embeddings": 1024,
  "dropout_rate": 0.1,
  "attention_dropout": 0.0,
  "activation_dropout": 0.0,
  "scale_embedding": False,
  "pad_token_id": 1,
  "decoder_start_token_id": 2,
}


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig(BaseConfig):
  """What T5 and BART share; fields without `decoder` in their names are the encoder's or both's."""

  num_decoder_layers: int
  dropout_rate: float
  decoder_start_token_id: int
  tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True)
class T5Config(Seq2SeqConfig):
  """T5 and T5 1.1 (Flan-T5).

  `tie_word_embeddings` says whether the head is the embedding, `scale_decoder_outputs` whether
  hidden states are divided by the root of their width before it: two questions that files of
  different ages answer in one.
  """

  head_dim: int
  gated: bool
  relative_buckets: int
  relative_distance: int
  layer_norm_eps: float
  scale_decoder_outputs: bool


@dataclasses.dataclass(frozen=True)
class BartConfig(Seq2SeqConfig):
  """BART."""

  decoder_heads: int
  decoder_intermediate_size: int
  attention_dropout: float
  activation_dropout: float
  scale_embedding: bool


def read_t5(got: Mapping[str, Any]) -> dict[str, Any]:
  """Checks the options and derives what the file leaves open."""
  refuse(got, "is_encoder_decoder", True)
  kind, _, name = got["feed_forward_proj"].rpartition("-")
  if kind not in ("", "gated"):
    raise ValueError(
      f"feed_forward_proj={got['feed_forward_proj']!r} must be an activation or 'gated-' and one"
    )
  if kind and name == "gelu":
    name = "gelu_new"  # what "gated-gelu" has always meant
  tied = got.get("tie_word_embeddings", True)
  return {
    "num_decoder_layers": got["num_decoder_layers"] or got["num_hidden_layers"],
    "hidden_act": name,
    "gated": bool(kind),
    "tie_word_embeddings": tied,
    "scale_decoder_outputs": got.get("scale_decoder_outputs", tied),
  }


def read_bart(got: Mapping[str, Any]) -> dict[str, Any]:
  """Checks the options and derives what the file leaves open."""
  refuse(got, "is_encoder_decoder", True)
  refuse(got, "tie_word_embeddings", True)
  # Variants of the code that early files of the family ask for.
  refuse(got, "normalize_before", False)
  refuse(got, "normalize_embedding", True)
  refuse(got, "add_final_layer_norm", False)
  refuse(got, "static_position_embeddings", False)
  divides(got["hidden_size"], got["num_attention_heads"], "d_model", "encoder_attention_heads")
  divides(got["hidden_size"], got["decoder_heads"], "d_model", "decoder_attention_heads")
  return {"tie_word_embeddings": True}
