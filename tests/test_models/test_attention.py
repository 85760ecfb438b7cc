import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pelt_jax.models import _attention
from pelt_jax.models._attention import (
  AttentionCore,
  causal_mask,
  padding_mask,
  rope_tables,
  rotate,
  segment_positions,
)
from pelt_jax.models._config import Rope


def qkv(heads, groups, length=3, keys=4, width=8, dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = ((2, length, heads, width), (2, keys, groups, width), (2, keys, groups, width))
  return [jnp.asarray(rng.normal(size=s).astype(dtype)) for s in shapes]


def by_hand(q, k, v, mask=None, bias=None):
  """One head at a time, in numpy float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b in range(q.shape[0]):
    for h in range(q.shape[2]):
      g = h * k.shape[2] // q.shape[2]
      scores = q[b, :, h] @ k[b, :, g].T / math.sqrt(q.shape[3])
      if bias is not None:
        scores = scores + np.broadcast_to(bias, (2, q.shape[2], *scores.shape))[b, h]
      if mask is not None:
        scores = np.where(np.broadcast_to(mask, (2, 1, *scores.shape))[b, 0], scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, g]
  return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("extras", [False, True])
def test_the_core_is_attention_head_by_head(groups, extras):
  q, k, v = qkv(4, groups)
  rng = np.random.default_rng(1)
  mask = rng.random((2, 1, 3, 4)) < 0.7 if extras else None
  bias = rng.normal(size=(1, 4, 3, 4)).astype(np.float32) if extras else None
  if extras:
    mask[..., 0] = True
  out = AttentionCore().apply({}, q, k, v, mask, bias)
  np.testing.assert_allclose(out, by_hand(q, k, v, mask, bias), atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("extras", [(), ("mask",), ("padding", "bias"), ("mask", "row bias")])
def test_queries_attend_by_turns(monkeypatch, size, extras):
  """Values and gradients of all at once; no turn has more scores than the limit."""
  rng, heads, keys = np.random.default_rng(2), 4, 6
  with jax.enable_x64(True):
    q, k, v = qkv(heads, 2, length=5, keys=keys, dtype=np.float64)
    mask = rng.random((2, 1, 1 if "padding" in extras else 5, keys)) < 0.7
    mask[..., 0] = True
    mask = mask if extras else None
    shape = {"bias": (1, heads, 5, keys), "row bias": (2, 1, 1, keys)}
    bias = jnp.asarray(rng.normal(size=shape[extras[-1]])) if extras[1:] else None

    def loss(q, k, v, bias):
      return jnp.sum(jnp.sin(AttentionCore().apply({}, q, k, v, mask, bias)))

    argnums = range(4 if extras[1:] else 3)
    run = lambda: jax.jit(jax.value_and_grad(loss, argnums=tuple(argnums)))
    want = run()(q, k, v, bias)
    monkeypatch.setattr(_attention, "_SCORES", size * 2 * heads * keys)
    program = str(jax.make_jaxpr(run())(q, k, v, bias))
    assert f"f64[2,2,2,5,{keys}]" not in program or size == 5
    assert f"f64[2,2,2,{size},{keys}]" in program
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), run()(q, k, v, bias), want
    )


def test_dropped_weights_are_drawn_all_at_once(monkeypatch):
  q, k, v = qkv(2, 2)
  run = lambda: AttentionCore(dropout=0.5).apply(
    {}, q, k, v, deterministic=False, rngs={"dropout": jax.random.key(0)}
  )
  want = run()
  monkeypatch.setattr(_attention, "_SCORES", 1)
  np.testing.assert_array_equal(run(), want)
  assert "scan[" in str(jax.make_jaxpr(lambda: AttentionCore().apply({}, q, k, v))())


def test_two_keys_in_closed_form():
  # Scores ln 3 and 0 after division by sqrt(4): weights 3/4 and 1/4.
  q = jnp.array([2 * math.log(3), 0, 0, 0]).reshape(1, 1, 1, 4)
  k = jnp.array([[1.0, 0, 0, 0], [0, 1, 0, 0]]).reshape(1, 2, 1, 4)
  v = jnp.array([[4.0, 0, 0, 8], [0, 4, 0, 8]]).reshape(1, 2, 1, 4)
  out = AttentionCore().apply({}, q, k, v)
  np.testing.assert_allclose(out[0, 0, 0], [3, 1, 0, 8], rtol=1e-6)


def test_a_row_that_may_look_nowhere_is_finite_and_has_finite_gradients():
  q, k, v = qkv(2, 2)
  mask = jnp.zeros((2, 1, 3, 4), bool)
  f = lambda q: AttentionCore().apply({}, q, k, v, mask).sum()
  assert jnp.isfinite(f(q)) and jnp.isfinite(jax.grad(f)(q)).all()


def test_half_precision_softmax_runs_in_float32():
  # 70000 exponentials of 1 exceed float16's largest number, 65504.
  q, k = jnp.zeros((1, 1, 1, 8), jnp.float16), jnp.zeros((1, 70000, 1, 8), jnp.float16)
  v = jnp.ones((1, 70000, 1, 8), jnp.float16)
  out = AttentionCore().apply({}, q, k, v)
  assert (
    out.dtype == jnp.float16 and jnp.isfinite(out).all() and abs(float(out[0, 0, 0, 0]) - 1) < 0.1
  )


def test_dropout_acts_on_the_weights_only_when_told():
  q, k, v = qkv(2, 2)
  core = AttentionCore(dropout=0.5)
  plain = AttentionCore().apply({}, q, k, v)
  np.testing.assert_array_equal(core.apply({}, q, k, v), plain)
  dropped = core.apply({}, q, k, v, deterministic=False, rngs={"dropout": jax.random.key(0)})
  assert not np.allclose(dropped, plain)


def test_dropped_weights_are_those_of_the_softmax():
  """out = (w / keep) v with w the softmax over all keys: what is dropped is not renormalised."""
  q, k, _ = qkv(1, 1)
  v = jnp.ones_like(k)
  weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5, axis=-1)
  core, sums = AttentionCore(dropout=0.5), set()
  for seed in range(30):
    rngs = {"dropout": jax.random.key(seed)}
    out = core.apply({}, q, k, v, deterministic=False, rngs=rngs)
    sums.add(round(float(out[0, 0, 0, 0]), 4))
  row = np.asarray(weights[0, 0, 0])
  possible = {round(2 * float(row[list(some)].sum()), 4) for some in subsets(len(row))}
  near = lambda s: min(abs(s - p) for p in possible) < 2e-4
  assert len(sums) > 3 and all(map(near, sums))  # renormalised, every sum would be 1


def subsets(n):
  return [[i for i in range(n) if code >> i & 1] for code in range(2**n)]


def test_causal_mask_with_a_window():
  slots = jnp.arange(4)
  want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
  np.testing.assert_array_equal(causal_mask(slots, slots, 2, (None,))[0, 0], want)
  np.testing.assert_array_equal(causal_mask(slots, slots, None, ())[0, 0], np.tri(4))


def test_padding_mask_intersects_masks_and_segments():
  assert padding_mask(None, None) is None
  segments = jnp.array([[1, 1, 2, 0]])
  want = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  np.testing.assert_array_equal(padding_mask(None, segments)[0, 0], want)
  both = padding_mask(jnp.array([[0, 1, 1, 1]]), segments)
  np.testing.assert_array_equal(both[0, 0, 0], [0, 1, 0, 0])
  with pytest.raises(ValueError, match=r"attention_mask must be .* got shape \(4,\)"):
    padding_mask(jnp.ones(4), None)


def test_positions_restart_with_every_segment():
  ids = jnp.array([[0, 0, 5, 5, 5, 1], [1, 2, 2, 3, 3, 3]])
  want = [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]]
  np.testing.assert_array_equal(segment_positions(ids), want)


def test_rotation_by_a_quarter_turn():
  x = jnp.array([1.0, 2, 3, 4]).reshape(1, 1, 1, 4)
  cos, sin = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))
  np.testing.assert_array_equal(rotate(x, cos, sin)[0, 0, 0], [-3, -4, 1, 2])


def test_rotated_scores_depend_on_distance_only():
  rope, rng = Rope(), np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

  def score(i, j):
    at = [rope_tables(rope, 8, jnp.array([[p]]), jnp.float32) for p in (i, j)]
    return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

  assert abs(score(3, 1) - score(12, 10)) < 1e-5
  assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_linear_scaling_stretches_positions_and_dynamic_starts_beyond_the_trained_length():
  at = jnp.array([[2, 8]])
  plain = rope_tables(Rope(), 8, at, jnp.float32)
  linear = rope_tables(Rope("linear", factor=4.0), 8, jnp.array([[8, 32]]), jnp.float32)
  np.testing.assert_allclose(linear[0], plain[0], atol=1e-6)
  short, long = (
    rope_tables(Rope("dynamic", factor=4.0, original_max_position_embeddings=n), 8, at, jnp.float32)
    for n in (9, 8)
  )
  np.testing.assert_allclose(short[1], plain[1], atol=1e-6)
  assert np.abs(np.asarray(long[1]) - np.asarray(plain[1])).max() > 1e-3
