"""Training steps on shapes alone, for accelerators that need not be there.

Llama with scanned, rematerialized layers and bfloat16 activations under LoRA on all linear layers,
its base in bfloat16 or in 4 bits. TPU targets need libtpu (`pip install "jax[tpu]"`), CUDA targets
`jax-cuda12-plugin` and `jax-cuda12-pjrt` of jax's version. No accelerator is needed.
"""

import importlib.metadata
import math
import os
import pathlib
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

import pelt_jax as pelt
from pelt_jax import models, training

HERE = pathlib.Path(__file__).parent
# Hidden size, inner size, layers, heads, heads of keys, vocabulary.
SHAPES = {
  "llama-7b": (4096, 11008, 32, 32, 32, 32000),
  "llama-8b": (4096, 14336, 32, 32, 8, 128256),
  "llama-13b": (5120, 13824, 40, 40, 40, 32000),
  "llama-33b": (6656, 17920, 60, 52, 52, 32000),
  "llama-65b": (8192, 22016, 80, 64, 64, 32000),
  "llama-70b": (8192, 28672, 80, 64, 8, 32000),
  "llama-405b": (16384, 53248, 126, 128, 8, 128256),
}
# Topologies by number of chips; four is the least that libtpu describes.
TPUS = {
  "v5e": {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
  "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
}


def devices(target: str, count: int = 1) -> list[jax.Device]:
  """That many of a kind."""
  if target in TPUS:
    sizes = next(sizes for chips, sizes in TPUS[target].items() if chips >= count)
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{sizes}")
  else:
    text = (HERE / "targets" / f"{target}.txtpb").read_text()
    found = topologies.get_topology_desc(
      platform="cuda", topology_name=target, topology=f"1x1x{count}", target_config=text
    )
  return list(found.devices)[:count]


def mesh_of(target: str, text: str) -> jax.sharding.Mesh:
  """The mesh `"fsdp=2,model=2"` of that target's devices."""
  sizes = {k: int(v) for k, _, v in (part.partition("=") for part in text.split(","))}
  chips = np.array(devices(target, math.prod(sizes.values()))).reshape(*sizes.values())
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.sharding.Mesh(chips, tuple(sizes), axis_types=auto)


def abstract_step(
  name: str,
  layout: str,
  *,
  length: int,
  rank: int,
  kind: str,
  quantized: bool = True,
  layers: int | None = None,
  paged: int | None = None,
  remat: bool | str = True,
  rows: int | None = None,
  accumulate: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  gather: bool = True,
) -> tuple[Any, tuple, Any]:
  """The step and its arguments as shapes; on a mesh, how params lie there.

  Args:
    name: one of `SHAPES`.
    layout: of 4-bit codes; it follows the target's platform, whatever machine this is.
    length: tokens in a row.
    rank: of LoRA.
    kind: LoRA's dtype.
    quantized: NF4 under double quantization; False: the base in bfloat16.
    layers: fewer than the model has, to try it out.
    paged: optimizer state from so many elements on lies in the host's memory.
    remat: "offload" keeps the layers' inputs in the host's memory.
    rows: of the batch; by default one per device.
    accumulate: parts of the batch, one after another.
    mesh: of `mesh_of`.
    gather: 4-bit codes travel, not what they stand for.
  """
  hidden, inner, depth, heads, kv, vocabulary = SHAPES[name]
  model = models.from_config(
    {
      "model_type": "llama",
      "vocab_size": vocabulary,
      "hidden_size": hidden,
      "intermediate_size": inner,
      "num_hidden_layers": layers or depth,
      "num_attention_heads": heads,
      "num_key_value_heads": kv,
      "max_position_embeddings": length,
      "tie_word_embeddings": False,
    },
    scan=True,
    remat=remat,
    dtype=jnp.bfloat16,
  )
  ids = jax.ShapeDtypeStruct((rows or (mesh.size if mesh else 1), length), jnp.int32)
  half = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
  base = jax.tree.map(half, jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
  sites = pelt.sites(model, ids)
  if quantized:
    method = pelt.qlora(rank=rank, alpha=16, dtype=jnp.dtype(kind), layout=layout)
  else:
    method = pelt.lora(rank=rank, alpha=16, targets="all-linear", dtype=jnp.dtype(kind))
  params = jax.eval_shape(lambda key, p: method.init(key, p, sites), jax.random.key(1), base)
  trainable, frozen = pelt.partition(params)
  tx = optax.adamw(1e-4, b2=0.999)
  tx = pelt.paged(tx, paged) if paged else tx
  where, places = None, None
  if mesh is not None:
    specs = training.base_specs(sites, mesh)
    where, places = pelt.gathered(params, specs, mesh), pelt.shardings(params, specs, mesh)
  apply = pelt.bypass(model.apply, gathered=where if gather else None)
  _, step = training.train_step(apply, training.next_token, tx, clip=0.3, accumulate=accumulate)
  state = training.State(jax.eval_shape(tx.init, trainable), ())
  batch = {"input_ids": ids, "labels": ids}
  key = jax.eval_shape(lambda: jax.random.key(0))
  return step, (trainable, frozen, state, batch, key), places


def compile_on(mesh: jax.sharding.Mesh, step: Any, given: tuple, places: Any, options: Any = None):
  """The step compiled for the mesh, the batch's rows split over all axes but `model`."""
  P = jax.sharding.PartitionSpec
  whole = jax.sharding.NamedSharding(mesh, P())
  rows = jax.sharding.NamedSharding(mesh, P(tuple(n for n in mesh.shape if n != "model")))
  trainable, frozen, state, batch, key = given
  above, below = pelt.partition(places)
  put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  trainable = jax.tree.map(put, trainable, above)
  kept = training.state_shardings(trainable, state, mesh)
  placed = (
    trainable,
    jax.tree.map(put, frozen, below),
    jax.tree.map(put, state, kept[1]),
    jax.tree.map(lambda x: put(x, rows), batch),
    put(key, whole),
  )
  jitted = jax.jit(step, donate_argnums=(0, 2), out_shardings=(*kept, whole))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # activations keep to their rows
    return jitted.lower(*placed).compile(compiler_options=options)


def sizes_of(compiled: Any) -> dict[str, int]:
  """Bytes of one device's memory, and of the host's; `device` is all that the device needs."""
  memory = compiled.memory_analysis()
  fields = ("argument", "output", "temp", "alias")
  sizes = {f: getattr(memory, f"{f}_size_in_bytes") for f in fields}
  sizes |= {f"host_{f}": getattr(memory, f"host_{f}_size_in_bytes") for f in fields}
  return sizes | {"device": sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]}


def versions() -> dict[str, str]:
  names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
  found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
  return {n: importlib.metadata.version(n) for n in names if n in found}
