"""Models and files small enough for every test."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax import models, training

LLAMA = {
  "model_type": "llama",
  "vocab_size": 259,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "max_position_embeddings": 64,
  "tie_word_embeddings": True,
}
BERT = {
  "model_type": "bert",
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "max_position_embeddings": 24,
  "type_vocab_size": 2,
}
WORDS = (
  *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "Ada", "Oslo"),
  *("in", "is", "the", "a", "very", "not", "##ly", ".", "went", "to", "sees", "dull", "fine"),
)


def llama(dtype=jnp.float32, seed=0, spread=0.02, **sizes):
  """A random language model over bytes."""
  model = models.from_config(LLAMA | {"initializer_range": spread} | sizes, dtype=dtype)
  return model, model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


def text_rows(count=24, length=16):
  """Rows of text for `llama`, packed where `length` allows."""
  words = [" ".join(f"{i}{j}" for j in range(1 + i % 4)) for i in range(count)]
  examples = tuple(training.Example(i + 1, text=word) for i, word in enumerate(words))
  return training.encode(
    training.Examples("text", examples), training.ByteTokenizer(), "lm", length=length
  )


def save_bert(folder, seed=0, task="encoder", spread=0.02):
  """A Hugging Face folder of a random BERT with a vocabulary of words."""
  model = models.from_config(BERT | {"initializer_range": spread}, task=task)
  model = model.clone(pooler=True) if task == "encoder" else model
  params = model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
  models.save_pretrained(folder, model, params)
  (folder / "vocab.txt").write_text("\n".join(WORDS))
  config = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
  config["do_lower_case"] = False
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


CHAT_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_llama(folder, seed=0, spread=0.02, **sizes):
  """A Hugging Face folder of a random Llama whose tokenizer has no merges."""
  import tokenizers

  model, params = llama(seed=seed, spread=spread, **sizes)
  models.save_pretrained(folder, model, params)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  specials = ["<|im_start|>", "<|im_end|>", "<pad>"]
  vocabulary = {token: i for i, token in enumerate([*alphabet, *specials])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(specials)
  backend.save(str(folder / "tokenizer.json"))
  config = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


T5 = {
  "model_type": "t5",
  "vocab_size": 264,
  "d_model": 16,
  "d_kv": 8,
  "d_ff": 24,
  "num_layers": 2,
  "num_heads": 2,
  "is_encoder_decoder": True,
  "decoder_start_token_id": 0,
  "initializer_factor": 0.5,
}
BART = {
  "model_type": "bart",
  "vocab_size": 264,
  "d_model": 16,
  "encoder_layers": 2,
  "decoder_layers": 2,
  "encoder_attention_heads": 2,
  "decoder_attention_heads": 2,
  "encoder_ffn_dim": 24,
  "decoder_ffn_dim": 24,
  "max_position_embeddings": 64,
  "is_encoder_decoder": True,
  "init_std": 0.3,
}


def save_seq2seq(folder, config, seed=0):
  """A Hugging Face folder of a random encoder-decoder over bytes, with its family's special ids."""
  import tokenizers

  model = models.from_config(config, task="seq2seq")
  params = model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
  models.save_pretrained(folder, model, params)
  t5 = config["model_type"] == "t5"
  specials = ["<pad>", "</s>"] if t5 else ["<s>", "<pad>", "</s>"]
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  ids = {token: i for i, token in enumerate([*specials, *alphabet])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(specials)
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>" if t5 else "<s> $A </s>", special_tokens=[(s, ids[s]) for s in specials]
  )
  backend.save(str(folder / "tokenizer.json"))
  names = {"eos_token": "</s>", "pad_token": "<pad>"} | ({} if t5 else {"bos_token": "<s>"})
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  return folder


def leaves(tree):
  """Arrays on the host."""
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a, b):
  """Whether two trees have the same arrays, bit for bit."""
  a, b = leaves(a), leaves(b)
  return len(a) == len(b) and all(
    x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
  )
