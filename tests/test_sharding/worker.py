"""Runs inside a process with eight devices: LoRA and QLoRA of the experiment, checked closely."""

import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pelt_jax as pelt
from pelt_jax import training

sys.path.insert(0, "experiments")
import collectives
import sharded

# Adam of optax raises a Python float to an integer array, which the strict setting refuses.
jax.config.update("jax_numpy_dtype_promotion", "standard")


def reduced(run):
  """Shapes of what is summed over devices, without stacked axes."""
  return {m.shape[-2:] for m in run.moves if m.operation in ("all-reduce", "reduce-scatter")}


def check_training(text, scan, remat):
  """LoRA on the mesh follows one device, and moves no gradient of what is frozen."""
  built = sharded.build(sharded.methods(scan)["lora"], scan, remat)
  mesh = training.make_mesh(text)
  wanted, run = sharded.train(built).losses, sharded.train(built, mesh)
  print(text, f"scan={scan}", f"remat={remat}", "loss", wanted[0], "->", wanted[-1])
  print("largest difference", np.abs(run.losses - wanted).max())
  assert wanted[-1] < 0.85 * wanted[0]
  # float32 sums over other partial sums; 20 steps of Adam grow them to some 1e-6.
  np.testing.assert_allclose(run.losses, wanted, rtol=0, atol=sharded.BOUND)
  check_specs(run.trainable, run.frozen, mesh, scan)
  mu = run.state.optimizer[0].mu
  same = lambda m, t: m.sharding == t.sharding and m.committed
  assert all(jax.tree.leaves(jax.tree.map(same, mu, run.trainable)))
  kernels = sharded.matrices(run.frozen)
  assert reduced(run) and not sharded.reduced(run)
  if "fsdp" not in mesh.shape:  # weights stay where they are
    assert not {m.shape[-2:] for m in run.moves} & kernels
  else:
    assert any(m.shape[-2:] in kernels for m in run.moves if m.operation == "all-gather")
  if "model" not in mesh.shape:
    # Nothing but dA, dB and scalars: left alone, XLA keeps weights and reduces activations.
    assert reduced(run) <= {x.shape[-2:] for x in jax.tree.leaves(run.trainable)} | {()}
  return run.trainable, run.frozen


def check_traffic(name, text, scan):
  """What the method moves is what the closed form says."""
  mesh = training.make_mesh(text)
  plain = sharded.train(sharded.build(sharded.base_of(name, scan), scan), mesh, run=False)
  run = sharded.train(sharded.build(sharded.methods(scan)[name], scan), mesh, run=False)
  total, base = (sum(collectives.traffic(r.moves).values()) for r in (run, plain))
  expected = base - sharded.added(plain, mesh) + sharded.added(run, mesh)
  print(name, text, "scan" * scan, "moves", total, "expected", expected)
  assert sharded.added(run, mesh) > 0 and expected / 1.05 <= total <= 1.05 * expected


def check_batch_alone(name):
  """Where devices share nothing but the batch, gradients of what trains and the loss move."""
  mesh = training.make_mesh("data=8")
  run = sharded.train(sharded.build(sharded.methods(True)[name], True), mesh, run=False)
  size = 4 * sum(x.size for x in jax.tree.leaves(run.trainable))
  assert collectives.traffic(run.moves) == {"all-reduce": size + 4}, run.moves


def check_moments(text, paged):
  """Moments split over the axes of the batch: the same losses, and as many parts of them."""
  mesh = training.make_mesh(text)
  built = sharded.build(sharded.methods(True)["lora"], True)
  tx = optax.adam(sharded.RATE)
  tx = pelt.paged(tx, 500) if paged else tx
  wanted = sharded.train(built).losses
  axes = tuple(name for name in ("data", "fsdp") if name in mesh.shape)
  run = sharded.train(built, mesh, tx=tx, moments=axes)
  np.testing.assert_allclose(run.losses, wanted, rtol=0, atol=sharded.BOUND)
  adam = run.state.optimizer[0]
  for moment in (*jax.tree.leaves(adam.mu), *jax.tree.leaves(adam.nu)):
    assert all(name in str(moment.sharding.spec) for name in axes), moment.sharding
    kind = "pinned_host" if paged and moment.size >= 500 else "device"
    assert moment.sharding.memory_kind == kind, (moment.shape, moment.sharding)
  assert all("data" not in x.sharding.spec for x in jax.tree.leaves(run.trainable))


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
  assert spec(params["lm_head"]["kernel"]) == (None, tensor)


def check_codes(text, layout, scan, gather=True):
  """QLoRA on the mesh follows one device, and codes travel instead of weights.

  Returns:
    Dtypes of the moved arrays that have the size of a kernel or of its codes.
  """
  method = pelt.qlora(rank=sharded.RANK, block=sharded.BLOCK, layout=layout)
  built = sharded.build(method, scan, scan)
  wanted = sharded.train(built).losses
  run = sharded.train(built, training.make_mesh(text), gather=gather)
  print(text, layout, "scan" * scan, "loss", wanted[0], "->", wanted[-1])
  print("largest difference", np.abs(run.losses - wanted).max())
  assert wanted[-1] < 0.9 * wanted[0]
  np.testing.assert_allclose(run.losses, wanted, rtol=0, atol=sharded.BOUNDS["qlora"])
  assert not sharded.reduced(run)
  return sharded.unpacked(run)


def check_gathered():
  """Layers of a scan have one sharding; names that params lack are an error."""
  mesh = training.make_mesh("fsdp=4,model=2")
  built = sharded.build(pelt.qlora(rank=2, block=32), True)
  model, params = built.model, built.params
  specs = training.base_specs(built.sites, mesh)
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
  run = sharded.train(sharded.build(pelt.full(), False), training.make_mesh(text), run=False)
  assert not sharded.reduced(run)  # nothing is frozen
  assert sharded.reduced(run._replace(frozen=run.trainable))


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
