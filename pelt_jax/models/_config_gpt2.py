"""GPT-2's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pelt_jax.models._config_base import COMMON, BaseConfig, divides, refuse

# Our name of a field: the file's.
NAMES = {
  "hidden_size": "n_embd",
  "num_hidden_layers": "n_layer",
  "num_attention_heads": "n_head",
  "max_position_embeddings": "n_positions",
  "hidden_act": "activation_function",
  "layer_norm_eps": "layer_norm_epsilon",
}
DEFAULTS: dict[str, Any] = COMMON | {
  "vocab_size": 50257,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "max_position_embeddings": 1024,
  "n_inner": None,
  "hidden_act": "gelu_new",
  "layer_norm_eps": 1e-5,
  "resid_pdrop": 0.1,
  "embd_pdrop": 0.1,
  "attn_pdrop": 0.1,
  "tie_word_embeddings": True,
  "scale_attn_weights": True,
}


@dataclasses.dataclass(frozen=True)
class GPT2Config(BaseConfig):
  """GPT-2. Fields that other families have bear the common names (`hidden_size` for `n_embd`)."""

  layer_norm_eps: float
  resid_pdrop: float
  embd_pdrop: float
  attn_pdrop: float
  tie_word_embeddings: bool
  scale_attn_weights: bool


def read(got: Mapping[str, Any]) -> dict[str, Any]:
  """Checks the options and derives what the file leaves open."""
  refuse(got, "add_cross_attention", False)
  refuse(got, "scale_attn_by_inverse_layer_idx", False)
  divides(got["hidden_size"], got["num_attention_heads"], "n_embd", "n_head")
  return {"intermediate_size": got["n_inner"] or 4 * got["hidden_size"]}
