"""One table of methods and models, and what must hold of every pair."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from tests.test_core import tiny
from tests.test_core.tiny import BATCH, HIDDEN, LAYERS, WIDTH, values

ATTENTION = 4 * (WIDTH * WIDTH + WIDTH)
LAYER = ATTENTION + 4 * WIDTH + 2 * WIDTH * HIDDEN + WIDTH + HIDDEN
TOTAL = 11 * WIDTH + LAYERS * LAYER + 3 * WIDTH + 3
BIASES = LAYERS * (4 * WIDTH + 2 * WIDTH + HIDDEN + WIDTH) + 3

# name -> (method, trainable parameters)
METHODS = {
  "lora": (pelt.lora(2, 6, targets=("mlp/up", "mlp/down")), LAYERS * 4 * (WIDTH + HIDDEN)),
  "lora, dropout": (pelt.lora(1, targets="attn/query", dropout=0.25), LAYERS * 2 * WIDTH),
  "rslora, gaussian": (
    pelt.lora(2, 4, targets="all-linear", rslora=True, init="gaussian"),
    2 * (LAYERS * (4 * 2 * WIDTH + 2 * (WIDTH + HIDDEN)) + WIDTH + 3),
  ),
  "adalora": (
    pelt.adalora(20, 2, 1, targets=("mlp/up", "mlp/down"), dropout=0.25),
    LAYERS * 2 * 2 * (WIDTH + HIDDEN + 1),
  ),
  "dora": (
    pelt.dora(2, 6, targets=("attn/query", "mlp/up")),
    LAYERS * (2 * (2 * WIDTH + WIDTH + HIDDEN) + WIDTH + HIDDEN),
  ),
  "pissa": (pelt.pissa(2, 6, targets=("attn/out", "mlp/up")), LAYERS * 2 * (3 * WIDTH + HIDDEN)),
  "olora": (pelt.olora(2, 6, targets=("attn/out", "mlp/up")), LAYERS * 2 * (3 * WIDTH + HIDDEN)),
  "lora_fa": (pelt.lora_fa(2, 6, targets=("attn/out", "mlp/up")), LAYERS * 2 * (WIDTH + HIDDEN)),
  "bitfit": (pelt.bitfit(), BIASES),
  "train": (pelt.train("mlp"), LAYERS * (2 * WIDTH * HIDDEN + WIDTH + HIDDEN)),
  "full": (pelt.full(), TOTAL),
  "ia3": (
    pelt.ia3(("attn/key", "mlp/up"), feedforward=("mlp/down", "attn/out")),
    LAYERS * (WIDTH + 2 * HIDDEN + WIDTH),
  ),
  "vera": (
    pelt.vera(4, targets=("attn/query", "attn/out", "mlp/down")),
    LAYERS * 3 * (WIDTH + 4),
  ),
  "vera, dropout": (pelt.vera(4, targets="mlp/up", dropout=0.25), LAYERS * (HIDDEN + 4)),
  "loha": (
    pelt.loha(2, 3, targets=("attn/value", "attn/out", "mlp/up")),
    LAYERS * 2 * 2 * (4 * WIDTH + WIDTH + HIDDEN),
  ),
  "lokr": (pelt.lokr(1, targets=("attn/out", "mlp/up")), LAYERS * (4 + 6 + 4 + 7)),
  "miss": (pelt.miss(4, targets=("attn/query", "attn/out"), dropout=0.25), LAYERS * 8 * WIDTH),
  "miss, bat": (pelt.miss(2, kind="bat", targets=("attn/value", "mlp/up")), LAYERS * 2 * 14),
  "hira": (
    pelt.hira(2, targets=("attn/value", "attn/out", "mlp/up")),
    LAYERS * 2 * (4 * WIDTH + WIDTH + HIDDEN),
  ),
  "hira, dropout and table": (
    pelt.hira(1, targets=("embed", "mlp/down"), dropout=0.25),
    11 + WIDTH + LAYERS * (WIDTH + HIDDEN),
  ),
  "lora and head": (
    pelt.chain(pelt.lora(2, targets="mlp/up"), pelt.train("head")),
    LAYERS * 2 * (WIDTH + HIDDEN) + 3 * WIDTH + 3,
  ),
}
NEAR = ("dora", "pissa", "olora")  # what they start from is computed in another order
SHORT = ("lora and head",)  # a low-rank change and leaves that train as they are
MODES = {m: m for m in tiny.MODES}
LONG = pytest.mark.parity
PAIRS = [
  pytest.param(name, mode, marks=[] if name in SHORT and mode in ("loop", "scan") else [LONG])
  for name in METHODS
  for mode in MODES
  if name in SHORT or "remat" not in mode
]
table = pytest.mark.parametrize(("name", "mode"), PAIRS)
GOLDEN = pathlib.Path(__file__).with_name("golden.json")


def made(name, mode, dtype=jnp.float32, moved=False):
  """Model, plain params, params with nodes (moved off their start if asked)."""
  model = tiny.Model(mode=mode, dtype=dtype)
  base = tiny.in_mode(tiny.looped_params(dtype), mode)
  params = METHODS[name][0].init(jax.random.key(1), base, pelt.sites(model, *tiny.inputs()))
  if moved:
    trainable, frozen = pelt.partition(params)
    flat, tree = jax.tree.flatten(trainable)
    flat = [x + values(x.shape, i, x.dtype) / 4 for i, x in enumerate(flat)]
    params = pelt.combine(jax.tree.unflatten(tree, flat), frozen)
  return model, base, params


@table
def test_identity_at_init(name, mode):
  model, base, params = made(name, mode)
  got = pelt.bypass(model.apply)({"params": params}, *tiny.inputs())
  want = model.apply({"params": base}, *tiny.inputs())
  if mode == "loop" and name not in NEAR:
    np.testing.assert_array_equal(got, want)
  else:  # scans and remat are compiled, and fusion may round otherwise
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@table
def test_merged_equals_unmerged_eager_and_jitted(name, mode):
  model, base, params = made(name, mode, moved=True)
  merged = pelt.merge(params)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  jax.tree.map(lambda a, b: (a.dtype == b.dtype and a.shape == b.shape) or 1 / 0, merged, base)
  want = jax.jit(model.apply)({"params": merged}, *tiny.inputs())
  got = jax.jit(pelt.bypass(model.apply))({"params": params}, *tiny.inputs())
  # float32 through three layers of sums over at most a dozen terms of order 1
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
  assert jnp.abs(got - model.apply({"params": base}, *tiny.inputs())).max() > 1e-3


@table
def test_gradients_only_where_declared_one_compile_frozen_bits(name, mode):
  model, base, params = made(name, mode, moved=True)
  trainable, frozen = pelt.partition(params)
  apply, compiled = pelt.bypass(model.apply), []

  @jax.jit
  def step(trainable, frozen, ids, mask, key):
    compiled.append(1)

    def objective(params):
      out = apply({"params": params}, ids, mask, False, rngs={"dropout": key})
      return jnp.sum(out**2)

    _, grads = pelt.value_and_grad(objective)(trainable, frozen)
    return jax.tree.map(lambda p, g: p - 0.01 * g, trainable, grads), grads

  before = jax.tree.map(np.asarray, frozen)
  structure = jax.tree.structure(trainable)
  for i in range(2):
    trainable, grads = step(trainable, frozen, *tiny.inputs(), jax.random.key(i))
    assert jax.tree.structure(grads) == jax.tree.structure(trainable) == structure
  assert len(compiled) == 1
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  del base


@table
def test_count_and_round_trip(name, mode, tmp_path):
  _, base, params = made(name, mode, moved=True)
  counts = pelt.count(params)
  assert counts.trainable == METHODS[name][1] and counts.total == TOTAL
  assert counts.bytes == 4 * counts.trainable
  pelt.save(tmp_path, params)
  loaded = pelt.load(tmp_path, base)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@table
def test_bfloat16_keeps_dtype(name, mode):
  # Flax's LayerNorm promotes bfloat16 with float32.
  with jax.numpy_dtype_promotion("standard"):
    model, base, params = made(name, mode, jnp.bfloat16)
    got = pelt.bypass(model.apply)({"params": params}, *tiny.inputs())
    want = model.apply({"params": base}, *tiny.inputs())
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(jnp.asarray(v, jnp.float32) for v in (got, want)), atol=0.1)
    half, wide = jnp.dtype(jnp.bfloat16), {jnp.dtype(jnp.float32)} if name == "dora" else set()
    assert {x.dtype for x in jax.tree.leaves(pelt.partition(params)[0])} == {half} | wide
    assert {x.dtype for x in jax.tree.leaves(pelt.merge(params))} == {half}


@table
def test_vmap_over_adapters(name, mode):
  model, _, params = made(name, mode, moved=True)
  trainable, extra, base = pelt.partition(params, extra=True)
  two = jax.tree.map(lambda x: jnp.stack([x, x * 1.5]), trainable)
  apply = pelt.bypass(model.apply)
  run = lambda t: apply({"params": pelt.combine(t, extra, base)}, *tiny.inputs())
  got = jax.jit(jax.vmap(run))(two)
  assert got.shape == (2, BATCH, tiny.TIME, 3)
  for i, scale in enumerate((1.0, 1.5)):
    want = run(jax.tree.map(lambda x, s=scale: x * s, trainable))
    np.testing.assert_allclose(got[i], want, rtol=0, atol=5e-5)


@table
def test_bank_of_two_equals_own_runs(name, mode):
  model, _, params = made(name, mode, moved=True)
  if name == "full":
    return  # its attention output has two contracted axes and rows share nothing: not a bank's use
  trainable, rest = pelt.partition(params)
  other = pelt.combine(jax.tree.map(lambda x: x * 1.5, trainable), rest)
  rows = jnp.array([1, 0, 0, 1])
  apply = jax.jit(pelt.bypass(model.apply))
  got = apply({"params": pelt.bank([params, other])}, *tiny.inputs(), rows=rows)
  runs = [apply({"params": p}, *tiny.inputs()) for p in (params, other)]
  for b, n in enumerate((1, 0, 0, 1)):
    np.testing.assert_allclose(got[b], runs[n][b], rtol=0, atol=2e-5)


def signature(name, mode):
  _, _, params = made(name, mode)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  kept = pelt.labels(params)
  return {
    re.sub(r"\['?|'?\]", "/", jax.tree_util.keystr(p)): f"{x.dtype}{list(x.shape)} {label}"
    for (p, x), label in zip(leaves, jax.tree.leaves(kept), strict=True)
    if "h_1" not in jax.tree_util.keystr(p) and "h_2" not in jax.tree_util.keystr(p)
  }


@pytest.mark.parametrize("mode", ["loop", "scan"])
@pytest.mark.parametrize("name", ["lora, dropout", "bitfit", "lora and head"])
def test_names_shapes_and_dtypes_are_golden(name, mode):
  """Names in files and optimizer states: a change here breaks what people saved.

  Regenerate with `python -m tests.test_methods.test_properties` after a change that is meant.
  """
  assert signature(name, mode) == json.loads(GOLDEN.read_text())[f"{name} | {mode}"]


def write_golden():
  names = ("lora, dropout", "bitfit", "lora and head")
  found = {f"{n} | {m}": signature(n, m) for n in names for m in ("loop", "scan")}
  GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  write_golden()
