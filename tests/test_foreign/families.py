"""Flax models of transformers 4.57, unmodified, and the one rule they need."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pelt_jax as pelt
from tests.support import require

transformers = require("flax_transformers")
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D  # noqa: E402


@pelt.rule(FlaxConv1D.__call__)  # its kernel is (out, in)
def conv1d(module, leaves, x):
  y = leaves["kernel"].einsum("...i,oi->...o", jnp.asarray(x, module.dtype), module.precision)
  return y + leaves["bias"].spread(y) if module.use_bias else y


BERT_ROLES = {
  "query": [pelt.Role("attention/self/query")],
  "value": [pelt.Role("attention/self/value")],
  "ffn": [pelt.Role("output/dropout", "after", "../../intermediate:in")],
  "embedding": [pelt.Role("embeddings/*_embeddings")],
}


class Foreign(NamedTuple):
  """A module, its params and the positional arguments of its call."""

  module: Any
  params: Any
  args: tuple

  def sites(self, roles: Any = None) -> tuple:
    return pelt.sites(self.module, *self.args, roles=roles)

  def adapted(self, method: pelt.Transform, roles: Any = None) -> dict:
    return method.init(jax.random.key(1), self.params, self.sites(roles))

  def out(self, params: Any, *, bypass: bool = True, **kwargs: Any) -> jax.Array:
    apply = pelt.bypass(self.module.apply) if bypass else self.module.apply
    out = apply({"params": params}, *self.args, deterministic=True, **kwargs)
    return jax.tree.leaves(out)[0]


@contextlib.contextmanager
def promotion():
  """These models promote dtypes and ranks silently, as they always did."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def module(name: str, *, width: int, layers: int, heads: int = 2, length: int, **kwargs: Any):
  """The Linen module inside one of transformers' model classes."""
  common = dict(
    vocab_size=31,
    hidden_size=width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    max_position_embeddings=length,
  )
  wide = dict(intermediate_size=4 * width)
  if name == "bert":
    family, config = transformers.FlaxBertModel, transformers.BertConfig(**common, **wide)
  elif name == "gpt2":
    family, config = transformers.FlaxGPT2LMHeadModel, transformers.GPT2Config(**common)
  else:
    family, config = transformers.FlaxLlamaForCausalLM, transformers.LlamaConfig(**common, **wide)
  return family(config, _do_init=False, **kwargs).module


def make(name: str, *, width: int = 16, layers: int = 3, remat: bool = False) -> Foreign:
  """A small model of a family with random weights and a batch whose second row is padded."""
  kwargs = dict(gradient_checkpointing=True) if remat else {}
  built = module(name, width=width, layers=layers, length=16, **kwargs)
  ids = jax.random.randint(jax.random.key(0), (2, 7), 0, 31)
  mask = jnp.ones_like(ids).at[1, 5:].set(0)
  positions = jnp.broadcast_to(jnp.arange(7), ids.shape)
  args = (ids, mask, positions)
  if name == "bert":
    args = (ids, mask, jnp.zeros_like(ids), positions, None)
  return Foreign(built, built.init(jax.random.key(1), *args)["params"], args)


def moved(params: Any, by: float = 0.1) -> Any:
  """Params whose trainable part left its start."""
  trainable, frozen = pelt.partition(params)
  leaves, tree = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  noisy = [
    x + by * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)
  ]
  return pelt.combine(jax.tree.unflatten(tree, noisy), frozen)
