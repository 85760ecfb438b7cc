"""Tiny random models of every family, and what comparisons share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax import models
from pelt_jax.models._load import abstract_params

VOCAB = 97
PAD = 3  # neither 0 nor the last id, so that a forgotten comparison shows

_TINY = {
  "vocab_size": VOCAB,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
  "pad_token_id": PAD,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "initializer_range": 0.3,  # so that attention is not uniform
}
_GPT2 = {
  "model_type": "gpt2",
  "vocab_size": VOCAB,
  "n_embd": 32,
  "n_inner": 48,
  "n_layer": 3,
  "n_head": 4,
  "n_positions": 64,
  "pad_token_id": PAD,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "initializer_range": 0.3,
}
_GROUPED = _TINY | {"num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
  "llama": _GROUPED | {"model_type": "llama"},
  "llama-tied-biased": _GROUPED
  | {
    "model_type": "llama",
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "head_dim": 12,
  },
  "mistral": _GROUPED | {"model_type": "mistral", "sliding_window": 5},
  "qwen2": _GROUPED | {"model_type": "qwen2", "tie_word_embeddings": True},
  # Layers 1 and 2 slide, layer 0 does not.
  "qwen2-mixed": _GROUPED
  | {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
  },
  "qwen3": _GROUPED | {"model_type": "qwen3", "head_dim": 12},
  "gpt2": _GPT2,
  "gpt2-untied": _GPT2
  | {
    "tie_word_embeddings": False,
    "n_inner": None,
    "activation_function": "gelu",
    "scale_attn_weights": False,
    "n_embd": 16,
  },
  "bert": _TINY | {"model_type": "bert", "type_vocab_size": 2},
  "roberta": _TINY | {"model_type": "roberta", "type_vocab_size": 1},
}
_T5 = {
  "model_type": "t5",
  "vocab_size": VOCAB,
  "d_model": 32,
  "d_kv": 12,  # 4 heads of it are not d_model
  "d_ff": 48,
  "num_layers": 3,
  "num_decoder_layers": 2,
  "num_heads": 4,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 9,  # shorter than the sequences
  "pad_token_id": PAD,
  "eos_token_id": 2,
  "decoder_start_token_id": 5,
  "initializer_factor": 0.5,
}
_BART = {
  "model_type": "bart",
  "vocab_size": VOCAB,
  "d_model": 32,
  "encoder_layers": 2,
  "decoder_layers": 3,
  "encoder_attention_heads": 4,
  "decoder_attention_heads": 2,
  "encoder_ffn_dim": 48,
  "decoder_ffn_dim": 40,
  "max_position_embeddings": 30,
  "pad_token_id": PAD,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "forced_eos_token_id": None,
  "decoder_start_token_id": 5,
  "init_std": 0.3,
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
  "t5": _T5,
  "t5-gated": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
  "bart": _BART,
  "bart-scaled": _BART | {"scale_embedding": True},
}
DECODERS = [name for name in CONFIGS if name not in ("bert", "roberta")]
MASKED = ["llama", "mistral", "qwen2-mixed"]  # the kinds of masks: full, sliding, both
ENCODERS = ["bert", "roberta"]
TASKS = {
  **dict.fromkeys(DECODERS, ("lm", "classification", "tagging", "encoder")),
  **dict.fromkeys(ENCODERS, ("classification", "tagging", "encoder", "mlm")),
}
PAIRS = [(name, task) for name in CONFIGS for task in TASKS[name]]
SEQ2SEQ_PAIRS = [(name, "seq2seq") for name in SEQ2SEQ]


def build(name: str, task: str, **options: Any) -> Any:
  """A tiny model of a family."""
  labels = 5 if task in ("classification", "tagging") else None
  return models.from_config((CONFIGS | SEQ2SEQ)[name], task=task, num_labels=labels, **options)


@functools.cache
def built(name: str, task: str, scan: bool = True) -> tuple[Any, Any]:
  """A tiny model and random parameters, norms and biases not trivial.

  Scanned by default: one layer compiles three times as fast as three.
  """
  model = build(name, task, scan=scan)
  return model, random_params(model)


# T5 divides no scores, so its queries must be small; greedy BART repeats itself unless positions
# outweigh what its layers add.
SCALES = {"q": 0.3, "embed_positions": 10.0, "out_proj": 0.3, "fc2": 0.3}


def random_params(model: Any) -> Any:
  """Random parameters drawn by numpy, which compiles nothing."""
  rng = np.random.default_rng(0)

  def draw(path: Any, x: Any) -> Any:
    value = rng.normal(0, 0.1 if x.ndim - model.scan < 2 else 0.3, x.shape)
    value *= SCALES.get(path[-2].key, 1.0) if len(path) > 1 else 1.0
    return jnp.asarray(value + (path[-1].key == "scale"), x.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
  """Random ids without the padding id."""
  return np.random.default_rng(seed).integers(PAD + 1, VOCAB, (batch, length)).astype(np.int32)


def padded(ids: np.ndarray, lengths: list[int], side: str) -> tuple[np.ndarray, np.ndarray]:
  """Cuts rows to `lengths` and pads them on one side: ids and mask."""
  out, mask = np.full_like(ids, PAD), np.zeros_like(ids)
  for i, n in enumerate(lengths):
    where = slice(ids.shape[1] - n, None) if side == "left" else slice(0, n)
    out[i, where], mask[i, where] = ids[i, :n], 1
  return out, mask


def close(got: Any, want: Any, tolerance: float, where: Any = None) -> None:
  """Largest difference, relative to the largest wanted value; `where` selects leading axes."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  if where is not None:
    got, want = (x[np.asarray(where).astype(bool)] for x in (got, want))
  assert np.isfinite(want).all()
  largest = np.abs(got - want).max() / np.abs(want).max()
  assert largest <= tolerance, f"{largest:.2e} > {tolerance:.0e}"


def trees_close(got: Any, want: Any, tolerance: float) -> None:
  """`close` leaf by leaf, relative to the largest leaf of all (rounding is absolute)."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  top = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    error = float(jnp.abs(a - b).max()) / top
    assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.0e}"
