"""PiSSA and OLoRA: what they start from, and residuals that files make again to the bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import pelt_jax as pelt
from pelt_jax import nodes
from tests.test_core.tiny import values

METHODS = {"pissa": pelt.pissa, "olora": pelt.olora}
both = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def started(method, kernel, x=None):
  """A bias-free Dense with its kernel's node."""
  model = nn.Dense(kernel.shape[1], use_bias=False, param_dtype=kernel.dtype)
  x = values((3, kernel.shape[0]), 9, kernel.dtype) if x is None else x
  params = method.init(jax.random.key(0), {"kernel": kernel}, pelt.sites(model, x))
  return model, x, params


def moved(params, by=0.25):
  trainable, frozen = pelt.partition(params)
  move = lambda v: v + by * values(v.shape, v.size, v.dtype)
  return pelt.combine(jax.tree.map(move, trainable), frozen)


@both
def test_it_starts_from_the_model_and_all_of_it_trains(name, float64):
  kernel = values((7, 5), 0)
  model, x, params = started(METHODS[name](2, 6, targets="kernel"), kernel)
  node = params["kernel"]
  np.testing.assert_allclose(pelt.merge(params)["kernel"], kernel, rtol=0, atol=1e-14)
  apply = pelt.bypass(model.apply)
  np.testing.assert_allclose(apply({"params": params}, x), x @ kernel, rtol=0, atol=1e-13)
  grads = pelt.value_and_grad(lambda p: jnp.sum(apply({"params": p}, x) ** 2))(
    *pelt.partition(params)
  )[1]["kernel"]
  assert jnp.abs(grads.a).max() > 0.1 and jnp.abs(grads.b).max() > 0.1
  counts = pelt.count(params)
  assert (counts.trainable, counts.total, counts.changed, counts.rank) == (2 * 12, 35, 35, 2)
  assert node.base.group is None and jax.tree.leaves(pelt.labels(params)).count("trainable") == 2
  # what was taken is what trains, not what is trained
  np.testing.assert_allclose(
    node.base.materialize(), kernel - 3 * node.base.a @ node.base.b, rtol=0, atol=1e-14
  )


@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(2, 6, False), (4, 6, True)])
def test_pissa_takes_the_principal_part(rank, alpha, rslora, float64):
  kernel, scaling = values((7, 5), 0), alpha / (rank**0.5 if rslora else rank)
  node = started(pelt.pissa(rank, alpha, targets="kernel", rslora=rslora), kernel)[2]["kernel"]
  u, s, v = np.linalg.svd(kernel, full_matrices=False)
  best = (u[:, :rank] * s[:rank]) @ v[:rank]
  np.testing.assert_allclose(scaling * node.a @ node.b, best, rtol=0, atol=1e-13)
  np.testing.assert_allclose(node.base.materialize(), kernel - best, rtol=0, atol=1e-13)
  # either factor has half of the singular values
  half = np.diag(s[:rank] / scaling)
  np.testing.assert_allclose(node.a.T @ node.a, half, rtol=0, atol=1e-13)
  np.testing.assert_allclose(node.b @ node.b.T, half, rtol=0, atol=1e-13)
  left = np.linalg.norm(node.base.materialize(), 2)
  np.testing.assert_allclose(left, s[rank], rtol=1e-12)


def test_olora_starts_from_orthonormal_rows(float64):
  kernel = values((7, 5), 0)
  node = started(pelt.olora(2, 6, targets="kernel"), kernel)[2]["kernel"]
  q, r = np.linalg.qr(kernel.T)  # outputs first, as torch has it
  np.testing.assert_allclose(node.b @ node.b.T, np.eye(2), rtol=0, atol=1e-14)
  np.testing.assert_allclose(node.a @ node.b, (q[:, :2] @ r[:2]).T, rtol=0, atol=1e-14)
  # of the scaling 3 nothing is folded in
  want = kernel - 3 * (q[:, :2] @ r[:2]).T
  np.testing.assert_allclose(node.base.materialize(), want, rtol=0, atol=1e-13)


