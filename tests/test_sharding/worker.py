"""Runs inside a process with eight devices: a small Llama trained with LoRA on a mesh."""

import itertools
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pelt_jax as pelt
from pelt_jax import models, training

# Adam of optax raises a Python float to an integer array, which the strict setting refuses.
jax.config.update("jax_numpy_dtype_promotion", "standard")

BATCH, LENGTH, VOCAB, STEPS, RATE = 8, 12, 96, 20, 5e-3
# No activation has the shape of a kernel or of its shard: rows are 8 x 12 or fewer.
SIZES = dict(
  model_type="llama",
  vocab_size=VOCAB,
  hidden_size=64,
  intermediate_size=160,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=4,
  initializer_range=0.1,
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


def loss(apply, params, batch, key):
  logits = apply({"params": params}, batch["input_ids"], deterministic=False)
  return models.token_losses(logits, batch["labels"]).mean()


def batches():
  random = np.random.default_rng(0)
  for _ in range(STEPS):  # something to learn: count upwards
    ids = (random.integers(VOCAB, size=(BATCH, 1)) + np.arange(LENGTH + 1)) % VOCAB
    ids = ids.astype(np.int32)
    yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def build(scan, remat, method):
  model = models.from_config(SIZES, scan=scan, remat=remat)
  ids = jnp.zeros((BATCH, LENGTH), jnp.int32)
  base = model.init(jax.random.key(0), ids)["params"]
  sites = pelt.sites(model, ids)
  params = method.init(jax.random.key(1), base, sites)
  # NumPy: placing may alias, and a donated alias would delete the original.
  return model, sites, jax.tree.map(np.asarray, params)


def steps(model, params, place=lambda b: b, mesh_of=None, gathered=None):
  """Losses of the steps, the last trainable and frozen parts, and the compiled step."""
  apply = pelt.bypass(model.apply, gathered=gathered)
  init, step = training.train_step(apply, loss, optax.adam(RATE))
  trainable, frozen, state = init(params)
  shardings = None
  if mesh_of is not None:
    at = jax.tree.map(lambda x: x.sharding, trainable)
    whole = jax.sharding.NamedSharding(mesh_of, jax.sharding.PartitionSpec())
    optimizer = optax.tree.map_params(
      optax.adam(RATE), lambda _, s: s, state.optimizer, at, transform_non_params=lambda _: whole
    )
    state = jax.device_put(state, state._replace(optimizer=optimizer))
    shardings = (at, state._replace(optimizer=optimizer), whole)
  program = jax.jit(step, donate_argnums=(0, 2), out_shardings=shardings)
  first = place(next(batches()))
  compiled = program.lower(trainable, frozen, state, first, jax.random.key(2)).compile()
  values = []
  for number, batch in enumerate(batches()):
    key = jax.random.fold_in(jax.random.key(2), number)
    trainable, state, metrics = program(trainable, frozen, state, place(batch), key)
    values.append(float(metrics["loss"]))
  assert program._cache_size() == 1, program._cache_size()
  return np.array(values), trainable, frozen, state, compiled


def typed_collectives(text):
  """`(operation, dtype, shape)` of what moves between devices; tuples count one by one."""
  found = []
  for line in text.splitlines():
    match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
    if match:
      for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match.group(1)):
        shape = tuple(int(d) for d in dims.split(",") if d)
        found.append((match.group(2), dtype, shape))
  return found


def collectives(text):
  """`(operation, shape)` of the same."""
  return [(operation, shape) for operation, _, shape in typed_collectives(text)]


def kernel_shapes(frozen, layers):
  """Shapes of frozen matrices as devices may see them: each axis whole or one shard of it."""
  shapes = set()
  for x in jax.tree.leaves(frozen):
    axes = list(zip(x.shape, x.sharding.shard_shape(x.shape), strict=True))
    axes = axes[1:] if x.shape[:1] == (layers,) else axes
    if len(axes) == 2:
      shapes |= {s for shape in itertools.product(*axes) for s in (shape, shape[::-1])}
  return shapes


