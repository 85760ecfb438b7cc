"""DoRA: a closed form exact in binary, its identities in float64, and what its weights stand on."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax._walk import map_nodes
from tests.test_core.tiny import values

EYE = jnp.eye(2)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def over(kernel, a, b, scaling, **options):
  """A node with the magnitude that it starts with."""
  axes = options.pop("lora_axes", "io:ir,ro")
  below = nodes.LoraWeight(kernel, a, b, jnp.asarray(scaling, kernel.dtype), axes=axes)
  node = nodes.DoraWeight(below, **options)
  return node.replace(magnitude=node.norm())


def drawn(n_in=6, n_out=5, rank=2, scaling=0.7, **options):
  node = over(values((n_in, n_out), 0), values((n_in, rank), 1), values((rank, n_out), 2), scaling)
  return node.replace(magnitude=values((n_out,), 3) + 2, **options)


def run(node, x, features=5, **options):
  model = nn.Dense(features, use_bias=False, param_dtype=x.dtype)
  return pelt.bypass(model.apply)({"params": {"kernel": node}}, x, **options)


def test_closed_form():
  """alpha 8 and rank 2 tell 8 / 2; V has the columns (3, 4) and (6, 8), of norms 5 and 10."""
  model, x = nn.Dense(2, use_bias=False), jnp.array([[1.0, 1.0]])
  base = {"kernel": jnp.array([[1.0, 2.0], [0.0, 4.0]])}
  method = pelt.dora(rank=2, alpha=8, targets="kernel")
  node = method.init(jax.random.key(0), base, pelt.sites(model, x))["kernel"]
  np.testing.assert_array_equal(node.magnitude, jnp.linalg.norm(base["kernel"], axis=0))
  below = node.base.replace(a=jnp.array([[0.5, 1.0], [1.0, 1.0]]), b=EYE)
  params = {"kernel": node.replace(base=below, magnitude=jnp.array([10.0, 5.0]))}
  # x V = (7, 14), times 10 / 5 and 5 / 10
  np.testing.assert_array_equal(pelt.bypass(model.apply)({"params": params}, x), [[14.0, 7.0]])
  np.testing.assert_array_equal(pelt.merge(params)["kernel"], [[6.0, 3.0], [8.0, 4.0]])


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_it_starts_from_the_model(init, float64):
  model, x = nn.Dense(5, param_dtype=jnp.float64), values((3, 6), 0)
  base = {"kernel": values((6, 5), 1), "bias": values((5,), 2)}
  params = pelt.dora(3, 7, targets="kernel", init=init).init(
    jax.random.key(0), base, pelt.sites(model, x)
  )
  want = model.apply({"params": base}, x)
  np.testing.assert_allclose(pelt.bypass(model.apply)({"params": params}, x), want, atol=1e-14)
  np.testing.assert_allclose(pelt.merge(params)["kernel"], base["kernel"], rtol=0, atol=1e-14)
  counts = pelt.count(params)
  assert (counts.trainable, counts.changed, counts.rank) == (3 * 11 + 5, 30, 5)


def test_forward_merge_and_what_it_is_made_of(float64):
  node, x = drawn(), values((7, 6), 4)
  v = node.base.base + 0.7 * node.base.a @ node.base.b
  n = np.linalg.norm(v, axis=0)
  np.testing.assert_allclose(node.norm(), n, rtol=1e-14)
  want = x @ (v * (np.asarray(node.magnitude) / n)[None])
  y = run(node, x)
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-13)
  np.testing.assert_allclose(x @ pelt.merge({"kernel": node})["kernel"], want, rtol=0, atol=1e-13)
  # linear in m; of magnitude n a LoRA; W and the change scaled alike change nothing
  np.testing.assert_allclose(run(node.replace(magnitude=3 * node.magnitude), x), 3 * y, atol=1e-13)
  lora = node.replace(magnitude=jnp.asarray(n))
  np.testing.assert_allclose(run(lora, x), run(node.base, x), rtol=0, atol=1e-13)
  scaled = node.base.replace(base=4 * node.base.base, scaling=4 * node.base.scaling)
  np.testing.assert_allclose(run(node.replace(base=scaled), x), y, rtol=0, atol=1e-13)
  change = pelt.merge({"kernel": node})["kernel"] - node.base.base
  assert np.linalg.matrix_rank(change) == 5  # rank 2 below


def test_gradients(float64):
  x, g = values((7, 6), 4), values((7, 5), 5)
  loss = lambda node: jnp.sum(run(node, x) * g)
  for detached in (True, False):
    node = drawn(detach_norm=detached)
    a, b, s = node.base.a, node.base.b, 0.7
    grads = jax.grad(loss)(node)
    v, dw = node.base.materialize(), x.T @ g
    n = jnp.linalg.norm(v, axis=0)
    scale, along = node.magnitude / n, jnp.sum(dw * v, axis=0)
    np.testing.assert_allclose(grads.magnitude, along / n, rtol=0, atol=1e-12)
    dv = scale[None] * (dw if detached else dw - (along / n**2)[None] * v)
    np.testing.assert_allclose(grads.base.base, dv, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads.base.a, s * dv @ b.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads.base.b, s * a.T @ dv, rtol=0, atol=1e-12)
    if not detached:  # a move along V changes only its length, which does not count
      np.testing.assert_allclose(jnp.sum(grads.base.base * v, axis=0), 0.0, rtol=0, atol=1e-12)
  # the same but for n's part: they differ at order one
  full = jax.grad(loss)(drawn(detach_norm=False)).base.b
  assert jnp.abs(full - jax.grad(loss)(drawn()).base.b).max() > 0.1


def test_columns_of_zeros_have_no_direction():
  x = jnp.ones((1, 2))
  node = over(jnp.zeros((2, 2)), values((2, 2), 0), jnp.zeros((2, 2)), 2.0)
  np.testing.assert_array_equal(run(node, x, 2), 0.0)
  for detached in (True, False):
    grads = jax.grad(lambda n: jnp.sum(run(n, x, 2)))(node.replace(detach_norm=detached))
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(grads))
    assert jnp.abs(grads.base.b).max() > 0.1  # they can grow


class Kernels(nn.Module):
  """A product by any equation."""

  eq: str
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    return nn.Einsum(self.shape, self.eq, use_bias=False, param_dtype=x.dtype, name="k")(x)


PRODUCTS = {
  "heads": ("btd,dhk->bthk", (6, 2, 3), (2, 4, 6)),
  "two axes in": ("bthk,hkd->btd", (2, 3, 5), (2, 4, 2, 3)),
  "out first": ("btd,vd->btv", (5, 6), (2, 4, 6)),
  "experts": ("beti,eio->beto", (3, 6, 5), (2, 3, 4, 6)),
  "experts, batch axis last": ("beti,ioe->beto", (6, 5, 3), (2, 3, 4, 6)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_any_product(name, float64):
  eq, shape, inputs = PRODUCTS[name]
  model, x = Kernels(eq, shape), values(inputs, 0)
  base = {"k": {"kernel": values(shape, 1)}}
  params = pelt.dora(2, 6, targets="k").init(jax.random.key(0), base, pelt.sites(model, x))
  moved = lambda tree: jax.tree.map(lambda v: v + values(v.shape, v.size) / 4, tree)
  trainable, frozen = pelt.partition(params)
  params = pelt.combine(moved(trainable), frozen)
  node = params["k"]["kernel"]
  plain = pelt.merge(params)["k"]["kernel"]
  # every matrix's columns have the norm m
  kernel, ins = node.axes.split(":")[0], node.axes.split(":")[1].split(",")[0]
  outs = node.axes.split(",")[1]
  axis = tuple(kernel.index(c) for c in ins if c not in outs)
  lengths = jnp.linalg.norm(plain.transpose(*axis, *map(kernel.index, outs)).reshape(
    -1, *(shape[kernel.index(c)] for c in outs)
  ), axis=0)  # fmt: skip
  np.testing.assert_allclose(lengths, jnp.abs(node.magnitude), rtol=1e-12)
  got = pelt.bypass(model.apply)({"params": params}, x)
  np.testing.assert_allclose(got, jnp.einsum(eq, x, plain), rtol=0, atol=1e-12)
  assert jnp.abs(got - jnp.einsum(eq, x, base["k"]["kernel"])).max() > 0.1


def test_a_product_over_some_of_the_outputs(float64):
  kernel, a, b = values((6, 2, 3), 0), values((6, 2), 1), values((2, 2, 3), 2)
  node = over(kernel, a, b, 0.7, axes="dhk:d,hk", lora_axes="dhk:dr,rhk")
  node = node.replace(magnitude=values((2, 3), 3) + 2)
  x = values((4, 2), 4)
  want = jnp.einsum("th,dhk->tdk", x, node.materialize())
  np.testing.assert_allclose(node.einsum("th,dhk->tdk", x), want, rtol=0, atol=1e-13)
  lengths = jnp.linalg.norm(node.materialize(), axis=0)
  np.testing.assert_allclose(lengths, jnp.abs(node.magnitude), rtol=1e-13)


def test_a_table_read_both_ways(float64):
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
      table = nn.Embed(11, 4, param_dtype=jnp.float64, name="emb")
      return table.attend(jnp.tanh(table(ids)))

  ids = jnp.array([[1, 3, 10]])
  base = {"emb": {"embedding": values((11, 4), 0)}}
  sites = pelt.sites(Tied(), ids)
  node = pelt.dora(2, 6, targets="emb").init(jax.random.key(0), base, sites)["emb"]["embedding"]
  np.testing.assert_allclose(node.magnitude, np.linalg.norm(base["emb"]["embedding"], axis=0))
  below = node.base.replace(a=values((11, 2), 1))
  params = {"emb": {"embedding": node.replace(base=below, magnitude=values((4,), 2) + 2)}}
  got = pelt.bypass(Tied().apply)({"params": params}, ids)
  want = Tied().apply({"params": pelt.merge(params)}, ids)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  assert pelt.count(params).trainable == 2 * 15 + 4


def test_dropout_takes_inputs_from_the_change_alone():
  """y = x W + m / n d(x) V - d(x) W, d one of the 16 masks of four inputs, doubled."""
  x, node = values((1, 4), 5), drawn(4, 3)
  node = node.replace(dropout=nodes.Dropout(jnp.asarray(0.5)))
  one = lambda key: run(node, x, 3, train_nodes=True, rngs={"dropout": key})
  outs = jax.vmap(one)(jax.random.split(jax.random.key(0), 500))[:, 0]
  masks = jnp.array([[i >> j & 1 for j in range(4)] for i in range(16)], jnp.float32) * 2
  v, w = node.base.materialize(), node.base.base
  scale = node.magnitude / jnp.linalg.norm(v, axis=0)
  kept = masks * x
  possible = x @ w + kept @ (v * scale[None]) - kept @ w
  nearest = jnp.abs(outs[:, None] - possible[None]).max(-1)
  assert nearest.min(1).max() < 1e-5 and len(set(nearest.argmin(1).tolist())) == 16
  np.testing.assert_allclose(run(node, x, 3), x @ (v * scale[None]), rtol=0, atol=1e-6)


def test_dropout_is_a_loras_until_it_reaches_the_magnitude():
  model, x = nn.Dense(3), jnp.ones((1, 4))
  base = model.init(jax.random.key(0), x)["params"]
  node = pelt.dora(2, targets="kernel", dropout=0.25).init(
    jax.random.key(1), base, pelt.sites(model, x)
  )["kernel"]
  assert node.base.dropout is None and float(node.dropout.rate) == 0.25
  conv, image = nn.Conv(3, (3, 3)), jnp.ones((1, 6, 6, 4))
  base = conv.init(jax.random.key(0), image)["params"]
  with pytest.raises(ValueError, match="only read by Conv"):
    pelt.dora(2, targets="kernel", dropout=0.5).init(
      jax.random.key(1), base, pelt.sites(conv, image)
    )


def test_a_kernel_only_read_is_a_batch_of_matrices(float64):
  conv, x = nn.Conv(3, (2, 2), param_dtype=jnp.float64), values((1, 4, 4, 5), 0)
  base = {"kernel": values((2, 2, 5, 3), 1), "bias": values((3,), 2)}
  params = pelt.dora(2, targets="kernel").init(jax.random.key(0), base, pelt.sites(conv, x))
  assert params["kernel"].magnitude.shape == (2, 2, 3)
  double = {**params, "kernel": params["kernel"].replace(magnitude=2 * params["kernel"].magnitude)}
  got = pelt.bypass(conv.apply)({"params": double}, x)
  want = conv.apply({"params": {**base, "kernel": 2 * base["kernel"]}}, x)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_over_4_bits_and_over_other_changes(float64):
  model, x = nn.Dense(8, use_bias=False), values((3, 64), 0, jnp.float32)
  base = {"kernel": values((64, 8), 1, jnp.float32)}
  sites = pelt.sites(model, x)
  apply = pelt.bypass(model.apply)
  below = pelt.chain(pelt.nf4(targets="kernel"), pelt.lora(2, targets="kernel"))
  method = pelt.chain(below, pelt.dora(3, 5, targets="kernel"))
  node = method.init(jax.random.key(0), base, sites)["kernel"]
  moved = lambda n: n.replace(b=n.b + 0.3) if isinstance(n, nodes.LoraWeight) else n
  node = map_nodes(moved, node).replace(magnitude=2 * node.magnitude)
  merged = pelt.merge({"kernel": node})["kernel"]
  np.testing.assert_allclose(jnp.linalg.norm(merged, axis=0), node.magnitude, rtol=1e-5)
  np.testing.assert_allclose(apply({"params": {"kernel": node}}, x), x @ merged, atol=2e-5)
  with pytest.raises(ValueError, match="dora: 'kernel' has dropout on the input of its change"):
    pelt.chain(pelt.lora(2, targets="kernel", dropout=0.1), pelt.dora(2, targets="kernel")).init(
      jax.random.key(0), base, sites
    )


def test_layers_of_a_stack_are_their_own(float64):
  """norm() of three layers in 4 bits, layer by layer, and the merge of the stack."""
  model, x = nn.Dense(4, use_bias=False), values((2, 32), 0, jnp.float32)
  method = pelt.chain(pelt.nf4(targets="kernel", block=32), pelt.dora(2, targets="kernel"))
  sites = pelt.sites(model, x)
  layers = [
    method.init(jax.random.key(i), {"kernel": values((32, 4), i, jnp.float32)}, sites)["kernel"]
    for i in range(3)
  ]
  layers = [node.replace(magnitude=node.magnitude + i) for i, node in enumerate(layers)]
  whole = jax.tree.map(lambda *v: jnp.stack(v), *(node.add_axis(0, {}) for node in layers))
  norms = [node.norm() for node in layers]
  np.testing.assert_allclose(whole.norm(), jnp.stack(norms), rtol=1e-6)
  merged = [pelt.merge({"kernel": node})["kernel"] for node in layers]
  np.testing.assert_allclose(pelt.merge({"k": whole})["k"], jnp.stack(merged), atol=1e-6)


def test_rows_of_a_bank_choose_and_none_is_built():
  model, x = nn.Dense(64, use_bias=False), values((4, 5, 48), 0)
  base = {"kernel": values((48, 64), 1)}
  members = []
  for i, rank in enumerate((1, 2)):
    node = pelt.dora(rank, 4, targets="kernel").init(jax.random.key(i), base, pelt.sites(model, x))[
      "kernel"
    ]
    low = node.base.replace(b=values((rank, 64), i))
    members.append({"kernel": node.replace(base=low, magnitude=node.magnitude * (i + 2))})
  bank, rows = pelt.bank(members), jnp.array([1, 0, 0, 1])
  apply = pelt.bypass(model.apply)
  got = apply({"params": bank}, x, rows=rows)
  for row, n in enumerate(rows):
    want = apply({"params": members[int(n)]}, x)[row]
    np.testing.assert_allclose(got[row], want, rtol=0, atol=2e-5)
  # No array as large as a kernel for every row, neither of changes nor of their sums.
  program = jax.make_jaxpr(lambda p, x: apply({"params": p}, x, rows=rows))(bank, x)
  shapes = [v.aval.shape for e in program.jaxpr.eqns for v in e.outvars]
  assert max(map(math.prod, shapes)) < 2 * 4 * 5 * 64 + 48 * 64 < 4 * 48 * 64


def test_saved_and_loaded_bit_for_bit(tmp_path):
  model, x = nn.Dense(5), values((3, 6), 0)
  base = model.init(jax.random.key(0), x)["params"]
  method = pelt.dora(2, 6, targets="kernel", dropout=0.1, detach_norm=False, plus=True)
  params = method.init(jax.random.key(1), base, pelt.sites(model, x))
  pelt.save(tmp_path, params)
  loaded = pelt.load(tmp_path, base)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_half_precision_keeps_magnitudes_in_float32():
  model, x = nn.Dense(8, use_bias=False, param_dtype=jnp.bfloat16), jnp.ones((2, 16), jnp.bfloat16)
  base = {"kernel": values((16, 8), 0, jnp.bfloat16)}
  params = pelt.dora(2, targets="kernel").init(jax.random.key(0), base, pelt.sites(model, x))
  node = params["kernel"]
  assert (node.magnitude.dtype, node.base.a.dtype) == (jnp.float32, jnp.bfloat16)
  np.testing.assert_array_equal(pelt.merge(params)["kernel"], base["kernel"])
  y = pelt.bypass(model.apply)({"params": params}, x)
  np.testing.assert_array_equal(y, model.apply({"params": base}, x))
  # one output of double length: exact in bfloat16
  node = node.replace(magnitude=node.magnitude * 2)
  np.testing.assert_array_equal(pelt.bypass(model.apply)({"params": {"kernel": node}}, x), 2 * y)


def test_partition_specs_follow_the_outputs():
  P, node = jax.sharding.PartitionSpec, drawn()
  mesh = jax.make_mesh((1, 1), ("data", "model"))
  found = pelt.shardings({"kernel": node}, {"kernel": P("data", "model")}, mesh)["kernel"]
  assert tuple(found.magnitude.spec) == ("model",)
  assert tuple(found.base.base.spec) == ("data", "model")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(rank=0), "rank must be"),
    (dict(alpha=-1.0), "alpha must be"),
    (dict(dropout=1.0), "dropout must be"),
    (dict(init="zeros"), "init must be"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    pelt.dora(**options)
