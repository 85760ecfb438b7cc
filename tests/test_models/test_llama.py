import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax.models._llama import RMSNorm
from tests.test_models.helpers import (
  CONFIGS,
  MASKED,
  PAD,
  VOCAB,
  build,
  built,
  close,
  padded,
  random_params,
  tokens,
)

# Sliding and full layers in one model; the models of one kind wait for the long suite.
each_mask = pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.parity] * (n != "qwen2-mixed")) for n in MASKED]
)


def run(model, params, *args, **kwargs):
  return jax.jit(functools.partial(model.apply, **kwargs))({"params": params}, *args)


def test_rms_norm_in_closed_form():
  # Mean square (9 + 16) / 2 = 12.5, plus 3.5 is 16: divided by 4.
  x = jnp.array([[3.0, 4.0]])
  out = RMSNorm(3.5).apply({"params": {"scale": jnp.array([2.0, 8.0])}}, x)
  np.testing.assert_array_equal(out, [[1.5, 8.0]])


def test_rms_norm_of_large_half_precision_numbers_does_not_overflow():
  x = jnp.full((1, 4), 1000.0, jnp.float16)
  out = RMSNorm(1e-6, jnp.float16).apply({"params": {"scale": jnp.ones(4, jnp.float16)}}, x)
  assert out.dtype == jnp.float16
  np.testing.assert_array_equal(out, np.ones((1, 4)))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_token_depends_on_its_window_of_the_past_only(name):
  model, params = built(name, "encoder")
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 32)), jnp.float32)
  ids = jnp.arange(16)[None]

  def position_10(table):
    table = jnp.concatenate([table, jnp.zeros((VOCAB - 16, 32))])
    tree = params | {"embed_tokens": {"embedding": table}}
    return model.apply({"params": tree}, ids)[0, 10].sum()

  reach = jnp.abs(jax.jit(jax.grad(position_10))(x[0])).sum(-1) > 0
  window = model.config.windows[0]
  # Each of the 3 layers looks window - 1 tokens further back.
  first = 0 if window is None else max(0, 10 - 3 * (window - 1))
  np.testing.assert_array_equal(reach, (np.arange(16) >= first) & (np.arange(16) <= 10))


@each_mask
def test_padded_rows_equal_single_rows(name):
  model, params = built(name, "lm")
  ids, lengths = np.repeat(tokens(2, 9), 2, axis=0), [9, 5, 9, 5]
  left, right = padded(ids[:2], lengths[:2], "left"), padded(ids[2:], lengths[2:], "right")
  batch, mask = (np.concatenate(x) for x in zip(left, right, strict=True))
  out = np.asarray(run(model, params, batch, mask))
  for i, n in enumerate(lengths):
    close(out[i][mask[i] == 1], run(model, params, ids[i : i + 1, :n])[0], 2e-6)


@each_mask
def test_packed_segments_equal_separate_rows(name):
  model, params = built(name, "lm")
  a, b = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
  packed = np.concatenate([a, b, np.full((1, 2), PAD)], axis=1)
  segments = np.array([[1] * 5 + [2] * 7 + [0] * 2])
  out = run(model, params, packed, segment_ids=segments)
  close(out[:, :5], run(model, params, a), 2e-6)
  close(out[:, 5:12], run(model, params, b), 2e-6)
  # The same said with a block mask and positions.
  block = (segments[:, :, None] == segments[:, None, :]).astype(np.int32)
  positions = np.array([[*range(5), *range(7), 0, 0]])
  close(run(model, params, packed, block, positions)[:, :12], out[:, :12], 2e-6)


@pytest.mark.parametrize(
  ("name", "scan"),
  [
    ("llama", False),
    ("qwen2-mixed", True),
    pytest.param("mistral", True, marks=pytest.mark.parity),
    pytest.param("qwen3", True, marks=pytest.mark.parity),
  ],
)
def test_cached_decoding_equals_the_full_forward(name, scan):
  model, params = built(name, "lm", scan)
  batch, mask = padded(tokens(2, 12), [12, 8], "left")
  want = run(model, params, batch, mask)
  step = jax.jit(functools.partial(model.apply, cache_length=14, mutable=["cache"]))
  out, cache = step({"params": params}, batch[:, :10], mask[:, :10])
  parts = [out]
  for part in (slice(10, 11), slice(11, 12)):
    out, cache = step({"params": params, **cache}, batch[:, part], mask[:, part])
    parts.append(out)
  close(np.concatenate(parts, 1), want, 2e-6, where=mask)