def test_a_randomized_decomposition_is_near_the_best(float64):
  u, v = (np.linalg.qr(values((40, 40), i))[0] for i in range(2))
  s = 0.8 ** np.arange(40)
  kernel = jnp.asarray((u * s) @ v)
  gap = {}
  for iterations in (0, 8):
    method = pelt.pissa(3, targets="kernel", iterations=iterations)
    params = started(method, kernel)[2]
    np.testing.assert_allclose(pelt.merge(params)["kernel"], kernel, rtol=0, atol=1e-13)
    gap[iterations] = float(jnp.linalg.norm(params["kernel"].base.materialize(), 2)) - s[3]
  assert -1e-12 < gap[8] < 1e-6 < gap[0] < 0.2


@both
def test_kernels_of_any_axes(name, float64):
  """Heads as one matrix, experts and a convolution's positions each, a stack of layers."""
  method = METHODS[name](2, 4, targets="k")

  class Kernel(nn.Module):
    eq: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
      return nn.Einsum(self.shape, self.eq, use_bias=False, param_dtype=x.dtype, name="k")(x)

  cases = [("btd,dhk->bthk", (6, 2, 3), (2, 4, 6)), ("beti,eio->beto", (3, 6, 5), (2, 3, 4, 6))]
  for eq, shape, inputs in cases:
    model, x, kernel = Kernel(eq, shape), values(inputs, 0), values(shape, 1)
    params = method.init(jax.random.key(0), {"k": {"kernel": kernel}}, pelt.sites(model, x))
    got = pelt.merge(params)["k"]["kernel"]
    np.testing.assert_allclose(got, kernel, rtol=0, atol=1e-13)
    node = params["k"]["kernel"]
    one, whole = (node.base.materialize(), kernel) if len(inputs) == 3 else (
      node.base.materialize()[1], kernel[1]
    )  # fmt: skip
    flat = lambda m: np.asarray(m).reshape(6, -1)
    alone = started(METHODS[name](2, 4, targets="kernel"), jnp.asarray(flat(whole)))[2]["kernel"]
    np.testing.assert_allclose(flat(one), alone.base.materialize(), rtol=0, atol=1e-13)


@both
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
  """Eagerly or in a program, half precision too: the residual is made again from a and b."""
  for dtype in (jnp.float32, jnp.bfloat16):
    kernel, folder = values((33, 20), 0, dtype), tmp_path / jnp.dtype(dtype).name
    model, x = nn.Dense(20, use_bias=False, param_dtype=dtype), values((2, 33), 1, dtype)
    method, sites = METHODS[name](5, 7, targets="kernel"), pelt.sites(model, x)
    init = jax.jit(lambda key, p, m=method, s=sites: m.init(key, p, s))
    params = moved(init(jax.random.key(0), {"kernel": kernel}))
    assert params["kernel"].base.residual.dtype == params["kernel"].a.dtype == dtype
    pelt.save(folder, params)
    loaded = pelt.load(folder, {"kernel": kernel})
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    near = jnp.asarray(pelt.merge(init(jax.random.key(0), {"kernel": kernel}))["kernel"])
    error = jnp.abs(near.astype(jnp.float32) - kernel.astype(jnp.float32)).max()
    assert error < (1e-6 if dtype == jnp.float32 else 2e-2)
    with pytest.raises(ValueError, match="saved for another base: 'kernel': it holds other values"):
      pelt.load(folder, {"kernel": kernel.at[3, 4].add(1)})
    with pytest.raises(ValueError, match=r"had shape \(33, 20\) .* here it has \(20, 33\)"):
      pelt.load(folder, {"kernel": kernel.T})
    with pytest.raises(ValueError, match="the base has no such leaf"):
      pelt.load(folder, {})
    coded = pelt.nf4(targets="kernel").init(jax.random.key(0), {"kernel": kernel}, sites)
    with pytest.raises(ValueError, match="it is a NF4Weight here"):
      pelt.load(folder, coded)


