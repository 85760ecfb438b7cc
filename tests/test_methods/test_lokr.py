"""LoKr: closed forms, then its identities."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax.methods._lokr import divisors, lokr_shapes
from tests.test_methods import matrices
from tests.test_methods.matrices import close, dense, moved

# 6 = 2 * 3 and 10 = 2 * 5: w1 is (2, 2), w2 (3, 5).
LOW = pelt.lokr(1, 3, targets="kernel")
WHOLE = pelt.lokr(4, 3, targets="kernel")
SPLIT = pelt.lokr(1, 3, factor=5, decompose_both=True, init="lycoris", targets="kernel")
ALL = pytest.mark.parametrize("method", [LOW, WHOLE, SPLIT], ids=["low", "whole", "both"])


def test_closed_form():
  """Exact in binary: kron of (1, 2) x (1, 1) and (2, 1) x (1, 2), out index 2 l + k."""
  x, model = jnp.array([[1.0, 2.0, 3.0, 4.0]]), nn.Dense(2, use_bias=False)
  base = {"kernel": jnp.zeros((4, 2))}
  method = pelt.lokr(1, 4, factor=2, targets="kernel")
  params = method.init(jax.random.key(0), base, pelt.sites(model, x))
  node = params["kernel"]
  assert node.w1.shape == (2, 2) and node.w2.shape == (2, 1)
  node = node.replace(w1=jnp.array([[1.0, 0.0], [2.0, 1.0]]), w2=jnp.array([[1.0], [3.0]]))
  want = 4 * np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [6.0, 3.0]])
  np.testing.assert_array_equal(pelt.merge({"kernel": node})["kernel"], want)
  y = pelt.bypass(model.apply)({"params": {"kernel": node}}, x)
  np.testing.assert_array_equal(y, x @ want)


def test_divisors():
  fixtures = {
    (4096, 1024): (1024, 4),
    (12, 6): (6, 2),
    (768, -1): (24, 32),
    (3072, -1): (48, 64),
    (4096, -1): (64, 64),
    (11008, -1): (86, 128),
    (127, -1): (1, 127),
    (2304, -1): (48, 48),
    (50257, -1): (29, 1733),
    (4096, 8): (8, 512),
    (768, 10): (8, 96),
    (768, 7): (6, 128),
    (12, 4): (4, 3),
  }
  assert {k: divisors(*k) for k in fixtures} == fixtures


def test_what_is_decomposed():
  """2 r below the larger side of a factor decides."""
  assert lokr_shapes(6, 10, 1, -1, False) == {"w1": (2, 2), "w2_a": (3, 1), "w2_b": (1, 5)}
  assert lokr_shapes(6, 10, 2, -1, False).keys() == {"w1", "w2_a", "w2_b"}
  assert lokr_shapes(6, 10, 3, -1, False) == {"w1": (2, 2), "w2": (3, 5)}
  assert lokr_shapes(6, 10, 1, -1, True).keys() == {"w1", "w2_a", "w2_b"}
  assert lokr_shapes(6, 10, 1, 5, True) == {
    "w1_a": (2, 1),
    "w1_b": (1, 5),
    "w2_a": (3, 1),
    "w2_b": (1, 2),
  }


def test_starts_as_the_base():
  matrices.starts_as_the_base(LOW, {"w1"})
  matrices.starts_as_the_base(SPLIT, {"w2_a"})


@pytest.mark.parity
def test_starts_as_the_base_however_it_is_cut():
  matrices.starts_as_the_base(WHOLE, {"w1"})
  both = pelt.lokr(1, factor=5, decompose_both=True, targets="kernel")
  matrices.starts_as_the_base(both, {"w1_b"})
  matrices.starts_as_the_base(pelt.lokr(4, init="lycoris", targets="kernel"), {"w2"})


def test_formulas_counts_and_ranks():
  """numpy's kron, in the other order of a and b as in torch: kron of transposes."""
  second = lambda f: f["w2"] if "w2" in f else f["w2_a"] @ f["w2_b"]
  first = lambda f: f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
  formula = lambda s: lambda w, b, f: (w + s * jnp.kron(first(f), second(f)), b)
  assert matrices.computes(LOW, formula(3.0), 4 + 3 + 5, 2) == 2
  assert matrices.computes(WHOLE, formula(0.75), 4 + 15, 6) == 6
  assert matrices.computes(SPLIT, formula(3.0), 7 + 5, 1) == 1
  # the counts of a matrix of (6, 10) and one of (10, 8) beside it
  sizes = [sum(a * b for m in ((6, 10), (10, 8)) for a, b in lokr_shapes(*m, r, -1, False).values())
           for r in (1, 2, 64)]  # fmt: skip
  assert sizes == [25, 42, 43]


