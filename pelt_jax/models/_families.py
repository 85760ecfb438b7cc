"""Which class serves a family's task, and models without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pelt_jax.models import _bart, _bert, _bert_lm, _bert_tasks, _gpt2, _llama, _llama_tasks, _t5
from pelt_jax.models._config import Config, read_config
from pelt_jax.models._layers import Remat

TASKS = ("lm", "mlm", "cloze", "classification", "tagging", "encoder", "seq2seq")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LLAMA = {
  "lm": _llama_tasks.LlamaForCausalLM,
  "cloze": _llama_tasks.LlamaForCausalLM,
  "classification": _llama_tasks.LlamaForSequenceClassification,
  "tagging": _llama_tasks.LlamaForTokenClassification,
  "encoder": _llama.LlamaModel,
}
_BERT = {
  "classification": _bert_tasks.BertForSequenceClassification,
  "tagging": _bert_tasks.BertForTokenClassification,
  "encoder": _bert.BertModel,
}
_CLASSES: dict[str, dict[str, Any]] = {
  "bert": _BERT | dict.fromkeys(("mlm", "cloze"), _bert_lm.BertForMaskedLM),
  "roberta": _BERT
  | {"classification": _bert_tasks.RobertaForSequenceClassification}
  | dict.fromkeys(("mlm", "cloze"), _bert_lm.RobertaForMaskedLM),
  "gpt2": {
    "lm": _gpt2.GPT2LMHeadModel,
    "cloze": _gpt2.GPT2LMHeadModel,
    "classification": _gpt2.GPT2ForSequenceClassification,
    "tagging": _gpt2.GPT2ForTokenClassification,
    "encoder": _gpt2.GPT2Model,
  },
  "bart": {"seq2seq": _bart.BartForConditionalGeneration},
  "t5": {"seq2seq": _t5.T5ForConditionalGeneration},
}


def from_config(
  config: Config | Mapping[str, Any],
  *,
  task: str = "lm",
  num_labels: int | None = None,
  dtype: Any = jnp.float32,
  scan: bool = False,
  remat: Remat = False,
) -> nn.Module:
  """Builds a model without weights; `model.init` draws random ones.

  Args:
    config: a configuration, or the contents of a Hugging Face `config.json`.
    task: "lm", "mlm", "classification", "tagging", "encoder" or "seq2seq": it brings the head.
      "cloze" is the family's language model: "mlm" of encoders, "lm" of decoders.
    num_labels: for classification and tagging; by default what the configuration says.
    dtype: of parameters and computation: float32, bfloat16, float16 or float64.
    scan: one compiled layer with stacked parameters instead of a loop.
    remat: keep only the layers' inputs for the backward pass, which computes the rest again;
      "offload" keeps them in the host's memory.

  Returns:
    A Linen module. It is called with `(input_ids, attention_mask=None, position_ids=None, ...,
    deterministic=True)` and has `config`, `dtype` and `roles`.

  Raises:
    ValueError: an unknown task, dtype or remat, or one that the family or the session cannot serve.

  >>> raw = {
  ...   "model_type": "llama",
  ...   "hidden_size": 8,
  ...   "intermediate_size": 8,
  ...   "num_hidden_layers": 2,
  ...   "num_attention_heads": 2,
  ...   "vocab_size": 11,
  ... }
  >>> model = from_config(raw)
  >>> ids = jnp.array([[1, 2, 3]])
  >>> model.apply(model.init(jax.random.key(0), ids), ids).shape
  (1, 3, 11)
  """
  if not isinstance(config, Config):
    config = read_config(config)
  name = jnp.dtype(dtype).name
  if name not in _DTYPES:
    raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {name}")
  if jax.dtypes.canonicalize_dtype(name) != name:
    raise ValueError("dtype float64 needs 64-bit JAX: jax.config.update('jax_enable_x64', True)")
  if remat not in (False, True, "offload"):
    raise ValueError(f"remat must be False, True or 'offload', got {remat!r}")
  classes = _CLASSES.get(config.model_type, _LLAMA)
  if task not in classes:
    known = f"for {config.model_type}: {', '.join(classes)}" if task in TASKS else ", ".join(TASKS)
    hint = {
      "seq2seq": "; a decoder learns prompts and completions with task='lm'",
      "lm": "; an encoder-decoder is trained with task='seq2seq'",
    }.get(task, "")
    hint = hint if {"lm", "seq2seq"} & set(classes) else ""
    raise ValueError(f"task {task!r} is not one of those known {known}{hint}")
  if num_labels is not None:
    if task not in ("classification", "tagging"):
      raise ValueError(f"num_labels is for classification and tagging, the task is {task!r}")
    if num_labels < 1:
      raise ValueError(f"num_labels must be at least 1, got {num_labels}")
    config = config.replace(num_labels=num_labels)
  return classes[task](config, jnp.dtype(dtype), scan, remat)
