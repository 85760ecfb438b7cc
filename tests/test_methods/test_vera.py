"""VeRA: closed forms, then its identities."""

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

METHOD = pelt.vera(4, targets="kernel")


def pair_of(params):
  (pair,) = params["generators"].values()
  return pair


def test_closed_form():
  """Exact in binary: x a = (3, 1), by lambda_d (6, 0.5), by b (6, 12.5), by lambda_b (12, -25)."""
  x, model = jnp.array([[1.0, 2.0]]), nn.Dense(2, use_bias=False)
  params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
  params = pelt.vera(2, targets="kernel").init(jax.random.key(0), params, pelt.sites(model, x))
  lambda_b, lambda_d = jnp.array([2.0, -2.0]), jnp.array([2.0, 0.5])
  params["kernel"] = params["kernel"].replace(lambda_b=lambda_b, lambda_d=lambda_d)
  a, b = jnp.array([[1.0, 1.0], [1.0, 0.0]]), jnp.array([[1.0, 2.0], [0.0, 1.0]])
  params["generators"] = {"000_vera": nodes.VeraPair(a, b, name="000_vera")}
  np.testing.assert_array_equal(pelt.bypass(model.apply)({"params": params}, x), [[13.0, -23.0]])
  np.testing.assert_array_equal(pelt.merge(params)["kernel"], [[5.0, -9.0], [4.0, -7.0]])


def test_starts_as_the_base():
  matrices.starts_as_the_base(METHOD, {"lambda_b"})


def test_formula_count_and_rank():
  with jax.enable_x64(True):
    pair = pair_of(dense(METHOD)[3])

  def formula(w, b, f):
    return w + (pair.a * f["lambda_d"][None]) @ (pair.b * f["lambda_b"][None]), b

  assert matrices.computes(METHOD, formula, 14, 4) == 4


def test_axes_rows_files(tmp_path):
  matrices.reads_axes(METHOD)
  matrices.serves_rows(METHOD)
  matrices.goes_through_files(METHOD, tmp_path, shared=4 * 16)


@pytest.mark.parity
def test_codes_and_bfloat16():
  matrices.runs_over_codes(METHOD)
  matrices.is_bfloat16(METHOD)


def test_scanned_layers_read_one_pair():
  matrices.stacks(pelt.vera(4, targets=("attn/query", "attn/out", "mlp/down")))


def test_specs():
  assert matrices.specs_of(METHOD) == {"lambda_b": ("model",), "lambda_d": ()}


class Two(nn.Module):
  """Matrices of (6, 4), (4, 9), (9, 4) and again (4, 9)."""

  @nn.compact
  def __call__(self, x):
    layer = lambda n, name: nn.Dense(n, name=name, param_dtype=x.dtype)
    return layer(9, "d")(layer(4, "c")(layer(9, "b")(layer(4, "a")(x))))


def made(method=METHOD):
  x = values((3, 6), 0)
  base = Two().init(jax.random.key(0), x)["params"]
  return x, base, method.init(jax.random.key(1), base, pelt.sites(Two(), x))


def test_one_pair_as_large_as_needed_serves_all_and_is_the_lora_of_its_slices():
  with jax.enable_x64(True):
    x, base, params = made()
    pair = pair_of(params)
    assert pair.a.shape == (9, 4) and pair.b.shape == (4, 9)
    assert pelt.count(params).trainable == 4 + 9 + 4 + 9 + 4 * 4 == pelt.count(params).stored
    params = moved(params)
    lora = dict(base)
    for name in "abcd":
      v = params[name]["kernel"]
      n_in, n_out = v.base.shape
      a, b = pair.a[:n_in] * v.lambda_d[None], pair.b[:, :n_out] * v.lambda_b[None]
      lora[name] = {**base[name], "kernel": nodes.LoraWeight(v.base, a, b, jnp.ones(()))}
    apply = pelt.bypass(Two().apply)
    want = apply({"params": params}, x)
    close(apply({"params": lora}, x), want)
    # linear in each lambda_b: half of the last one's change is half of the output's
    half = params["d"]["kernel"].replace(lambda_b=params["d"]["kernel"].lambda_b / 2)
    none = params["d"]["kernel"].replace(lambda_b=0 * half.lambda_b)
    run = lambda node: apply({"params": {**params, "d": {**params["d"], "kernel": node}}}, x)
    close(run(half) - run(none), (want - run(none)) / 2)
    with pytest.raises(ValueError, match="waits for its pair"):
      Two().apply({"params": params}, x)