@ALL
def test_axes_rows_files(method, tmp_path):
  matrices.reads_axes(method)
  matrices.serves_rows(method)
  matrices.goes_through_files(method, tmp_path)


@pytest.mark.parity
@ALL
def test_codes_and_bfloat16(method):
  matrices.runs_over_codes(method)
  matrices.is_bfloat16(method)


@pytest.mark.parity
def test_scanned_layers():
  matrices.stacks(pelt.lokr(1, 3, targets=("attn/out", "mlp/up", "mlp/down")))


def test_specs():
  assert set(matrices.specs_of(LOW).values()) == {()}


def test_no_product_of_the_kernel_s_size_is_made():
  """Only the base is (in, out) in the program of a product, forward and backward."""
  model, x, _, params = dense(pelt.lokr(2, targets="kernel"), 48, 64)
  trainable, frozen = pelt.partition(params)
  loss = lambda t: jnp.sum(pelt.bypass(model.apply)({"params": pelt.combine(t, frozen)}, x))
  jaxpr = str(jax.make_jaxpr(jax.grad(loss))(trainable))
  assert "f32[5,6,8]" in jaxpr  # x as (in_m, in_n)
  made = [line for line in jaxpr.splitlines() if ":f32[48,64] =" in line]
  assert not made, made


def test_init_distributions():
  model, x = nn.Dense(300), jnp.ones((1, 400))
  params = model.init(jax.random.key(0), x)["params"]
  init = lambda *a, **k: pelt.lokr(*a, targets="kernel", **k).init(
    jax.random.key(1), params, pelt.sites(model, x)
  )["kernel"]
  low, whole = init(4), init(64, init="lycoris")
  assert low.w1.shape == (20, 15) and whole.w1.shape == (20, 15) and whole.w2.shape == (20, 20)
  for drawn, fan_in in ((low.w2_a, 20), (low.w2_b, 4), (whole.w1, 20)):
    bound = 1 / math.sqrt(fan_in)
    assert 0.9 * bound < jnp.abs(drawn).max() <= bound
  assert float(low.scaling) == 1.0 and float(init(4, 6).scaling) == 1.5
  assert not jnp.any(low.w1) and not jnp.any(whole.w2)


def test_identity_as_the_first_factor_gives_equal_blocks():
  with jax.enable_x64(True):
    model, x, base, params = dense(WHOLE)
    node = moved(params)["kernel"].replace(w1=jnp.eye(2))
    change = pelt.merge({**params, "kernel": node})["kernel"] - base["kernel"]
    close(change[:3, :5], 0.75 * node.w2)
    close(change[3:, 5:], 0.75 * node.w2)
    close(change[3:, :5], 0.0)
    del model, x


def test_bad_input():
  for options, match in (
    (dict(rank=0), "rank must be"),
    (dict(alpha=0.0), "alpha must be"),
    (dict(factor=0), "factor must be"),
    (dict(init="zero"), "init must be"),
  ):
    with pytest.raises(ValueError, match=match):
      pelt.lokr(**options)
  init = matrices.refuses_bad_targets(lambda t: pelt.lokr(2, targets=t))
  with pytest.raises(ValueError, match="table whose rows are looked up"):
    init("emb")
