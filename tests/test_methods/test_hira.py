"""HiRA: closed forms, then its identities."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests.test_core.tiny import values
from tests.test_methods import matrices
from tests.test_methods.matrices import close, dense, moved

METHOD = pelt.hira(2, targets="kernel")
DROPPED = pelt.hira(2, dropout=0.5, targets="kernel")
BOTH = pytest.mark.parametrize("method", [METHOD, DROPPED], ids=["plain", "dropout"])


def test_closed_form():
  """Exact in binary: 1 + a b = [[2, 3], [1, 1]]."""
  x, w, model = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]]), nn.Dense(2)
  base = {"kernel": w, "bias": jnp.ones(2)}
  params = pelt.hira(1, targets="kernel").init(jax.random.key(0), base, pelt.sites(model, x))
  params["kernel"] = params["kernel"].replace(
    a=jnp.array([[1.0], [0.0]]), b=jnp.array([[1.0, 2.0]])
  )
  np.testing.assert_array_equal(pelt.merge(params)["kernel"], [[2.0, 6.0], [3.0, 4.0]])
  np.testing.assert_array_equal(pelt.bypass(model.apply)({"params": params}, x), [[9.0, 15.0]])


@BOTH
def test_starts_as_the_base(method):
  matrices.starts_as_the_base(method, {"b"})


@BOTH
def test_formula_count_and_rank(method):
  """Of full rank, though a b has rank 2."""
  formula = lambda w, b, f: (w * (1 + f["a"] @ f["b"]), b)
  assert matrices.computes(method, formula, 32, 6) == 6


@BOTH
def test_axes_rows_files(method, tmp_path):
  matrices.reads_axes(method)
  matrices.serves_rows(method)
  matrices.goes_through_files(method, tmp_path)


@pytest.mark.parity
@BOTH
def test_codes_and_bfloat16(method):
  matrices.runs_over_codes(method)
  matrices.is_bfloat16(method)


@pytest.mark.parity
def test_scanned_layers():
  matrices.stacks(pelt.hira(2, targets=("attn/value", "attn/out", "mlp/up")))


def test_specs():
  assert matrices.specs_of(METHOD) == {"a": ("row", None), "b": (None, "model")}


def test_gradients_are_those_of_the_factor_times_the_base():
  with jax.enable_x64(True):
    model, x, base, params = dense(METHOD)
    params, g = moved(params), values((5, 10), 3)
    loss = lambda p: jnp.sum(pelt.bypass(model.apply)({"params": p}, x) * g)
    _, grads = pelt.value_and_grad(loss)(*pelt.partition(params))
    dw = base["kernel"] * (x.T @ g)
    close(grads["kernel"].a, dw @ params["kernel"].b.T)
    close(grads["kernel"].b, params["kernel"].a.T @ dw)


class Tied(nn.Module):
  """A table that is looked up and also read as the head."""

  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(11, 6, param_dtype=jnp.result_type(float), name="emb")
    return table.attend(jnp.tanh(table(ids)))


def test_tables_start_the_other_way_and_serve_a_tied_head():
  ids = jnp.array([[1, 10, 3, 0]])
  with jax.enable_x64(True):
    base = {"emb": {"embedding": values((11, 6), 0)}}
    method = pelt.hira(2, targets="emb", dropout=0.5)
    params = method.init(jax.random.key(1), base, pelt.sites(Tied(), ids))
    node = params["emb"]["embedding"]
    assert not jnp.any(node.a) and jnp.any(node.b) and node.dropout is None
    assert pelt.count(params).trainable == 2 * (11 + 6)
    apply = pelt.bypass(Tied().apply)
    plain = Tied().apply({"params": base}, ids)
    np.testing.assert_array_equal(apply({"params": params}, ids), plain)
    params = moved(params)
    node = params["emb"]["embedding"]
    table = base["emb"]["embedding"] * (1 + node.a @ node.b)
    want = jnp.tanh(table[ids]) @ table.T
    close(apply({"params": params}, ids), want)
    close(Tied().apply({"params": pelt.merge(params)}, ids), want)


def test_small_changes_are_not_rounded_away_in_bfloat16():
  """1 + a b = 1 + 2^-10 is 1 in bfloat16; the change of y is still there, beside y = 0."""
  with jax.numpy_dtype_promotion("standard"):
    x = jnp.asarray([[1.0, -1.0]], jnp.bfloat16)
    model = nn.Dense(1, use_bias=False, param_dtype=jnp.bfloat16)
    base = {"kernel": jnp.ones((2, 1), jnp.bfloat16)}
    method = pelt.hira(1, targets="kernel")
    node = method.init(jax.random.key(0), base, pelt.sites(model, x))["kernel"]
    node = node.replace(
      a=jnp.asarray([[2.0**-10], [0.0]], jnp.bfloat16), b=jnp.ones((1, 1), jnp.bfloat16)
    )
    y = pelt.bypass(model.apply)({"params": {"kernel": node}}, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), [[2.0**-10]])


def test_dropout_acts_on_the_change_alone():
  """The mean of many runs is the run without; with a b = 0 nothing is dropped."""
  model, x, base, params = dense(DROPPED)
  apply = pelt.bypass(model.apply)
  run = lambda p, i: apply({"params": p}, x, train_nodes=True, rngs={"dropout": jax.random.key(i)})
  np.testing.assert_array_equal(run(params, 0), model.apply({"params": base}, x))
  params = moved(params)
  still = apply({"params": params}, x)
  mean = jax.jit(jax.vmap(lambda i: run(params, i)))(jnp.arange(2000)).mean(0)
  assert jnp.abs(run(params, 0) - still).max() > 0.01
  # 2,000 runs, whose entries have a standard deviation below 1
  close(mean, still, 0.12)


def test_over_a_lora_it_multiplies_what_that_made():
  with jax.enable_x64(True):
    model, x, _, params = dense(pelt.chain(pelt.lora(2, targets="kernel"), METHOD))
    params = moved(params)
    node = params["kernel"]
    whole = node.base.base + node.base.a @ node.base.b
    close(pelt.merge(params)["kernel"], whole * (1 + node.a @ node.b))
    y = pelt.bypass(model.apply)({"params": params}, x)
    close(y, model.apply({"params": pelt.merge(params)}, x))


def test_bad_input():
  for options, match in ((dict(rank=0), "rank must be"), (dict(dropout=1.5), "dropout must be")):
    with pytest.raises(ValueError, match=match):
      pelt.hira(**options)
  matrices.refuses_bad_targets(lambda t: pelt.hira(2, targets=t))
  with pytest.raises(ValueError, match="rank 7 exceeds the matrix at 'kernel', which is 6 x 10"):
    dense(pelt.hira(7, targets="kernel"))
