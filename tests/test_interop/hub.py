"""Tiny bases and cases for AdapterHub's folders; AdapterHub's side is in `make_hub_values`."""

import pathlib

import jax.numpy as jnp
import numpy as np

import pelt_jax as pelt
from pelt_jax import models

DATA = pathlib.Path(__file__).parent / "data_hub"
LABELS = ("no", "perhaps", "yes")
LENGTH = 2  # of prefixes
_TINY = {
  "vocab_size": 19,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 12,
  "pad_token_id": 3,
}
CONFIGS = {
  "bert": _TINY | {"model_type": "bert"},
  "roberta": _TINY | {"model_type": "roberta", "type_vocab_size": 1},
  "llama": _TINY | {"model_type": "llama", "num_key_value_heads": 2},
  "gpt2": {
    "model_type": "gpt2",
    "vocab_size": 19,
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 12,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
  },
  "t5": {
    "model_type": "t5",
    "vocab_size": 19,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "pad_token_id": 3,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
  },
}
# The last row is padded on the right.
IDS = np.array([[4, 9, 17, 5, 11], [7, 7, 12, 18, 4], [10, 6, 15, 3, 3]])
MASK = (IDS != 3).astype(np.int32)
# What is stored: where AdapterHub is not installed, these are read.
STORED = [
  ("bert", "pfeiffer"),
  ("bert", "houlsby"),
  ("bert", "learned"),
  ("bert", "prefix"),
  ("bert", "mam"),
  ("bert", "unipelt"),
  ("bert", "parallel"),
  ("bert", "fusion"),
  *(("gpt2", case) for case in ("pfeiffer", "houlsby", "parallel", "mam", "unipelt", "fusion")),
  *(("t5", case) for case in ("pfeiffer", "houlsby", "parallel", "fusion")),
]


def read_base(family: str, folder: pathlib.Path, **options):
  """Our model and base for a folder that holds `config.json` and the base's tensors."""
  if family == "t5":
    return models.from_pretrained(folder, task="seq2seq", dtype="float64", **options)
  options = {"task": "classification", "num_labels": len(LABELS), **options}
  return models.from_pretrained(folder, dtype="float64", **options)


def cotangent(shape) -> np.ndarray:
  """What logits are multiplied by before they are summed up to a loss."""
  return np.random.default_rng(0).normal(size=shape)


def logits(model, params, *, ids=IDS, mask=MASK):
  """What params compute for the batch."""
  ids, mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask)
  kwargs = {"decoder_input_ids": ids[:, ::-1]} if hasattr(model, "stacks") else {}
  if model.config.model_type in ("gpt2", "llama"):
    # There padding counts on, here it does not; gates that are means over padding see it.
    kwargs["position_ids"] = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
  return pelt.bypass(model.apply)({"params": params}, ids, mask, **kwargs)
