"""Adapters that PEFT wrote compute here what PEFT computed: stored values, no torch needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests.test_interop.harness import (
  CASES,
  COTANGENT,
  DATA,
  IDS,
  base_params,
  flax_model,
  our_gradients,
  read_values,
)

# Sums of at most 11 products of numbers near 1 in float64, a few layers deep.
TOLERANCE = dict(rtol=0, atol=1e-12)


def loaded(name, folder=None):
  case, folder = CASES[name], folder or DATA / name
  values = read_values(DATA / name)
  model = flax_model(case)
  base = base_params(values)
  params = pelt.interop.peft.load(folder, model, base, parameter_order=("up", "down"))
  return model, base, params, values


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_merge_are_pefts(name):
  with jax.enable_x64(True):
    model, _, params, values = loaded(name)
    apply = pelt.bypass(model.apply)

    def loss(params):
      return jnp.sum(apply({"params": params}, jnp.asarray(IDS)) * COTANGENT)

    np.testing.assert_allclose(
      apply({"params": params}, jnp.asarray(IDS)), values["out"], **TOLERANCE
    )
    merged = pelt.merge(params)
    np.testing.assert_allclose(
      model.apply({"params": merged}, jnp.asarray(IDS)), values["merged"], **TOLERANCE
    )

    grads = our_gradients(pelt.value_and_grad(loss)(*pelt.partition(params))[1])
    theirs = {k.removeprefix("gradient/"): v for k, v in values.items() if k.startswith("gradient")}
    # A bias of an adapted module keeps its plain name here.
    theirs = {k if "lora_" in k else k.replace(".base_layer", ""): v for k, v in theirs.items()}
    assert set(grads) == set(theirs)
    for key, value in theirs.items():
      np.testing.assert_allclose(grads[key], value, err_msg=key, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_change_is_not_too_small_to_test(name):
  with jax.enable_x64(True):
    model, base, _, values = loaded(name)
    assert np.abs(model.apply({"params": base}, jnp.asarray(IDS)) - values["out"]).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_written_again_it_computes_the_same(name, tmp_path):
  with jax.enable_x64(True):
    model, _, params, values = loaded(name)
    pelt.interop.peft.export(tmp_path, params, model, parameter_order=("up", "down"))
    *_, again, _ = loaded(name, tmp_path)
    first, second = (jax.tree.leaves_with_path(p) for p in (params, again))
    for (path, a), (_, b) in zip(first, second, strict=True):
      np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    out = pelt.bypass(model.apply)({"params": again}, jnp.asarray(IDS))
    np.testing.assert_allclose(out, values["out"], **TOLERANCE)
