"""The demo's model and data: a small Llama over bytes, pretrained here on Python's own source code.

Nothing is downloaded: the corpus is the standard library, the text to adapt to is the prose of
`help()`'s topics. The model is made once and kept in a cache.
"""

import hashlib
import os
import pathlib
import shutil
import sys
import sysconfig
import tempfile
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import optax

import pelt_jax as pelt
from pelt_jax import models, training

CONFIG = {
  "model_type": "llama",
  "vocab_size": 259,
  "hidden_size": 128,
  "intermediate_size": 352,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "max_position_embeddings": 1024,
  "tie_word_embeddings": True,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
LENGTH, BATCH, STEPS, RATE = 128, 16, 450, 6e-3
HELD_OUT = 16_000  # bytes of each kind of text


def prose() -> tuple[str, str]:
  """English text to adapt to: for training, and held out."""
  text = "\n\n".join(topics[name] for name in sorted(topics))
  return text[:-HELD_OUT], text[-HELD_OUT:]


def code() -> tuple[str, str]:
  """Python source: what the model is pretrained on, and held out."""
  files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
  text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
  return text[:-HELD_OUT], text[-HELD_OUT:]


def encode(text: str) -> training.Encoded:
  """Windows of text as rows."""
  examples = training.Examples("text", (training.Example(1, text=text),))
  return training.encode(examples, training.ByteTokenizer(), "lm", length=LENGTH)


def folder(progress: bool = True) -> pathlib.Path:
  """The model's folder; makes it on first use, in about a minute."""
  cache = pathlib.Path(os.environ.get("PELT_JAX_CACHE", "~/.cache/pelt_jax")).expanduser()
  recipe = repr((CONFIG, LENGTH, BATCH, STEPS, RATE, HELD_OUT, sys.version_info[:2]))
  final = cache / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
  if (final / "config.json").is_file():
    return final
  cache.mkdir(parents=True, exist_ok=True)
  if progress:
    print(f"training a small language model from scratch, once; it is kept in {cache}")
  model, params = pretrain(progress)
  partial = pathlib.Path(tempfile.mkdtemp(prefix="demo-", dir=cache))
  try:
    models.save_pretrained(partial, model, params)
    os.replace(partial, final)
  except OSError:
    if not (final / "config.json").is_file():  # else another process was faster
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return final


def pretrain(progress: bool):
  """Trains the model from scratch: full fine-tuning of random weights."""
  key = jax.random.key(0)
  model = models.from_config(CONFIG)
  ids = jnp.zeros((1, 8), jnp.int32)
  method = pelt.full()
  params = method.init(key, model.init(key, ids)["params"], pelt.sites(model, ids))
  rate = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 20, STEPS, RATE / 20)
  train = training.train_step(
    pelt.bypass(model.apply),
    training.next_token,
    optax.adamw(rate, b2=0.98, weight_decay=0.05),
    method,
    clip=1.0,
  )
  loader = training.Loader(encode(code()[0]), BATCH, seed=0)
  done = training.fit(train, params, loader, steps=STEPS, key=key, progress=progress)
  return model, pelt.merge(done.params)