def placed(text, scan, remat, method):
  """The model, how its kernels are gathered, and its params on the mesh."""
  mesh = training.make_mesh(text)
  model, sites, params = build(scan, remat, method)
  jax.set_mesh(mesh)
  specs = training.base_specs(sites, mesh)
  where = pelt.gathered(params, specs, mesh)
  return mesh, model, where, jax.device_put(params, pelt.shardings(params, specs, mesh))


def check_training(text, scan, remat):
  """LoRA on the mesh follows one device, and moves no gradient of what is frozen."""
  method = pelt.lora(rank=5, targets="all-linear")
  model, _, params = build(scan, remat, method)
  wanted, *_ = steps(model, jax.tree.map(jnp.asarray, params))
  mesh, model, _, on_mesh = placed(text, scan, remat, method)
  place = lambda batch: training.place_batch(batch, mesh)
  found, trainable, frozen, state, compiled = steps(model, on_mesh, place, mesh)
  print(text, "scan" * scan, "remat" * remat, "loss", wanted[0], "->", wanted[-1])
  print("largest difference", np.abs(found - wanted).max())
  assert wanted[-1] < 0.85 * wanted[0]
  # float32 sums over other partial sums; 20 steps of Adam grow them to some 1e-6.
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
  check_specs(trainable, frozen, mesh, scan)
  mu = state.optimizer[0].mu
  same = lambda m, t: m.sharding == t.sharding and m.committed
  assert all(jax.tree.leaves(jax.tree.map(same, mu, trainable)))
  moves = collectives(compiled.as_text())
  print(sorted(set(moves)))
  kernels = kernel_shapes(frozen, SIZES["num_hidden_layers"])
  reduced = {s for op, s in moves if op in ("all-reduce", "reduce-scatter")}
  assert reduced and not {s[-2:] for s in reduced} & kernels, reduced & kernels
  if "fsdp" not in mesh.shape:  # weights stay where they are
    assert not {s[-2:] for _, s in moves} & kernels
  else:
    assert any(s[-2:] in kernels for op, s in moves if op == "all-gather")
  if "model" not in mesh.shape:
    # Nothing but dA, dB and scalars: left alone, XLA keeps weights and reduces activations.
    assert {s[-2:] for s in reduced} <= {x.shape[-2:] for x in jax.tree.leaves(trainable)} | {()}
  return trainable, frozen


