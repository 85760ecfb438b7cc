"""How parameters and the tensors of Hugging Face checkpoints name each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Heads that come with a task, and so may be absent from a checkpoint: initialised afresh. So is
# BART's bias of the logits, which its bare model lacks.
FRESH = re.compile(r"^(score|classifier|(bert/)?pooler)/|^final_logits_bias$")
# Tensors that other tasks use, and buffers and unused tables that old files hold: left alone.
LEFT_OUT = re.compile(
  r"^(score|classifier|lm_head|cls|qa_outputs|pooler|seq_relationship|classification_head)\."
  r"|\.pooler\.|inv_freq$|position_ids$|^(bert|roberta)\.embeddings\.token_type_ids$"
  r"|^(transformer\.)?h\.\d+\.attn\.(masked_)?bias$"
  r"|\.EncDecAttention\.relative_attention_bias\.weight$"
)
# Second names of a shared embedding, which files may or may not hold besides the first.
COPIES = re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$")
SHARED = ("shared.weight", "model.shared.weight")
_MASKED_HEAD = re.compile(r"(cls\.predictions|lm_head)\.decoder\.(weight|bias)")
# T5's table of position biases: the stack's own here, the first layer's there.
_T5_TABLE = re.compile(r"^((?:en|de)coder)/relative_attention_bias/")


def torch_name(path: str) -> str:
  """A parameter's name in a Hugging Face checkpoint.

  >>> torch_name("model/layers/0/self_attn/q_proj/kernel")
  'model.layers.0.self_attn.q_proj.weight'
  >>> torch_name("encoder/relative_attention_bias/embedding")
  'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  """
  path = _T5_TABLE.sub(r"\1/block/0/layer/0/SelfAttention/relative_attention_bias/", path)
  *heads, leaf = path.split("/")
  leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
  return ".".join((*heads, leaf))


def transposed(path: str, model: Any) -> bool:
  """Whether a checkpoint holds a leaf's transpose: torch's Linear does, GPT-2's Conv1D does not."""
  *_, module, leaf = ("", *path.split("/"))
  return leaf == "kernel" and module not in getattr(model, "conv1d", ())


def repeats(name: str, model: Any) -> tuple[str, ...]:
  """Names of the tensors one of which this one can only repeat, since the model ties them."""
  if model.architecture.endswith("MaskedLM") and _MASKED_HEAD.fullmatch(name):
    table = "embeddings.word_embeddings.weight"
    bias = name.replace("decoder.bias", "bias")
    return (bias,) if bias != name else (f"{model.prefix}.{table}", table)
  if not hasattr(model, "stacks"):
    return ()
  tied = model.config.tie_word_embeddings and name == "lm_head.weight"
  return SHARED if tied or COPIES.search(name) else ()


def aliases(name: str, model: Any) -> Iterator[str]:
  """Names under which a tensor may lie: bare trunks, trunks of task models, TensorFlow's norms."""
  names = [name, name.removeprefix(f"{model.prefix}.")]
  if not model.prefix:
    trunks = {"bert": "bert", "roberta": "roberta", "gpt2": "transformer"}
    names.append(f"{trunks.get(model.config.model_type, 'model')}.{name}")
  for n in names:
    yield n
    yield n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
  if name.endswith("shared.weight"):
    for n in names[:2]:
      for stack in ("encoder", "decoder"):
        yield n.replace("shared.weight", f"{stack}.embed_tokens.weight")
