"""LoHa: closed forms, then its identities."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from tests.test_core.tiny import values
from tests.test_methods import matrices
from tests.test_methods.matrices import close, dense, moved

METHOD = pelt.loha(2, 3, targets="kernel")


def test_closed_form():
  """Exact in binary; alpha = 8 and rank = 1 tell 8/1 from 1. Rank 1 twice is rank 1."""
  x, model = jnp.array([[1.0, 2.0]]), nn.Dense(2, use_bias=False)
  params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
  params = pelt.loha(1, 8, targets="kernel").init(jax.random.key(0), params, pelt.sites(model, x))
  params["kernel"] = params["kernel"].replace(
    a1=jnp.array([[1.0], [2.0]]),
    b1=jnp.array([[1.0, -1.0]]),
    a2=jnp.array([[0.5], [0.25]]),
    b2=jnp.array([[2.0, 1.0]]),
  )
  # [[1, -1], [2, -2]] * [[1, .5], [.5, .25]] * 8 = [[8, -4], [8, -4]]
  np.testing.assert_array_equal(pelt.merge(params)["kernel"], [[9.0, -4.0], [8.0, -3.0]])
  np.testing.assert_array_equal(pelt.bypass(model.apply)({"params": params}, x), [[25.0, -10.0]])


def test_starts_as_the_base():
  matrices.starts_as_the_base(METHOD, {"a2"})


def test_formula_count_and_rank():
  """Two products of rank 2 make rank 4, which a LoRA of as many numbers has too."""
  formula = lambda w, b, f: (w + 1.5 * (f["a1"] @ f["b1"]) * (f["a2"] @ f["b2"]), b)
  assert matrices.computes(METHOD, formula, 64, 4) == 4
  assert matrices.computes(pelt.loha(6, targets="kernel"), lambda w, b, f: (
    w + (f["a1"] @ f["b1"]) * (f["a2"] @ f["b2"]), b), 192, 6) == 6  # fmt: skip


def test_axes_rows_files(tmp_path):
  matrices.reads_axes(METHOD)
  matrices.serves_rows(METHOD)
  matrices.goes_through_files(METHOD, tmp_path)


@pytest.mark.parity
def test_codes_and_bfloat16():
  matrices.runs_over_codes(METHOD)
  matrices.is_bfloat16(METHOD)


@pytest.mark.parity
def test_scanned_layers():
  matrices.stacks(pelt.loha(2, 3, targets=("attn/value", "attn/out", "mlp/up")))


def test_specs():
  sides = {"a": ("row", None), "b": (None, "model")}
  assert matrices.specs_of(METHOD) == {f"{s}{i}": v for s, v in sides.items() for i in (1, 2)}


def test_ones_in_the_second_pair_leave_a_lora():
  with jax.enable_x64(True):
    model, x, base, params = dense(METHOD)
    node = moved(params)["kernel"]
    node = node.replace(a2=jnp.full((6, 2), 0.5), b2=jnp.ones((2, 10)))
    lora = nodes.LoraWeight(base["kernel"], node.a1, node.b1, node.scaling)
    one, two = (
      pelt.bypass(model.apply)({"params": {**base, "kernel": n}}, x) for n in (node, lora)
    )
    close(one, two)


def test_gradients_are_those_of_the_whole_change_and_it_is_not_kept():
  with jax.enable_x64(True):
    model, x, _, params = dense(METHOD)
    params, g = moved(params), values((5, 10), 3)
    apply = pelt.bypass(model.apply)
    loss = lambda p: jnp.sum(apply({"params": p}, x) * g)
    _, grads = pelt.value_and_grad(loss)(*pelt.partition(params))
    node, got = params["kernel"], grads["kernel"]
    one, two = node.a1 @ node.b1, node.a2 @ node.b2
    dw = 1.5 * x.T @ g
    close(got.a1, (dw * two) @ node.b1.T)
    close(got.b2, node.a2.T @ (dw * one))
    kept = jax.vjp(
      lambda t: loss(pelt.combine(t, pelt.partition(params)[1])), pelt.partition(params)[0]
    )[1]
    shapes = [v.shape for v in jax.tree.leaves(kept)]
    assert shapes.count((6, 10)) <= 1  # the base alone


def test_init_distributions():
  model, x = nn.Dense(300), jnp.ones((1, 400))
  params = model.init(jax.random.key(0), x)["params"]
  method = pelt.loha(50, targets="kernel")
  node = method.init(jax.random.key(1), params, pelt.sites(model, x))["kernel"]
  for drawn, fan_in in ((node.a1, 400), (node.b1, 50), (node.b2, 50)):
    bound = 1 / math.sqrt(fan_in)
    assert 0.99 * bound < jnp.abs(drawn).max() <= bound
    assert abs(float(jnp.std(drawn)) * math.sqrt(3) / bound - 1) < 0.03
  assert jnp.abs(node.b1 - node.b2).max() > 0.01


def test_bad_input():
  for options, match in ((dict(rank=0), "rank must be"), (dict(alpha=-1.0), "alpha must be")):
    with pytest.raises(ValueError, match=match):
      pelt.loha(**options)
  init = matrices.refuses_bad_targets(lambda t: pelt.loha(2, targets=t))
  with pytest.raises(ValueError, match="table whose rows are looked up"):
    init("emb")
  with pytest.raises(ValueError, match="rank 7 exceeds the matrix at 'kernel', which is 6 x 10"):
    dense(pelt.loha(7, targets="kernel"))