def test_boxes_stay(tmp_path):
  names = ("embed", "mlp")
  init = nn.with_partitioning(nn.initializers.normal(), names)
  model, x = nn.Dense(4, use_bias=False, kernel_init=init), jnp.ones((2, 6))
  base = model.init(jax.random.key(0), x)["params"]
  params = pelt.pissa(2, targets="kernel").init(jax.random.key(1), base, pelt.sites(model, x))
  node = params["kernel"]
  assert node.base.residual.names == names and node.base.a.names == ("embed", None)
  assert isinstance(pelt.merge(params)["kernel"], meta.Partitioned)
  pelt.save(tmp_path, params)
  loaded = pelt.load(tmp_path, base)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  P, mesh = jax.sharding.PartitionSpec, jax.make_mesh((1, 1), ("data", "model"))
  found = pelt.shardings(params, {"kernel": P("data", "model")}, mesh)["kernel"]
  assert tuple(found.base.residual.spec) == ("data", "model")
  assert tuple(found.base.b.spec) == (None, "model") and tuple(found.base.a.spec) == (None, None)


def test_a_step_may_donate_what_trains():
  _, _, params = started(pelt.pissa(2, targets="kernel"), values((7, 5), 0))
  trainable, frozen = pelt.partition(params)
  step = jax.jit(lambda t, f: jax.tree.map(lambda v: v + 1, t), donate_argnums=0)
  step(trainable, frozen)
  assert jnp.isfinite(frozen["kernel"].base.a).all()


def test_adapters_of_one_start_share_a_bank():
  kernel = values((7, 5), 0)
  model, x, params = started(pelt.pissa(2, 6, targets="kernel"), kernel, values((2, 3, 7), 8))
  members = [moved(params), moved(params, -0.5)]
  apply = pelt.bypass(model.apply)
  bank = pelt.bank(members)
  assert isinstance(bank["kernel"].base, nodes.Residual)
  got = apply({"params": bank}, x, rows=jnp.array([1, 0]))
  for row, n in enumerate((1, 0)):
    np.testing.assert_allclose(got[row], apply({"params": members[n]}, x)[row], atol=1e-5)
  other = started(pelt.pissa(3, 6, targets="kernel"), kernel)[2]
  with pytest.raises(ValueError, match="residuals are one base if .* rank and scaling"):
    pelt.bank([params, other])


def test_what_cannot_be_taken_apart():
  kernel = values((64, 32), 0)
  one = lambda method: pelt.chain(method, pelt.pissa(2, targets="kernel"))
  firsts = {"NF4Weight": pelt.nf4(targets="kernel"), "Lora": pelt.lora(2, targets="kernel")}
  for found, first in firsts.items():
    with pytest.raises(ValueError, match=f"pissa takes a plain weight apart, .* has a {found}"):
      started(one(first), kernel)
  with pytest.raises(ValueError, match="put nf4 first"):
    started(pelt.chain(pelt.olora(2, targets="kernel"), pelt.nf4(targets="kernel")), kernel)
  # a change over one is a change
  both = pelt.chain(pelt.pissa(2, targets="kernel"), pelt.lora(2, targets="kernel"))
  np.testing.assert_allclose(pelt.merge(started(both, kernel)[2])["kernel"], kernel, atol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: pelt.pissa(0), "rank must be"),
    (lambda: pelt.pissa(iterations=-1), "iterations must be"),
    (lambda: pelt.pissa(iterations=True), "iterations must be"),
    (lambda: pelt.olora(dropout=1.0), "dropout must be"),
  ],
)
def test_bad_options(make, message):
  with pytest.raises(ValueError, match=message):
    make()