def test_the_pair_is_drawn_from_the_seed_alone_and_uniformly():
  model, x = nn.Dense(300), jnp.ones((1, 400))
  params = model.init(jax.random.key(0), x)["params"]
  draw = lambda key, **options: pair_of(
    pelt.vera(50, targets="kernel", **options).init(
      jax.random.key(key), params, pelt.sites(model, x)
    )
  )
  pair, other, third = draw(0), draw(7), draw(0, seed=1)
  np.testing.assert_array_equal(pair.a, other.a)
  assert jnp.abs(pair.a - third.a).max() > 0.01
  for drawn, fan_in in ((pair.a, 400), (pair.b, 50)):
    bound = math.sqrt(6 / fan_in)
    assert 0.99 * bound < jnp.abs(drawn).max() <= bound
    assert abs(float(jnp.std(drawn)) * math.sqrt(3) / bound - 1) < 0.02
  assert jnp.abs(pair.a.reshape(-1)[:9] - pair.b.reshape(-1)[:9] * math.sqrt(50 / 400)).max() > 0.01


def test_two_of_them_have_pairs_of_their_own():
  with jax.enable_x64(True):
    x, base, params = made(pelt.chain(METHOD, pelt.vera(2, seed=1, targets=("a", "d"))))
    params = moved(params)
    assert sorted(params["generators"]) == ["000_vera", "001_vera"]
    merged = Two().apply({"params": pelt.merge(params)}, x)
    close(merged, pelt.bypass(Two().apply)({"params": params}, x))
    a = params["a"]["kernel"]
    first, second = (params["generators"][f"00{i}_vera"] for i in (0, 1))
    delta = (first.a[:6] * a.base.lambda_d[None]) @ (first.b[:, :4] * a.base.lambda_b[None])
    delta += (second.a[:6] * a.lambda_d[None]) @ (second.b[:, :4] * a.lambda_b[None])
    close(pelt.merge(params)["a"]["kernel"] - base["a"]["kernel"], delta)


def test_fold_keeps_the_pair_once_and_other_pairs_fit_no_bank():
  _, _, params = made()
  assert pelt.fold(params)["generators"].keys() == {"000_vera"}
  assert pelt.fold(params)["a"]["kernel"].a is None
  trained = pelt.partition(params)[0]
  assert not jax.tree.leaves(trained["generators"])
  with pytest.raises(ValueError, match="different numbers at 'generators/000_vera'"):
    pelt.bank([params, made(pelt.vera(4, seed=3, targets="kernel"))[2]])


def test_dropout_acts_on_the_input_of_a_in_training():
  model, x, _, params = dense(pelt.vera(4, dropout=0.5, targets="kernel"))
  params, apply = moved(params), pelt.bypass(model.apply)
  still = apply({"params": params}, x)
  run = lambda i: apply(
    {"params": params}, x, train_nodes=True, rngs={"dropout": jax.random.key(i)}
  )
  assert jnp.abs(run(0) - still).max() > 0.01
  # the mean of 2,000 runs, whose entries have a standard deviation below 1
  close(jax.jit(jax.vmap(run))(jnp.arange(2000)).mean(0), still, 0.12)


def test_bad_input():
  for options, match in (
    (dict(rank=0), "rank must be"),
    (dict(d_initial=0.0), "d_initial must be"),
    (dict(dropout=1.0), "dropout must be"),
  ):
    with pytest.raises(ValueError, match=match):
      pelt.vera(**options)
  init = matrices.refuses_bad_targets(lambda t: pelt.vera(2, targets=t))
  with pytest.raises(ValueError, match="table whose rows are looked up"):
    init("emb")


def test_a_second_pair_takes_no_other_name():
  x = jnp.ones((2, 6))
  model = nn.Dense(4)
  base = model.init(jax.random.key(0), x)["params"]
  sites = pelt.sites(model, x)
  one = pelt.vera(rank=3, targets="kernel").init(jax.random.key(1), base, sites)
  (name,) = one["generators"]
  later = {**one, "generators": {name.replace("000", "001"): one["generators"][name]}}
  two = pelt.vera(rank=2, targets="kernel").init(jax.random.key(2), later, sites)
  assert sorted(two["generators"]) == ["001_vera", "002_vera"]