def test_a_cache_must_be_mutable_long_enough_and_of_the_same_size():
  model, params = built("llama", "lm")
  ids = tokens(2, 5)
  with pytest.raises(ValueError, match=r'mutable=\["cache"\]'):
    model.apply({"params": params}, ids, cache_length=8)
  step = functools.partial(model.apply, mutable=["cache"])
  with pytest.raises(ValueError, match="cache_length=4 is shorter than the 5 tokens"):
    step({"params": params}, ids, cache_length=4)
  _, cache = step({"params": params}, ids, cache_length=8)
  with pytest.raises(ValueError, match=r"holds .* \(2, 8\), this call needs \(2, 9\)"):
    step({"params": params, **cache}, ids[:, :1], cache_length=9)
  with pytest.raises(ValueError, match="no segment_ids"):
    step({"params": params}, ids, segment_ids=jnp.ones_like(ids), cache_length=8)


def test_last_only_is_the_last_position():
  model, params = built("llama", "lm")
  ids = tokens(2, 5)
  close(run(model, params, ids, last_only=True), run(model, params, ids)[:, -1:], 2e-6)


def test_the_classifier_reads_the_last_real_token():
  model, params = built("llama", "classification")
  ids, lengths = tokens(2, 8), [8, 5]
  single = np.stack([run(model, params, ids[i : i + 1, :n])[0] for i, n in enumerate(lengths)])
  for side in ("left", "right"):
    close(run(model, params, *padded(ids, lengths, side)), single, 2e-6)
  by_id, _ = padded(ids, lengths, "right")
  close(run(model, params, by_id), single, 2e-6)


def test_ids_past_the_vocabulary_reach_the_embedding_and_are_loud_there():
  model, params = built("llama-tied-biased", "encoder")
  seen = []

  def spy(next_fun, args, kwargs, context):
    if context.module.name == "embed_tokens" and context.method_name == "__call__":
      seen.append(np.asarray(args[0]))
    return next_fun(*args, **kwargs)

  ids = np.array([[5, VOCAB, VOCAB + 3]], np.int32)
  with nn.intercept_methods(spy):
    out = model.apply({"params": params}, ids)
  np.testing.assert_array_equal(seen[0], ids)
  assert jnp.isnan(out[0, 1:]).all()  # without a node that serves them


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_parameters_and_outputs_have_the_dtype_asked_for(name, dtype):
  with jax.enable_x64(dtype == "float64"):
    model = build(name, "tagging", dtype=dtype, scan=True)
    ids, params = tokens(2, 5), random_params(model)
    out = run(model, params, ids, np.ones_like(ids))
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    assert out.dtype == dtype == model.dtype and jnp.isfinite(out).all()


def test_float64_without_64_bit_jax_is_refused():
  with pytest.raises(ValueError, match="jax_enable_x64"):
    build("llama", "lm", dtype="float64")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      dict(task="translation"),
      "'translation' is not one of those known lm, mlm, cloze, classification",
    ),
    (dict(dtype=jnp.int8), "float32, bfloat16, float16, float64, got int8"),
    (dict(remat="host"), "remat must be False, True or 'offload', got 'host'"),
    (dict(num_labels=3), "num_labels is for classification and tagging, the task is 'lm'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.from_config(CONFIGS["llama"], **options)


def test_an_encoder_is_no_language_model():
  with pytest.raises(ValueError, match="'lm' .* for bert: classification, tagging, encoder"):
    models.from_config(CONFIGS["bert"], task="lm")


def test_attention_dropout_and_unknown_activations():
  raw = CONFIGS["llama"] | {"attention_dropout": 0.5}
  model, ids = models.from_config(raw), tokens(1, 6)
  params = {"params": random_params(model)}
  a = model.apply(params, ids)
  b = model.apply(params, ids, deterministic=False, rngs={"dropout": jax.random.key(1)})
  assert not np.allclose(a, b)
  with pytest.raises(ValueError, match="hidden_act 'xielu' is not implemented; known: silu"):
    models.from_config(raw | {"hidden_act": "xielu"}).init(jax.random.key(0), ids)


ROLES = {
  "positions": 1,
  "query": 3, "key": 3, "value": 3, "attention_out": 3, "ffn_in": 6, "ffn_out": 3, "ffn": 3,
  "attention": 3, "embedding": 1, "norm": 7, "attention_heads": 3, "attention_block": 3, "layer": 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "head"), [("llama", 1), ("qwen2", 0)])
@pytest.mark.parametrize("scan", [False, True])
def test_every_role_names_its_modules(name, head, scan):
  model = build(name, "lm", scan=scan)
  found: dict[str, set] = {}
  for site in pelt.sites(model, tokens(1, 4)):
    if site.kind == "call":
      for served in site.roles:
        found.setdefault(served.role, set()).add(site.path)
  want = dict(ROLES)
  if scan:  # two layers fewer, and the embedding and the last norm are no part of them
    want = {r: n if r in ("embedding", "positions") else (n + 2) // 3 for r, n in ROLES.items()}
  assert {r: len(p) for r, p in found.items()} == want | ({"head": 1} if head else {})
