"""IA3: closed forms, then its identities."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests.test_core.tiny import values
from tests.test_methods import matrices
from tests.test_methods.matrices import close, dense, moved

OUTPUTS = pelt.ia3("kernel", feedforward=())
INPUTS = pelt.ia3((), feedforward="kernel")
BOTH = pytest.mark.parametrize("method", [OUTPUTS, INPUTS], ids=["outputs", "inputs"])


def test_closed_forms():
  """Exact in binary: outputs are scaled with the bias, inputs without."""
  x, w, b = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, -1.0])
  model, scale = nn.Dense(2), jnp.array([2.0, 0.5])
  for method, want, kernel, bias in (
    (OUTPUTS, [[16.0, 4.5]], [[2.0, 1.0], [6.0, 2.0]], [2.0, -0.5]),  # (7, 10) + b = (8, 9)
    (INPUTS, [[6.0, 7.0]], [[2.0, 4.0], [1.5, 2.0]], [1.0, -1.0]),  # x scale = (2, 1)
  ):
    params = method.init(jax.random.key(0), {"kernel": w, "bias": b}, pelt.sites(model, x))
    params["kernel"] = params["kernel"].replace(scale=scale)
    np.testing.assert_array_equal(pelt.bypass(model.apply)({"params": params}, x), want)
    merged = pelt.merge(params)
    np.testing.assert_array_equal(merged["kernel"], kernel)
    np.testing.assert_array_equal(merged["bias"], bias)


@BOTH
def test_starts_as_the_base(method):
  matrices.starts_as_the_base(method, {"scale"})


def test_formulas_counts_and_ranks():
  columns = lambda w, b, f: (w * f["scale"][None], b * f["scale"])
  assert matrices.computes(OUTPUTS, columns, 10, 6) == 6
  assert matrices.computes(OUTPUTS, columns, 10, 6, bias=False) == 6
  rows = lambda w, b, f: (w * f["scale"][:, None], b)
  assert matrices.computes(INPUTS, rows, 6, 6) == 6


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


def test_scanned_layers():
  method = pelt.ia3(("attn/key", "mlp/up"), feedforward=("mlp/down", "attn/out"))
  matrices.stacks(method)


def test_specs():
  assert matrices.specs_of(OUTPUTS) == {"scale": ("model",)}
  assert matrices.specs_of(INPUTS) == {"scale": ("row",)}


def test_a_bias_has_its_kernel_s_parameter():
  """One array of the tree, one gradient: the sum of what kernel and bias ask for."""
  model, x, base, params = dense(OUTPUTS)
  assert len(jax.tree.leaves(pelt.partition(params)[0])) == 1
  apply, g = pelt.bypass(model.apply), values((5, 10), 3)
  loss = lambda p: jnp.sum(apply({"params": p}, x) * g)
  _, grads = pelt.value_and_grad(loss)(*pelt.partition(params))
  close(grads["kernel"].scale, (model.apply({"params": base}, x) * g).sum(0), 1e-5)
  with pytest.raises(ValueError, match="waits for its kernel's scale"):
    model.apply({"params": params}, x)  # without the bypass nothing fills it


def test_several_multiply_and_biases_find_their_own():
  twice = pelt.chain(OUTPUTS, INPUTS, OUTPUTS)
  with jax.enable_x64(True):
    model, x, base, params = dense(twice)
    params = moved(params)
    outer, middle, inner = (n.scale for n in matrices.nodes_at(params["kernel"])[:3])
    want = ((x * middle[None]) @ base["kernel"] + 0) * (inner * outer)[None]
    want = want + (base["bias"] * inner * outer)[None]
    close(pelt.bypass(model.apply)({"params": params}, x), want)
    close(model.apply({"params": pelt.merge(params)}, x), want)


def test_relu_moves_a_scale_from_inputs_to_the_outputs_before():
  """relu(x W l) = relu(x W) l for l > 0: what goes in is scaled as what came out before."""

  class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name="down")(nn.relu(nn.Dense(8, name="up")(x)))

  model, x = Mlp(), values((3, 6), 0)
  base = model.init(jax.random.key(0), x)["params"]
  base["up"]["bias"] = values((8,), 1)
  scale, outs = jnp.exp(values((8,), 2)), []
  for name, method in (
    ("up", pelt.ia3("up", feedforward=())),
    ("down", pelt.ia3((), feedforward="down")),
  ):
    params = method.init(jax.random.key(0), base, pelt.sites(model, x))
    params[name]["kernel"] = params[name]["kernel"].replace(scale=scale)
    outs.append(pelt.bypass(model.apply)({"params": params}, x))
  close(*outs, 1e-6)


def test_defaults_are_the_paper_s():
  raw = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "vocab_size": 11}
  raw |= {"num_hidden_layers": 3, "num_attention_heads": 2}
  model = pelt.models.from_config(raw)
  ids = jnp.array([[1, 2, 3]])
  base = jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"])
  init = lambda base: pelt.ia3().init(jax.random.key(1), base, pelt.sites(model, ids))
  params = jax.eval_shape(init, base)
  assert pelt.count(params).trainable == 3 * (2 * 8 + 12)
  assert "generators" not in params  # it has no biases


def test_joins_what_trains_and_goes_on_in_a_bank():
  """A bank's members go on training: a bias keeps its kernel's scale, member by member."""
  model, x, _, params = dense(pelt.chain(pelt.bitfit(), OUTPUTS))
  assert pelt.count(params).trainable == 20
  _, _, _, one = dense(OUTPUTS)
  bank = pelt.bank([moved(one, 0), moved(one, 1)])
  assert len(jax.tree.leaves(pelt.partition(bank)[0])) == 1
  rows = jnp.array([0, 1, 0, 1, 1])
  loss = lambda p: jnp.sum(pelt.bypass(model.apply)({"params": p}, x[:, None], rows=rows) ** 2)
  _, grads = pelt.value_and_grad(loss)(*pelt.partition(bank))
  both = pelt.unbank(pelt.combine(grads, pelt.partition(bank)[1]))[1]
  for number, member in enumerate(pelt.unbank(bank)[1]):
    chosen = x[rows == number]
    alone = lambda p, c=chosen: jnp.sum(pelt.bypass(model.apply)({"params": p}, c) ** 2)
    _, want = pelt.value_and_grad(alone)(*pelt.partition(member))
    close(both[number]["kernel"].scale, want["kernel"].scale, 1e-4)


def test_bad_input():
  with pytest.raises(ValueError, match="both empty"):
    pelt.ia3((), feedforward=())
  init = matrices.refuses_bad_targets(lambda t: pelt.ia3(t, feedforward=()))
  with pytest.raises(ValueError, match="table whose rows are looked up"):
    init("emb")
  with pytest.raises(ValueError, match="matches no leaf site"):  # no roles here
    dense(pelt.ia3())
