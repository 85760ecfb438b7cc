"""Runs inside a process with eight devices: Flax's own example of a language model, under LoRA."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec as P

import pelt_jax as pelt
from pelt_jax import training

# Flax and optax promote, and the example broadcasts positions.
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")

BATCH, LENGTH, VOCAB, STEPS, RATE, RANK = 8, 12, 48, 20, 1e-2, 3
METHOD = pelt.lora(rank=RANK, targets="all-linear")


def load(folder):
  """The example's modules, unmodified: its models and its settings."""
  sys.path.insert(0, str(folder))
  import models
  from configs import default

  return models, default.get_config()


def batches():
  random = np.random.default_rng(0)
  for _ in range(STEPS):  # something to learn: count upwards; zero marks padding
    start = random.integers(VOCAB - 1, size=(BATCH, 1))
    yield {"input_ids": (1 + (start + np.arange(LENGTH)) % (VOCAB - 1)).astype(np.int32)}


def loss(apply, params, batch, key):
  ids = batch["input_ids"]  # the model shifts its inputs: it predicts what it is given
  logits = apply({"params": params}, ids)
  return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()


def train(model, params, place=lambda batch: batch, mesh=None):
  made = training.train_step(pelt.bypass(model.apply), loss, optax.adam(RATE))
  made = made if mesh is None else training.on_mesh(made, mesh)
  trainable, frozen, state = made.init(params)
  kept = jax.tree.map(lambda x: x.sharding, (trainable, state))
  step = jax.jit(made.step, donate_argnums=(0, 2), out_shardings=(*kept, None))
  losses = []
  for number, batch in enumerate(batches()):
    key = jax.random.fold_in(jax.random.key(2), number)
    trainable, state, metrics = step(trainable, frozen, state, place(batch), key)
    losses.append(float(metrics["loss"]))
  assert mesh is None or step._cache_size() == 1
  return np.array(losses), trainable, frozen


def check(folder):
  """Losses on a mesh with the example's own axes and rules are those of one device."""
  models, config = load(folder)
  model = models.TransformerLM(
    models.TransformerConfig(
      vocab_size=VOCAB,
      output_vocab_size=VOCAB,
      emb_dim=32,
      num_heads=4,
      num_layers=2,
      qkv_dim=32,
      mlp_dim=64,
      max_len=LENGTH,
      deterministic=True,
    )
  )
  ids = jnp.ones((BATCH, LENGTH), jnp.int32)
  base = model.init(jax.random.key(0), ids)["params"]
  boxed = METHOD.init(jax.random.key(1), base, pelt.sites(model, ids))
  host = jax.tree.map(np.asarray, boxed)
  wanted, *_ = train(model, jax.tree.map(jnp.asarray, host))
  assert wanted[-1] < 0.8 * wanted[0]

  auto = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((2, 2, 2), tuple(config.mesh_axes), axis_types=auto)
  rules = [tuple(rule) for rule in config.logical_axis_rules]
  rows = jax.sharding.NamedSharding(mesh, P(tuple(config.data_sharding)))
  place = lambda batch: jax.device_put(batch, rows)
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    # As Flax says of any tree: names alone, so that a follows FSDP. And as we do.
    by_names = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    specs = nn.logical_to_mesh(nn.get_partition_spec(base), rules)
    by_nodes = pelt.shardings(boxed, specs, mesh, fsdp=("fsdp",))
    for params, fsdp in (
      (jax.device_put(pelt.unbox(host), by_names), "fsdp"),
      (jax.device_put(host, by_nodes), None),
    ):
      found, trainable, frozen = train(model, params, place, mesh)
      print("loss", wanted[0], "->", wanted[-1], "difference", np.abs(found - wanted).max())
      # float32 sums over other partial sums; 20 steps of Adam grow them to some 1e-6.
      np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
      check_specs(pelt.combine(trainable, frozen), fsdp)


def check_specs(params, fsdp):
  """Kernels lie as the rules say, additions along their tensor axes."""
  inside = lambda x: x.value if meta.is_axis_metadata(x) else x  # unboxing would move it
  spec = lambda x: tuple(inside(x).sharding.spec)
  block = params["decoder"]["encoderdecoderblock_0"]["MlpBlock_0"]
  up, down = block["Dense_0"]["kernel"], block["Dense_1"]["kernel"]
  assert spec(up.base) == ("fsdp", "tensor") and spec(down.base) == ("tensor", "fsdp")
  assert spec(up.a) == (fsdp, None) and spec(up.b) == (None, "tensor")
  assert spec(down.a) == ("tensor", None) and spec(down.b) == (None, fsdp)
  assert meta.is_axis_metadata(up.a) == (fsdp is None)  # boxes stay where they were left
