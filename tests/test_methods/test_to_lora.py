"""Any change as a LoRA: ranks by hand, Eckart and Young, axes, stacks, bases, bad input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax._leaf import materialize
from pelt_jax._node import Weight, base, own
from pelt_jax._site import Served, Site
from pelt_jax._walk import get_at, update_at, walk
from pelt_jax.quantization import NF4Weight, quantize
from tests.test_core import tiny
from tests.test_core.tiny import values


def leaf_site(path, shape, eq="...i,io->...o", stacked=(), roles=()):
  roles = tuple(Served(role, None, None) for role in roles)
  equations = (eq,) if eq else ()
  return Site(path, "leaf", "Dense", shape, "float32", (), (), equations, stacked, roles=roles)


def best(change, rank):
  """The nearest matrix of a rank, and the relative error."""
  u, s, vt = np.linalg.svd(np.asarray(change, np.float64), full_matrices=False)
  error = np.linalg.norm(s[..., rank:], axis=-1) / np.linalg.norm(s, axis=-1)
  return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], error


def lora(below, rank, seed, scaling=0.5, **fields):
  n, m = below.shape[-2:]
  lead = below.shape[:-2]
  a, b = (
    values((*lead, n, rank), seed, below.dtype),
    values((*lead, rank, m), seed + 1, below.dtype),
  )
  return nodes.LoraWeight(below, a, b, jnp.full(lead, scaling), stacked=len(lead), **fields)


def delta(node):
  return np.asarray(node.materialize()) - np.asarray(materialize(node.base))


@pytest.mark.parametrize(
  ("rank", "kept"), [(0.66, 1), (0.67, 2), (0.83, 2), (0.84, 3), (1.0, 3), (1, 1), (2, 2), (9, 4)]
)
def test_ranks_by_share_of_energy(rank, kept):
  """Singular values 2, 1, 1, 0: shares 4/6, 5/6, 1, of the sum of squares and not of the sum."""
  with jax.enable_x64(True):
    u, v = (np.linalg.qr(np.asarray(values((n, n), n, jnp.float64)))[0] for n in (4, 5))
    change = u @ np.diag([2.0, 1.0, 1.0, 0.0]) @ v[:4]
    before = values((4, 5), 1, jnp.float64)
    params, errors = pelt.to_lora(
      {"w": before + change}, rank, sites=(leaf_site("w", (4, 5)),), base={"w": before}
    )
    node = params["w"]
    assert node.a.shape == (4, kept) and node.b.shape == (kept, 5) and float(node.scaling) == 1.0
    np.testing.assert_allclose(
      errors["w"], {1: (2 / 6) ** 0.5, 2: 6**-0.5}.get(kept, 0), atol=1e-14
    )
    np.testing.assert_allclose(node.a.T @ node.a, np.eye(kept), atol=1e-14)
    sizes = jnp.linalg.norm(node.b, axis=1)  # b holds the singular values
    np.testing.assert_allclose(sizes, [2.0, 1.0, 1.0, 0.0][:kept], atol=1e-14)
    np.testing.assert_array_equal(node.base, before)


AXES = {  # equation -> shape, and the kernel as (experts, in, out)
  "...i,io->...o": ((6, 5), lambda k: k[None]),
  "...i,oi->...o": ((5, 6), lambda k: k.T[None]),
  "lookup": ((7, 4), lambda k: k[None]),
  "abf,fhd->abhd": ((6, 2, 3), lambda k: k.reshape(1, 6, 6)),
  "abhd,hdf->abf": ((2, 3, 5), lambda k: k.reshape(1, 6, 5)),
  "BSD,CKDH->CBSKH": ((2, 2, 5, 3), lambda k: k.transpose(2, 0, 1, 3).reshape(1, 5, 12)),
  "abi,eoi->abeo": ((2, 4, 5), lambda k: k.transpose(2, 0, 1).reshape(1, 5, 8)),
  "gti,gio->gto": ((3, 4, 5), lambda k: k),
  None: ((2, 3, 4, 5), lambda k: k.reshape(6, 4, 5)),
}


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("eq", AXES)
def test_eckart_and_young_for_any_axes(eq, layers):
  shape, matrices = AXES[eq]
  site = leaf_site("w", shape, eq, layers)
  with jax.enable_x64(True):
    before, change = (values((*layers, *shape), i, jnp.float64) for i in range(2))
    params, errors = pelt.to_lora({"w": before + change}, 2, sites=(site,), base={"w": before})
    got, at = np.asarray(params["w"].materialize() - before), np.ndindex(*layers)
    for layer in at:
      want, error = best(matrices(np.asarray(change)[layer]), 2)
      np.testing.assert_allclose(matrices(got[layer]), want, rtol=0, atol=1e-13)
      np.testing.assert_allclose(errors["w"][layer].reshape(-1), error, rtol=1e-13)
      left = np.linalg.norm(got[layer] - change[layer]) / np.linalg.norm(change[layer])
      total = np.linalg.norm(matrices(np.asarray(change)[layer]), axis=(1, 2))
      np.testing.assert_allclose(left, np.linalg.norm(error * total) / np.linalg.norm(total))


def test_layers_of_a_stack_have_ranks_of_their_own():
  with jax.enable_x64(True):
    below = values((3, 6, 5), 0, jnp.float64)
    node = lora(below, 4, 1)
    node = node.replace(a=node.a.at[0, :, 1:].set(0), b=node.b.at[2].set(0))
    site = leaf_site("w", (6, 5), stacked=(3,))
    params, errors = pelt.to_lora({"w": node}, 1.0, sites=(site,), refit=True)
    made = params["w"]
    assert made.a.shape == (3, 6, 4) and made.stacked == 1
    used = np.abs(made.a).max(1) > 0, np.abs(made.b).max(2) > 0
    np.testing.assert_array_equal(used[0].sum(-1), [1, 4, 0])
    np.testing.assert_array_equal(used[0], used[1])
    np.testing.assert_array_equal(errors["w"], 0.0)
    np.testing.assert_allclose(delta(made), delta(node), atol=1e-14)


@pytest.mark.parametrize("mode", [pytest.param("loop", marks=pytest.mark.parity), "scan"])
def test_a_fine_tuned_model(mode):
  """Every matrix as numpy has it, looped and scanned; biases and norms whole; the model runs."""
  # Flax's LayerNorm promotes float64 with float32, which strict promotion forbids.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    before = tiny.in_mode(tiny.looped_params(jnp.float64), mode)
    model = tiny.Model(mode=mode, dtype=jnp.float64)
    sites = pelt.sites(model, *tiny.inputs())
    after = jax.tree.map(lambda x: x + 0.1 * values(x.shape, x.size + 7, x.dtype), before)
    params, errors = pelt.to_lora(after, 2, sites=sites, base=before)
    kinds = {path: type(v) for path, v in walk(params)}
    assert {p for p, kind in kinds.items() if kind is nodes.LoraWeight} == set(errors)
    assert all(kind is nodes.Tuned for p, kind in kinds.items() if p not in errors)
    assert {p.rpartition("/")[2] for p in set(kinds) - set(errors)} == {"bias", "scale"}
    merged = pelt.merge(params)
    for site in (s for s in sites if s.kind == "leaf"):
      attention = "/attn/" in site.path and site.path in errors
      shape = (*site.stacked, *((6, 6) if attention else site.shape))
      x, y, got = (np.asarray(get_at(t, site.path)).reshape(shape) for t in (before, after, merged))
      if site.path in errors:
        change, error = best(y - x, 2)
        y = x + change
        np.testing.assert_allclose(errors[site.path], error, rtol=1e-11)
      np.testing.assert_allclose(got, y, rtol=0, atol=1e-13)
    got = pelt.bypass(model.apply)({"params": params}, *tiny.inputs())
    np.testing.assert_allclose(got, model.apply({"params": merged}, *tiny.inputs()), atol=1e-12)


def test_loras_that_are_small_enough_stay_to_the_bit():
  with jax.enable_x64(True):
    below = values((6, 5), 0, jnp.float64)
    site = leaf_site("w", (6, 5))
    node = lora(below, 3, 1, dropout=nodes.Dropout(jnp.asarray(0.1)))
    for rank in (3, 5, 1.0):
      params, errors = pelt.to_lora({"w": node}, rank, sites=(site,))
      assert params["w"] is node and errors["w"] == 0
    made, errors = pelt.to_lora({"w": node}, 5, sites=(site,), refit=True)
    assert made["w"].a.shape == (6, 3) and made["w"].dropout is None
    np.testing.assert_allclose(delta(made["w"]), delta(node), atol=1e-14)
    made, errors = pelt.to_lora({"w": node}, 2, sites=(site,), group="other")
    want, error = best(delta(node), 2)
    np.testing.assert_allclose(delta(made["w"]), want, atol=1e-14)
    np.testing.assert_allclose(errors["w"], error, rtol=1e-12)
    assert made["w"].group == "other"


def test_several_and_fused_ones_become_one():
  with jax.enable_x64(True):
    below = values((6, 6), 0, jnp.float64)
    sites = (leaf_site("two", (6, 6)), leaf_site("fused", (6, 6), "...i,oi->...o"))
    two = lora(lora(below, 1, 1, scaling=3.0), 2, 3)
    fused = nodes.FusedLora(
      below, values((2, 6, 1), 5), values((2, 1, 2), 6), jnp.asarray(2.0), fused=0
    )
    params, errors = pelt.to_lora({"two": two, "fused": fused}, 3, sites=sites)
    for name, node, rank in (("two", two, 3), ("fused", fused, 2)):
      made = params[name]
      assert type(made) is nodes.LoraWeight and made.base is below and made.rank() == rank
      np.testing.assert_allclose(made.materialize(), node.materialize(), atol=1e-13)
      assert errors[name] < 1e-14


class Stretched(Weight):
  """A change that is no pair: each output times a number."""

  base: object = base()
  by: object = own()

  def materialize(self):
    value = materialize(self.base)
    return jnp.asarray(value * jnp.asarray(self.by, value.dtype)[None], value.dtype)


def test_changes_below_the_rounding_of_16_bits_count():
  """1.001 is 1 in bfloat16: the merged kernel has no change, the LoRA does."""
  below = values((6, 5), 0, jnp.bfloat16)
  node = Stretched(below, jnp.full(5, 1.001))
  site = leaf_site("w", (6, 5))
  np.testing.assert_array_equal(pelt.merge({"w": node})["w"], below)
  params, errors = pelt.to_lora({"w": node}, 5, sites=(site,))
  made = params["w"]
  assert made.a.dtype == made.b.dtype == made.scaling.dtype == jnp.float32
  want = 1e-3 * np.asarray(below, np.float32)
  np.testing.assert_allclose(made.a @ made.b, want, rtol=0, atol=1e-6)
  assert errors["w"] < 1e-5
  master = nodes.Tuned(jnp.asarray(below, jnp.float32) * 1.001, kind="bfloat16")
  params, _ = pelt.to_lora({"w": master}, 5, sites=(site,), base={"w": below}, dtype=jnp.bfloat16)
  assert params["w"].a.dtype == jnp.bfloat16 and params["w"].scaling.dtype == jnp.float32
  np.testing.assert_allclose(params["w"].a @ params["w"].b, want, rtol=0, atol=3e-5)


def test_rounding_has_no_rank():
  """A LoRA of rank 3 merged in float32: the sum's rounding is no change."""
  below = 5000 * values((40, 30), 0)
  site = leaf_site("w", (40, 30))
  merged = pelt.merge({"w": lora(below, 3, 1)})
  params, errors = pelt.to_lora(merged, 1.0, sites=(site,), base={"w": below})
  assert params["w"].a.shape == (40, 3) and 1e-5 < errors["w"] < 1e-2


