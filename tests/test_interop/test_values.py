"""Adapters that PEFT wrote compute here what PEFT computed: stored values, no torch needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

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

FROZEN = {"base_model.vera_A", "base_model.vera_B"}


def close(got, want, name, message=""):
  np.testing.assert_allclose(got, want, rtol=0, atol=CASES[name].atol, err_msg=message)


def gradients(name, params, model, folder):
  """Those of every trained array for the loss of the values, under PEFT's names."""
  apply, (trainable, frozen) = pelt.bypass(model.apply), pelt.partition(params)
  loss = lambda p: jnp.sum(apply({"params": p}, jnp.asarray(IDS)) * COTANGENT)
  _, grads = pelt.value_and_grad(loss)(trainable, frozen)
  if CASES[name].kind == "LORA":
    return our_gradients(grads)
  pelt.interop.peft.export(folder, pelt.combine(grads, frozen), model)
  found = load_file(folder / "adapter_model.safetensors")
  return {key: found[key] for key in found.keys() - FROZEN}


def loaded(name, folder=None):
  case, folder = CASES[name], folder or DATA / name
  values = read_values(DATA / name)
  model = flax_model(case)
  base = base_params(values)
  params = pelt.interop.peft.load(folder, model, base, parameter_order=("up", "down"))
  return model, base, params, values


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_merge_are_pefts(name, tmp_path):
  with jax.enable_x64(True):
    model, _, params, values = loaded(name)
    out = pelt.bypass(model.apply)({"params": params}, jnp.asarray(IDS))
    close(out, values["out"], name)
    merged = model.apply({"params": pelt.merge(params)}, jnp.asarray(IDS))
    close(merged, values["merged"], name)

    grads = gradients(name, params, model, tmp_path)
    theirs = {k.removeprefix("gradient/"): v for k, v in values.items() if k.startswith("gradient")}
    # A bias of an adapted module keeps its plain name here.
    theirs = {k if "lora_" in k else k.replace(".base_layer", ""): v for k, v in theirs.items()}
    assert set(grads) == set(theirs)
    for key, value in theirs.items():
      close(grads[key], value, name, key)


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
    out = pelt.bypass(model.apply)({"params": again}, jnp.asarray(IDS))
    close(out, values["out"], name)
    if CASES[name].start:  # written as a LoRA of twice the rank
      return
    first, second = (jax.tree.leaves_with_path(p) for p in (params, again))
    for (path, a), (_, b) in zip(first, second, strict=True):
      np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
