import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import pelt_jax as pelt
from pelt_jax import models
from tests.test_models.helpers import (
  CONFIGS,
  PAD,
  build,
  built,
  close,
  padded,
  random_params,
  tokens,
  trees_close,
)


def run(model, params, *args, **kwargs):
  return jax.jit(functools.partial(model.apply, **kwargs))({"params": params}, *args)


def test_padded_rows_equal_single_rows():
  model, params = built("gpt2", "lm")
  ids, lengths = np.repeat(tokens(2, 9), 2, axis=0), [9, 5, 9, 5]
  left, right = padded(ids[:2], lengths[:2], "left"), padded(ids[2:], lengths[2:], "right")
  batch, mask = (np.concatenate(x) for x in zip(left, right, strict=True))
  out = np.asarray(run(model, params, batch, mask))
  for i, n in enumerate(lengths):
    close(out[i][mask[i] == 1], run(model, params, ids[i : i + 1, :n])[0], 2e-6)


def test_packed_segments_equal_separate_rows():
  model, params = built("gpt2", "lm")
  a, b = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
  packed = np.concatenate([a, b, np.full((1, 2), PAD)], axis=1)
  segments = np.array([[1] * 5 + [2] * 7 + [0] * 2])
  out = run(model, params, packed, segment_ids=segments)
  close(out[:, :5], run(model, params, a), 2e-6)
  close(out[:, 5:12], run(model, params, b), 2e-6)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.parity), True])
def test_cached_decoding_equals_the_full_forward(scan):
  model, params = built("gpt2", "lm", scan)
  batch, mask = padded(tokens(2, 12), [12, 8], "left")
  want = run(model, params, batch, mask)
  step = jax.jit(functools.partial(model.apply, cache_length=14, mutable=["cache"]))
  out, cache = step({"params": params}, batch[:, :10], mask[:, :10])
  parts = [out]
  for part in (slice(10, 11), slice(11, 12)):
    out, cache = step({"params": params, **cache}, batch[:, part], mask[:, part])
    parts.append(out)
  close(np.concatenate(parts, 1), want, 2e-6, where=mask)


@pytest.mark.parity
def test_scan_and_remat_change_neither_losses_nor_gradients():
  model, params = built("gpt2-untied", "lm", scan=False)
  ids, labels = tokens(2, 9), tokens(2, 9, seed=1)

  def losses(model, params):
    run = lambda p: model.apply({"params": p}, ids, labels=labels)
    return jax.jit(jax.value_and_grad(lambda p: run(p).sum()))(params)

  want, gradient = losses(model, params)
  logits = run(model, params, ids)
  close(want, models.token_losses(logits, jnp.asarray(labels)).sum(), 2e-6)
  other = build("gpt2-untied", "lm", scan=True, remat=True).clone(loss_chunk=6)
  got, scanned = losses(other, models.to_scanned(params))
  close(got, want, 2e-6)
  trees_close(models.to_looped(scanned, other), gradient, 1e-5)


def test_positions_past_the_table_are_loud():
  model, params = built("gpt2", "encoder")
  at = lambda *positions: run(model, params, tokens(1, 3), None, np.array([positions]))
  assert jnp.isfinite(at(61, 62, 63)).all() and jnp.isnan(at(62, 63, 64)[0, 2]).all()


def test_conv1d_is_stored_as_it_is_and_heads_are_transposed(tmp_path):
  model, params = built("gpt2", "tagging")
  models.save_pretrained(tmp_path, model, params)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  attention = params["transformer"]["h"]["attn"]
  np.testing.assert_array_equal(
    tensors["transformer.h.1.attn.c_attn.weight"], attention["c_attn"]["kernel"][1]
  )
  assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (32, 96)
  assert tensors["classifier.weight"].shape == (5, 32)


def test_a_bare_checkpoint_with_the_buffers_of_old_files(tmp_path):
  model, params = built("gpt2", "encoder")
  models.save_pretrained(tmp_path, model, params)
  file = tmp_path / "model.safetensors"
  tensors = {k: v.copy() for k, v in safetensors.numpy.load_file(file).items()}
  assert "wte.weight" in tensors
  tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
  tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
  safetensors.numpy.save_file(tensors, file)
  _, got = models.from_pretrained(tmp_path, scan=True)
  jax.tree.map(np.testing.assert_array_equal, got["transformer"], params)
  tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].T.copy()
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match=r"c_attn.weight has shape \(96, 32\), expected \(32, 96\)"):
    models.from_pretrained(tmp_path)


ROLES = {
  "query": 3, "key": 3, "value": 3, "attention_out": 3, "ffn_in": 3, "ffn_out": 3, "ffn": 3,
  "attention": 3, "embedding": 1, "norm": 7, "positions": 1,
  "attention_heads": 3, "attention_block": 3, "layer": 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "head"), [("gpt2", 0), ("gpt2-untied", 1)])
def test_every_role_names_its_modules(name, head):
  found: dict[str, set] = {}
  for site in pelt.sites(build(name, "lm"), tokens(1, 4)):
    if site.kind == "call":
      for served in site.roles:
        found.setdefault(served.role, set()).add(site.path)
  assert {r: len(p) for r, p in found.items()} == ROLES | ({"head": 1} if head else {})


def test_lora_on_the_joint_projection_merges():
  model, params = built("gpt2", "lm")
  ids = tokens(2, 7)
  method = pelt.lora(rank=2, targets=("query", "value"))
  nodes = method.init(jax.random.key(1), params, pelt.sites(model, ids))
  nodes = jax.tree.map(lambda x: x + 0.1 if x.shape[-2:] == (2, 96) else x, nodes)
  got = jax.jit(pelt.bypass(model.apply))({"params": nodes}, ids)
  close(got, run(model, pelt.merge(nodes), ids), 5e-6)
  assert np.abs(got - run(model, params, ids)).max() > 0.1


def test_dropout_differs_from_layer_to_layer_under_scan():
  model = models.from_config(CONFIGS["gpt2"] | {"resid_pdrop": 0.3}, task="encoder", scan=True)
  _, state = model.apply(
    {"params": random_params(model)},
    tokens(1, 6),
    deterministic=False,
    rngs={"dropout": jax.random.key(1)},
    capture_intermediates=lambda m, _: m.name == "resid_dropout",
    mutable=["intermediates"],
  )
  (out,) = state["intermediates"]["h"]["attn"]["resid_dropout"]["__call__"]
  zeros = np.asarray(out) == 0
  assert 0.2 < zeros.mean() < 0.4 and (zeros[0] != zeros[1]).any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"n_head": 5}, r"n_embd \(32\) is not a multiple of n_head \(5\)"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
  with pytest.raises(ValueError, match=message):
    models.from_config(CONFIGS["gpt2"] | change)


def test_a_cache_must_be_mutable():
  model, params = built("gpt2", "lm")
  with pytest.raises(ValueError, match=r'mutable=\["cache"\]'):
    model.apply({"params": params}, tokens(1, 3), cache_length=8)