def check_specs(trainable, frozen, mesh, scan):
  """A = P(in, None), B = P(None, out) over tensor axes alone; never the rank."""
  params = pelt.combine(trainable, frozen)
  layers = params["model"]["layers"]
  layer = layers if scan else layers["0"]
  lead = (None,) * scan
  tensor, fsdp = (a if a in mesh.shape else None for a in ("model", "fsdp"))
  spec = lambda x: (*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
  q, o = layer["self_attn"]["q_proj"]["kernel"], layer["self_attn"]["o_proj"]["kernel"]
  assert spec(q.base) == (*lead, fsdp, tensor), spec(q.base)
  assert spec(o.base) == (*lead, tensor, fsdp)
  assert (spec(q.a), spec(q.b)) == ((*lead, None, None), (*lead, None, tensor))
  assert (spec(o.a), spec(o.b)) == ((*lead, tensor, None), (*lead, None, None))
  assert spec(layer["input_layernorm"]["scale"]) == (*lead, None)


def check_codes(text, layout, scan, gather=True):
  """QLoRA on the mesh follows one device, and codes travel instead of weights.

  Returns:
    Dtypes of the moved arrays that have the size of a kernel or of its codes.
  """
  method = pelt.qlora(rank=5, block=32, layout=layout)
  model, _, params = build(scan, scan, method)
  wanted, *_ = steps(model, jax.tree.map(jnp.asarray, params))
  mesh, model, where, on_mesh = placed(text, scan, scan, method)
  place = lambda batch: training.place_batch(batch, mesh)
  found, *_, compiled = steps(model, on_mesh, place, mesh, where if gather else None)
  print(text, layout, "scan" * scan, "loss", wanted[0], "->", wanted[-1])
  print("largest difference", np.abs(found - wanted).max())
  assert wanted[-1] < 0.9 * wanted[0]
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
  moves = typed_collectives(compiled.as_text())
  print(sorted(set(moves)))
  # Kernels, and what they are unpacked to on the way; activations have other sizes.
  kernels = {64 * 64, 64 * 160}
  shards = {size // n for size in kernels for n in (1, 2, 4, 8)}
  head = {VOCAB * 64 // n for n in (1, 2, 4, 8)}  # the embedding and the head are not quantized
  codes = {"u8": 2, "u32": 8}
  sizes = [(dtype, int(np.prod(shape[-3:])) * codes.get(dtype, 1)) for _, dtype, shape in moves]
  return {dtype for dtype, size in sizes if size in shards and size not in head}


def check_gathered():
  """Layers of a scan have one sharding; names that params lack are an error."""
  mesh = training.make_mesh("fsdp=4,model=2")
  model, sites, params = build(True, False, pelt.qlora(rank=2, block=32))
  specs = training.base_specs(sites, mesh)
  where = pelt.gathered(params, specs, mesh)
  found = {path.rpartition("/")[0].rpartition("/")[2]: tuple(at.spec) for path, at in where.items()}
  into, out = (None, "model"), ("model", None)
  assert found == {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), into),
    **dict.fromkeys(("o_proj", "down_proj"), out),
  }
  assert all(tuple(at.spec) in {into, out} for at in where.values())
  ids = jnp.zeros((8, 4), jnp.int32)
  for call, message in (
    (
      lambda: pelt.bypass(model.apply, gathered={"nowhere": 0})({"params": params}, ids),
      "gathered names 'nowhere', which params do not have",
    ),
    (lambda: pelt.gathered(params, {}, mesh), "base_specs has no PartitionSpec for"),
  ):
    try:
      call()
    except ValueError as error:
      assert message in str(error), error
    else:
      raise AssertionError(message)


def check_detector(text):
  """Where kernels do train, their gradients are seen to move: the check above can fail."""
  mesh, model, _, on_mesh = placed(text, False, False, pelt.full())
  place = lambda batch: training.place_batch(batch, mesh)
  *_, trainable, _, _, compiled = steps(model, on_mesh, place, mesh)
  kernels = kernel_shapes(trainable, SIZES["num_hidden_layers"])
  moves = collectives(compiled.as_text())
  assert {s[-2:] for op, s in moves if op in ("all-reduce", "reduce-scatter")} & kernels


def check_trees(trainable, frozen):
  """Tree functions give on sharded arrays what they give on one device."""
  params = pelt.combine(trainable, frozen)
  local = jax.tree.map(np.asarray, params)
  again = pelt.partition(params)
  for new, old in zip(again, (trainable, frozen), strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), new, old)
  merged, wanted = pelt.merge(params), pelt.merge(jax.tree.map(jnp.asarray, local))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, wanted)
  assert pelt.count(params) == pelt.count(local)
  with tempfile.TemporaryDirectory() as folder:
    pelt.save(f"{folder}/sharded", params)
    pelt.save(f"{folder}/local", local)
    base = jax.tree.map(lambda n: n.base if hasattr(n, "base") else n, params, is_leaf=is_node)
    loaded = pelt.load(f"{folder}/sharded", base)  # the base's fingerprint is that of one device
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), loaded, params)
    read = lambda name: {
      p.name: p.read_bytes() for p in sorted(pathlib.Path(folder, name).iterdir())
    }
    assert read("sharded") == read("local")


def is_node(x):
  return isinstance(x, pelt.nodes.LoraWeight)