def test_over_4_bits():
  below = quantize(values((64, 6), 0))
  site = leaf_site("w", (64, 6))
  for node in (lora(below, 4, 1), Stretched(below, values((6,), 2))):
    params, errors = pelt.to_lora({"w": node}, 3, sites=(site,))
    assert params["w"].base is below
    want, error = best(delta(node), 3)
    np.testing.assert_allclose(params["w"].a @ params["w"].b, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(errors["w"], error, rtol=1e-4)
  aware = pelt.quantization.MergeAware(lora(below, 2, 1))
  params, errors = pelt.to_lora({"w": aware}, 6, sites=(site,))
  np.testing.assert_allclose(params["w"].materialize(), aware.materialize(), rtol=0, atol=1e-5)
  assert isinstance(params["w"].base, NF4Weight) and errors["w"] < 1e-5


def test_a_base_that_training_changed():
  """A LoRA over W - a_0 b_0, as PiSSA has it, is one of twice the rank over W."""
  with jax.enable_x64(True):
    before = values((6, 5), 0, jnp.float64)
    node = lora(before, 2, 1)
    node = node.replace(base=before - delta(node.replace(a=node.a + 1)))
    site = leaf_site("w", (6, 5))
    params, errors = pelt.to_lora({"w": node}, 4, sites=(site,), base={"w": before})
    assert params["w"].base is before and errors["w"] < 1e-14
    np.testing.assert_allclose(params["w"].materialize(), node.materialize(), atol=1e-13)


def test_what_stays_whole():
  """The head by default; what `keep` names; a head that the base lacks; what did not change."""
  sites = (
    leaf_site("body/kernel", (4, 4)),
    leaf_site("body/bias", (4,), None),
    leaf_site("heads/bias", (2, 2), None),
    leaf_site("heads/kernel", (4, 2, 2), "abf,fhd->abhd"),
    leaf_site("head/kernel", (4, 3), roles=("head",)),
  )
  before = update_at({}, {s.path: values(s.shape, i) for i, s in enumerate(sites)})
  after = jax.tree.map(lambda x: x + 1, before)
  kinds = lambda params: {
    p: "lora" if type(v) is nodes.LoraWeight else type(v) is nodes.Tuned for p, v in walk(params)
  }
  made, _ = pelt.to_lora(after, 2, sites=sites, base=before)
  want = {"body/kernel": "lora", "body/bias": True, "heads/bias": True, "heads/kernel": "lora"}
  assert kinds(made) == want | {"head/kernel": True}
  np.testing.assert_array_equal(made["head"]["kernel"].value, after["head"]["kernel"])
  made, _ = pelt.to_lora(after, 2, sites=sites, base=before, keep="heads")
  assert kinds(made) == want | {"head/kernel": "lora", "heads/kernel": True}
  made, _ = pelt.to_lora(after, 2, sites=sites, base=before, keep=())
  assert kinds(made) == want | {"head/kernel": "lora"}
  headless = {k: v for k, v in before.items() if k != "head"}
  made, _ = pelt.to_lora(after, 2, sites=sites, base=headless)
  assert kinds(made)["head/kernel"] is True
  some = update_at(after, {p: get_at(before, p) for p in ("body/bias", "heads/kernel")})
  made, errors = pelt.to_lora(some, 2, sites=sites, base=before)
  assert set(errors) == {"body/kernel"}
  assert not kinds(made)["body/bias"] and not kinds(made)["heads/kernel"]

  nodes_in = update_at(
    before,
    {
      "body/kernel": lora(before["body"]["kernel"], 3, 1),
      "body/bias": nodes.Tuned(after["body"]["bias"]),
      "head/kernel": nodes.Tuned(after["head"]["kernel"], group="head"),
    },
  )
  made, errors = pelt.to_lora(nodes_in, 2, sites=sites)
  assert set(errors) == {"body/kernel"}
  assert made["head"]["kernel"] is nodes_in["head"]["kernel"]
  assert made["body"]["bias"] is nodes_in["body"]["bias"]
  assert made["heads"]["kernel"] is before["heads"]["kernel"]


def test_boxes():
  box = lambda value, *names: meta.Partitioned(value, names)
  before = {"w": box(values((4, 6), 0), "data", "model"), "b": box(values((6,), 1), "model")}
  after = jax.tree.map(lambda x: x + 1, before)
  sites = (leaf_site("w", (4, 6)), leaf_site("b", (6,), None))
  params, _ = pelt.to_lora(after, 1, sites=sites, base=before)
  assert params["w"].a.names == ("data", None) and params["w"].b.names == (None, "model")
  assert params["b"].value.names == ("model",) and params["w"].base is before["w"]
  merged = pelt.merge(params)
  assert merged["w"].names == ("data", "model")
  np.testing.assert_allclose(merged["w"].value, after["w"].value, atol=1e-6)


def test_saved_and_counted(tmp_path):
  before = {"w": values((6, 5), 0), "b": values((5,), 1)}
  sites = (leaf_site("w", (6, 5)), leaf_site("b", (5,), None))
  after = jax.tree.map(lambda x: x + values(x.shape, x.size), before)
  params, _ = pelt.to_lora(after, 2, sites=sites, base=before)
  pelt.save(tmp_path, params)
  again = pelt.load(tmp_path, before)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  counts = pelt.count(params)
  assert (counts.trainable, counts.stored, counts.rank) == (2 * 11 + 5, 2 * 11 + 5, 2)


def test_bad_input():
  model, x = nn.Dense(5), jnp.ones((2, 6))
  before = model.init(jax.random.key(0), x)["params"]
  sites = pelt.sites(model, x)
  after = jax.tree.map(lambda v: v + 1, before)
  convert = lambda params=after, rank=2, **kw: pelt.to_lora(
    params, rank, **{"sites": sites, "base": before} | kw
  )
  for rank in (0, -1, True, 0.0, 1.5, "8", None):
    with pytest.raises((ValueError, TypeError), match="rank|to_lora"):
      convert(rank=rank)
  with pytest.raises(ValueError, match="'kernel'.*pass base="):
    convert(jax.tree.map(nodes.Tuned, after), base=None)
  with pytest.raises(ValueError, match="no matrix changed"):
    convert(before)
  with pytest.raises(ValueError, match="no matrix changed"):
    convert(before, base=None)
  with pytest.raises(ValueError, match="base holds a Tuned at 'bias'"):
    convert(base=before | {"bias": nodes.Tuned(before["bias"])})
  with pytest.raises(ValueError, match="no leaf 'kernel'"):
    convert(base={"bias": before["bias"]})
  with pytest.raises(ValueError, match="'kernel' has shape"):
    convert(base=before | {"kernel": jnp.ones((5, 5))})
  with pytest.raises(ValueError, match="'kernel' holds infinities or NaNs"):
    convert(after | {"kernel": after["kernel"].at[0, 0].set(jnp.nan)})
  with pytest.raises(ValueError, match="matches no leaf site"):
    convert(keep="ker")
  with pytest.raises(TypeError, match="outside jax.jit"):
    jax.jit(lambda p: convert(p)[0])(after)


def test_changes_that_depend_on_the_input_are_named():
  below, x = values((4, 4), 0), values((1, 4), 1)
  gate = nodes.MeanGate(values((4, 1), 2), jnp.zeros(1))
  gated = lora(below, 2, 3).replace(scaling=gate)
  with pytest.raises(ValueError, match="(?s)cannot be merged.*first: .*second/bypass: .*After"):
    pelt.to_lora(
      {
        "first": gated,
        "second": {"bypass": nodes.After(nodes.Bottleneck(x.T, None, x, None)), "kernel": below},
      },
      2,
      sites=(leaf_site("first", (4, 4)), leaf_site("second/kernel", (4, 4))),
    )


def test_what_waits_for_a_generator():
  x = jnp.ones((2, 6))
  model = nn.Dense(4, use_bias=False)
  base = model.init(jax.random.key(0), x)["params"]
  sites = pelt.sites(model, x)
  params = pelt.vera(rank=3, targets="kernel").init(jax.random.key(1), base, sites)
  params["kernel"] = params["kernel"].replace(lambda_b=jnp.arange(4.0))
  made, errors = pelt.to_lora(params, 3, sites=sites)
  np.testing.assert_allclose(
    pelt.merge(made)["kernel"], pelt.merge(params)["kernel"], rtol=0, atol=1e-5
  )
  assert float(errors["kernel"]) < 1e-5
