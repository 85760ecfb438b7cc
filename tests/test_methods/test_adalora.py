"""AdaLoRA: closed forms, the allocator against NumPy, budgets, and what training keeps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import nodes, training
from pelt_jax._walk import every_node
from pelt_jax.methods._allocator import Allocation, Schedule
from tests.test_core.tiny import values

RANK = 3
# Whatever the seed, all scores differ.
SETTINGS = dict(steps=30, rank=RANK, target_rank=1, warmup=3, final=8, interval=4, gamma=0.2)


def dense(width, x, name):
  return nn.Dense(width, param_dtype=x.dtype, name=name)


class Pair(nn.Module):
  """Two layers whose matrices differ in shape."""

  @nn.compact
  def __call__(self, x):
    return dense(3, x, "out")(jnp.tanh(dense(5, x, "up")(x)))


class Scanned(nn.Module):
  """Three layers stacked by a scan."""

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return x + jnp.tanh(dense(4, x, "dense")(x)), None

    scan = nn.scan(
      Layer,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True, "dropout": True},
      length=3,
    )
    return scan(name="layers")(x, None)[0]


def made(model, x, **options):
  """A model with AdaLoRA on its kernels, in float64 where x is."""
  base = model.init(jax.random.key(0), x)["params"]
  method = pelt.adalora(**(SETTINGS | {"targets": "kernel"} | options))
  return method, base, method.init(jax.random.key(1), base, pelt.sites(model, x))


def trained(params, seed=0):
  """The same with lam away from zero."""
  return jax.tree.map(
    lambda x: values(x.shape, seed + x.size).astype(x.dtype) if x.ndim else x, params
  )


def squares(apply, params, batch, key):
  y = apply({"params": params}, batch["x"])
  return jnp.mean((y - batch["y"]) ** 2)


def run(method, params, model, batch, steps, *, tx=None, clip=None, accumulate=1):
  """Training step by step: (trainable, state) after each."""
  tx = tx or optax.adam(0.05)
  init, step = training.train_step(
    pelt.bypass(model.apply), squares, tx, method, clip=clip, accumulate=accumulate
  )
  trainable, frozen, state = init(params)
  step = jax.jit(step)
  seen = []
  for _ in range(steps):
    trainable, state, _ = step(trainable, frozen, state, batch, jax.random.key(0))
    seen.append((trainable, state))
  return seen, frozen, step


def lams(tree):
  """All singular values, in the order of paths and layers."""
  found = (n for n in every_node(tree) if isinstance(n, nodes.SvdWeight))
  return np.concatenate([np.ravel(n.lam) for n in found])


def test_closed_form():
  """Exact in binary, but for the scaling 6 / (2 + 1e-5) of the reference code."""
  x = jnp.array([[1.0, 2.0]])
  w = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
  a, b = jnp.array([[1.0, 0.5], [-1.0, 2.0]]), jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 4.0]])
  node = nodes.SvdWeight(w, a, b, jnp.array([2.0, 0.5]), jnp.asarray(2.0), jnp.asarray(0.0))
  # x a = [-1, 4.5], times lam [-2, 2.25]; times b = [-2, -1.75, 9]; x w = [1, 2, 0]
  want = [[1 - 4.0, 2 - 3.5, 18.0]]
  y = pelt.bypass(nn.Dense(3, use_bias=False).apply)({"params": {"kernel": node}}, x)
  np.testing.assert_array_equal(y, want)
  np.testing.assert_array_equal(x @ pelt.merge({"kernel": node})["kernel"], want)
  assert node.rank() == 2 and node.shape == (2, 3)
  _, _, params = made(nn.Dense(3, use_bias=False), jnp.ones((1, 6)), rank=2, alpha=6.0)
  np.testing.assert_allclose(params["kernel"].scaling, 2.9999850000749996, rtol=1e-7)


def test_start_is_the_base_to_the_bit_and_counts():
  x = values((3, 4), 0)
  _, base, params = made(Pair(), x)
  for wrap in (lambda f: f, jax.jit):
    y = wrap(pelt.bypass(Pair().apply))({"params": params}, x)
    np.testing.assert_array_equal(y, wrap(Pair().apply)({"params": base}, x))
  # r (in + out + 1) per matrix: both vectors and the singular value.
  assert pelt.count(params).trainable == RANK * (4 + 5 + 1) + RANK * (5 + 3 + 1)
  for node in (params["up"]["kernel"], params["out"]["kernel"]):
    assert 0.005 < float(jnp.std(node.a)) < 0.05 and not node.lam.any()


def test_gradient_of_lam():
  with jax.enable_x64(True):
    x, g = values((7, 6), 0), values((7, 5), 1)
    a, b, lam = values((6, 3), 2), values((3, 5), 3), values((3,), 4)
    node = nodes.SvdWeight(values((6, 5), 5), a, b, lam, jnp.asarray(0.7), jnp.asarray(0.0))
    grads = jax.grad(lambda n: jnp.sum(n.einsum("...i,io->...o", x) * g))(node)
    # dL/dlam_i = s sum_t (x a)_ti (g bᵀ)_ti, which needs no lam.
    np.testing.assert_allclose(grads.lam, 0.7 * jnp.sum((x @ a) * (g @ b.T), 0), atol=1e-13)


def test_penalty_of_both_forms():
  with jax.enable_x64(True):
    a, b = values((6, 3), 2), values((3, 5), 3)
    gamma = jnp.asarray(0.3)
    gram = lambda rows: rows @ rows.T - np.eye(3)
    norm = lambda rows: np.linalg.norm(gram(np.asarray(rows)))
    make = lambda a, b, orth: nodes.SvdWeight(
      jnp.ones((6, 5)), a, b, jnp.ones(3), jnp.asarray(1.0), gamma, orth=orth
    )
    code, paper = make(a, b, "code"), make(a, b, "paper")
    np.testing.assert_allclose(code.penalty(), 0.3 * (norm(a.T) + norm(b)), rtol=1e-14)
    np.testing.assert_allclose(paper.penalty(), 0.3 * (norm(a.T) ** 2 + norm(b) ** 2), rtol=1e-14)
    slope = jax.grad(lambda n: n.penalty())(code)
    np.testing.assert_allclose(
      slope.b, 0.3 * 2 * gram(np.asarray(b)) @ b / norm(b), rtol=0, atol=1e-14
    )
    # Orthonormal vectors: nothing to add, and a gradient of zero, not NaN.
    q = jnp.linalg.qr(values((6, 3), 7))[0]
    perfect = make(q, q[:5].T * 0, "code").replace(b=jnp.eye(3, 5))
    np.testing.assert_allclose(perfect.penalty(), 0.0, atol=1e-14)
    assert all(
      np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(lambda n: n.penalty())(perfect))
    )


def test_penalty_at_the_start_is_gamma_root_rank():
  """The mean over all factors, so that neither depth nor stacking changes it."""
  x = values((2, 4), 0)
  for model in (Pair(), Scanned()):
    _, _, params = made(model, x, gamma=0.5)
    np.testing.assert_allclose(pelt.penalty(params), 0.5 * RANK**0.5, rtol=2e-3)
  _, _, params = made(Pair(), x, gamma=0.5, orth="paper")
  np.testing.assert_allclose(pelt.penalty(params), 0.5 * 4 * RANK, rtol=5e-3)


def test_schedule_is_the_reference_codes():
  budgets, due = Schedule(100, 10, 20, 5, 16.0).table(48, 1)
  known = {0: 48, 10: 48, 11: 46, 15: 41, 20: 36, 30: 27, 40: 21, 50: 18, 60: 16, 80: 16, 81: 16}
  assert {t: int(budgets[t]) for t in known} == known
  assert np.flatnonzero(due[:21]).tolist() == [15, 20] and due[80:].all() and not due[76:80].any()
  assert len(budgets) == 100
  linear = Schedule(100, 0, 20, 5, 16.0, "linear").table(48, 1)[0]
  cosine = Schedule(100, 0, 20, 5, 16.0, "cosine").table(48, 1)[0]
  assert linear[40] == 32 == cosine[40] and cosine[10] > linear[10] > 40


def by_hand(history, betas, frozen_from):
  """The reference allocator's scores in NumPy, from (params, grads) of each step."""
  mean, spread, scores = {}, {}, None
  for t, (params, grads) in enumerate(history):
    if t >= frozen_from:
      continue
    rows = []
    for name in ("out", "up"):
      s = {}
      for field in ("a", "b", "lam"):
        at = (name, field)
        i = np.abs(params[name][field] * grads[name][field])
        mean[at] = betas[0] * mean.get(at, 0.0) + (1 - betas[0]) * i
        spread[at] = betas[1] * spread.get(at, 0.0) + (1 - betas[1]) * np.abs(i - mean[at])
        s[field] = mean[at] * spread[at]
      rows.append(s["lam"] + s["a"].mean(0) + s["b"].mean(1))
    scores = np.concatenate(rows)
  return scores


@pytest.mark.parametrize("sensitivity", ["post_step", "pre_step"])
def test_scores_and_masks_against_numpy(sensitivity):
  with jax.enable_x64(True):
    x = values((3, 4), 0)
    method, _, params = made(Pair(), x, sensitivity=sensitivity, betas=(0.8, 0.6))
    trainable, _ = pelt.partition(params)
    state = method.post_step.init(trainable)
    budgets, due = Schedule(30, 3, 8, 4, 1.0).table(2 * RANK, 2)
    history, update = [], jax.jit(method.post_step.update)
    for t in range(30):
      old, new, grads = (trained(trainable, seed) for seed in (3 * t, 3 * t + 1, 3 * t + 2))
      after, state = update(state, old, new, grads)
      at = new if sensitivity == "post_step" else old
      seen = [
        {n: {f: np.asarray(getattr(tree[n]["kernel"], f)) for f in ("a", "b", "lam")} for n in tree}
        for tree in (at, grads)
      ]
      history.append(seen)
      scores = by_hand(history, (0.8, 0.6), 22)
      np.testing.assert_allclose(state.scores, scores, rtol=1e-12)
      before = lams(new)
      if due[t]:
        keep = scores >= np.sort(scores)[::-1][budgets[t] - 1]
        np.testing.assert_array_equal(lams(after), np.where(keep, before, 0.0))
      else:
        np.testing.assert_array_equal(lams(after), before)
      assert int(state.kept[t]) == (budgets[t] if due[t] else 2 * RANK)
      # Vectors are never touched.
      np.testing.assert_array_equal(after["up"]["kernel"].a, new["up"]["kernel"].a)
    assert int(state.count) == 30


def test_the_threshold_is_one_for_all_matrices():
  """A matrix may lose everything while another keeps its whole rank."""
  x = values((3, 4), 0)
  method, _, params = made(Pair(), x, target_rank=1.5)
  trainable, _ = pelt.partition(params)
  state = method.post_step.init(trainable)
  grads = trained(trainable, 5)
  grads["out"] = jax.tree.map(lambda g: g * 1e-3, grads["out"])
  for t in range(25):
    new, state = method.post_step.update(state, trainable, trained(trainable, t), grads)
  assert pelt.ranks(pelt.combine(new, jax.tree.map(lambda _: optax.MaskedNode(), new))) == {
    "out/kernel": 0,
    "up/kernel": 3,
  }


def test_ties():
  x = values((3, 4), 0)
  kept = {}
  for ties in ("topk", "kth"):
    method, _, params = made(Pair(), x, ties=ties, score="magnitude", steps=30)
    trainable, _ = pelt.partition(params)
    equal = jax.tree.map(jnp.ones_like, trainable)
    state = method.post_step.init(trainable)
    for _ in range(9):
      after, state = method.post_step.update(state, equal, equal, equal)
    kept[ties] = lams(after)
  budget = int(Schedule(30, 3, 8, 4, 1.0).table(6, 2)[0][8])
  assert 0 < budget < 6
  # In the order of paths: "out" comes before "up".
  np.testing.assert_array_equal(kept["topk"], [1.0] * budget + [0.0] * (6 - budget))
  np.testing.assert_array_equal(kept["kth"], 0.0)


@pytest.mark.parametrize("ties", ["topk", "kth"])
def test_a_budget_of_all_prunes_nothing(ties):
  """Where the reference code fails: its threshold would be the 0-th smallest."""
  x = values((3, 4), 0)
  method, _, params = made(Pair(), x, target_rank=RANK, ties=ties)
  trainable, _ = pelt.partition(params)
  state = method.post_step.init(trainable)
  for t in range(30):
    new = trained(trainable, t)
    after, state = method.post_step.update(state, new, new, new)
    np.testing.assert_array_equal(lams(after), lams(new))


def test_training_regrows_between_choices_and_freezes_the_last():
  x = values((8, 4), 0)
  batch = {"x": x, "y": values((8, 3), 1)}
  method, _, params = made(Pair(), x)
  seen, frozen, step = run(method, params, Pair(), batch, 30, clip=0.5)
  assert step._cache_size() == 1  # no recompilation in any phase
  budgets, due = Schedule(30, 3, 8, 4, 1.0).table(6, 2)
  alive = np.array([np.count_nonzero(lams(t)) for t, _ in seen])
  np.testing.assert_array_equal(alive[due], budgets[due])
  after_a_choice = np.flatnonzero(due[:20])[1:] + 1
  assert (alive[after_a_choice] == 6).all()  # pruned values came back
  patterns = {tuple(lams(t) != 0) for t, _ in seen[22:]}
  assert len(patterns) == 1
  np.testing.assert_array_equal(seen[-1][1].post.kept, alive)
  whole = pelt.combine(seen[-1][0], frozen)
  assert sum(pelt.ranks(whole).values()) == 2


def test_accumulation_counts_optimizer_steps():
  x = values((8, 4), 0)
  batch = {"x": x, "y": values((8, 3), 1)}
  with jax.enable_x64(True):
    batch = jax.tree.map(lambda v: v.astype(jnp.float64), batch)
    method, _, params = made(Pair(), batch["x"])
    once = run(method, params, Pair(), batch, 30)[0][-1]
    parts = run(method, params, Pair(), batch, 30, accumulate=4)[0][-1]
    assert int(parts[1].post.count) == 30
    np.testing.assert_array_equal(parts[1].post.kept, once[1].post.kept)
    np.testing.assert_allclose(lams(parts[0]), lams(once[0]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", [Pair(), Scanned()], ids=["looped", "scanned"])
def test_shrink_computes_the_same(model):
  with jax.enable_x64(True):
    x = values((5, 4), 0)
    _, _, params = made(model, x, dropout=0.1)
    params = pelt.combine(
      *(trained(p) if i == 0 else p for i, p in enumerate(pelt.partition(params)))
    )

    def pruned(node):
      if not isinstance(node, nodes.SvdWeight):
        return node
      lam = np.array(node.lam)
      if node.stacked:
        lam[0], lam[1, 0], lam[2, 1:] = 0.0, 0.0, 0.0
      elif node.shape[1] == 3:
        lam[:] = 0.0
      else:
        lam[1] = 0.0
      return node.replace(lam=jnp.asarray(lam))

    params = jax.tree.map(pruned, params, is_leaf=lambda n: isinstance(n, nodes.SvdWeight))
    small = pelt.shrink(params)
    apply = pelt.bypass(model.apply)
    y = apply({"params": params}, x)
    np.testing.assert_allclose(apply({"params": small}, x), y, rtol=0, atol=1e-14)
    if isinstance(model, Scanned):
      assert pelt.ranks(params) == {"layers/dense/kernel": [0, 2, 1]}
      assert small["layers"]["dense"]["kernel"].a.shape == (3, 4, 2)
      assert pelt.ranks(small) == pelt.ranks(params)
    else:
      assert pelt.ranks(params) == {"out/kernel": 0, "up/kernel": 2}
      node = small["up"]["kernel"]
      assert node.a.shape == (4, 2) and node.lam.all() and small["out"]["kernel"].shape == (5, 3)
      assert isinstance(small["out"]["kernel"], jax.Array)
      # The scaling is of the rank at the start; of the new rank it would be 1.5 times as much.
      wrong = {**small, "up": {**small["up"], "kernel": node.replace(scaling=node.scaling * 1.5)}}
      assert jnp.abs(apply({"params": wrong}, x) - y).max() > 1e-3
    merged = pelt.merge(small)
    np.testing.assert_allclose(model.apply({"params": merged}, x), y, rtol=0, atol=1e-13)


def test_scanned_layers_count_apart():
  with jax.enable_x64(True):
    x = values((5, 4), 0)
    batch = {"x": x, "y": values((5, 4), 1)}
    method, _, params = made(Scanned(), x)
    seen, frozen, _ = run(method, params, Scanned(), batch, 30)
    assert sum(pelt.ranks(pelt.combine(seen[-1][0], frozen))["layers/dense/kernel"]) == 3
    assert int(seen[-1][1].post.kept[-1]) == 3


def test_resumed_from_a_checkpoint_to_the_bit(tmp_path):
  x = values((8, 4), 0)
  batch = {"x": x, "y": values((8, 3), 1)}
  method, _, params = made(Pair(), x)
  seen, _, _ = run(method, params, Pair(), batch, 30)
  init, step = training.train_step(pelt.bypass(Pair().apply), squares, optax.adam(0.05), method)
  checkpoints = training.Checkpoints(tmp_path)
  trainable, state = seen[11]
  checkpoints.save(12, {"trainable": trainable, "state": state}, {})
  fresh, frozen, start = init(params)
  _, tree, _ = checkpoints.restore({"trainable": fresh, "state": start})
  trainable, state = tree["trainable"], tree["state"]
  for _ in range(18):
    trainable, state, _ = jax.jit(step)(trainable, frozen, state, batch, jax.random.key(0))
  np.testing.assert_array_equal(lams(trainable), lams(seen[-1][0]))
  np.testing.assert_array_equal(state.post.scores, seen[-1][1].post.scores)
  other = made(Pair(), x, interval=5)[0]
  init, _ = training.train_step(pelt.bypass(Pair().apply), squares, optax.adam(0.05), other)
  fresh, _, start = init(params)
  with pytest.raises(training.CheckpointMismatch, match="interval=4.*interval=5"):
    checkpoints.restore({"trainable": fresh, "state": start})


def test_saved_and_loaded_bit_for_bit(tmp_path):
  x = values((5, 4), 0)
  _, base, params = made(Pair(), x, dropout=0.1)
  params = pelt.combine(
    *(trained(p) if i == 0 else p for i, p in enumerate(pelt.partition(params)))
  )
  for tree in (params, pelt.shrink(params)):
    pelt.save(tmp_path, tree)
    again = pelt.load(tmp_path, base)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
      np.testing.assert_array_equal(one, other)


def test_over_four_bits_and_in_a_bank():
  x = values((4, 64), 0)
  model = nn.Dense(8, use_bias=False)
  base = model.init(jax.random.key(0), x)["params"]
  sites = pelt.sites(model, x)
  options = SETTINGS | {"targets": "kernel"}
  method = pelt.chain(pelt.nf4(targets="kernel"), pelt.adalora(**options))
  coded = method.init(jax.random.key(1), base, sites)
  coded = {"kernel": coded["kernel"].replace(lam=jnp.array([1.0, 0.0, -2.0]))}
  apply = pelt.bypass(model.apply)
  np.testing.assert_allclose(
    apply({"params": coded}, x), x @ pelt.merge(coded)["kernel"], rtol=0, atol=1e-4
  )
  members = []
  for rank in (2, 3):
    one = pelt.adalora(**(options | {"rank": rank})).init(jax.random.key(rank), base, sites)
    members.append({"kernel": one["kernel"].replace(lam=jnp.ones(rank))})
  rows = np.array([1, 0, 0, 1])
  bank = pelt.bank(members)
  both = pelt.bypass(model.apply)({"params": bank}, x, rows=rows)
  for i, row in enumerate(rows):
    alone = apply({"params": members[row]}, x[i : i + 1])
    np.testing.assert_allclose(both[i : i + 1], alone, rtol=0, atol=1e-5)
  method = pelt.adalora(**options)
  with pytest.raises(ValueError, match="are in a bank"):
    method.post_step.init(pelt.partition(bank)[0])


def test_bfloat16_keeps_its_numbers_wide():
  x = values((3, 4), 0).astype(jnp.bfloat16)
  method, _, params = made(nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), x)
  node = params["kernel"]
  assert node.a.dtype == node.lam.dtype == jnp.bfloat16 and node.scaling.dtype == jnp.float32
  state = method.post_step.init(pelt.partition(params)[0])
  assert state.scores.dtype == state.sensitivity["kernel/a"].dtype == jnp.float32
  tree = trained(pelt.partition(params)[0])
  after, state = jax.jit(method.post_step.update)(state, tree, tree, tree)
  assert after["kernel"].lam.dtype == jnp.bfloat16 and isinstance(state, Allocation)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(steps=0), "steps must be"),
    (dict(warmup=20, final=10), "leave none of steps=30"),
    (dict(warmup=-1), "warmup must be"),
    (dict(final=-3), "final must be"),
    (dict(final=0), "final=0, of steps=.*, must be at least 1"),
    (dict(target_rank=4), "target_rank must be from 0 to rank=3"),
    (dict(betas=(0.5, 1.0)), "betas must be"),
    (dict(gamma=-1.0), "gamma must be"),
    (dict(orth="exact"), "orth must be one of"),
    (dict(decay="square"), "decay must be one of"),
    (dict(score="norm"), "score must be one of"),
    (dict(ties="random"), "ties must be one of"),
    (dict(sensitivity="both"), "sensitivity must be one of"),
    (dict(rank=4), "rank 4 exceeds the matrix"),
    (dict(alpha=-1.0), "alpha must be"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises((ValueError, TypeError), match=message):
    made(Pair(), values((3, 4), 0), **options)


def test_what_needs_svd_nodes_says_so():
  lora = {"kernel": nodes.LoraWeight(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0)}
  for function in (pelt.ranks, pelt.shrink):
    with pytest.raises(ValueError, match="hold no SvdWeight"):
      function(lora)
  _, _, params = made(nn.Dense(5), values((3, 4), 0))
  with pytest.raises(TypeError, match="outside jax.jit"):
    jax.jit(pelt.shrink)(params)
  with pytest.raises(ValueError, match="nothing there trains"):
    made(nn.Dense(5), values((3, 4), 0))[0].post_step.init(pelt.partition(lora)[0])


def test_one_budget_is_one_call():
  x = values((3, 4), 0)
  two = [pelt.adalora(**SETTINGS, targets=f"{name}/kernel") for name in ("up", "out")]
  base = Pair().init(jax.random.key(0), x)["params"]
  with pytest.raises(ValueError, match="name both in the targets of one"):
    pelt.chain(*two).init(jax.random.key(1), base, pelt.sites(Pair(), x))


def test_files_of_rank_one(tmp_path):
  """A matrix of one triplet is still a matrix in PEFT's file."""
  x = values((3, 4), 0)
  model = nn.Sequential([nn.Dense(5)])
  base = model.init(jax.random.key(0), x)["params"]
  method = pelt.adalora(**(SETTINGS | {"rank": 2}), targets="kernel")
  params = method.init(jax.random.key(1), base, pelt.sites(model, x))
  node = params["layers_0"]["kernel"]
  lam = jnp.array([0.0, 3.0])
  params = pelt.shrink({"layers_0": {**params["layers_0"], "kernel": node.replace(lam=lam)}})
  pelt.interop.peft.export(tmp_path, params, model)
  again = pelt.interop.peft.load(tmp_path, model, base)["layers_0"]["kernel"]
  for name in ("a", "b", "lam"):
    np.testing.assert_array_equal(again.array(name), params["layers_0"]["kernel"].array(name))
  np.testing.assert_allclose(again.scaling, node.scaling, rtol=1e-6)


def test_training_without_its_schedule_is_said():
  model, x = nn.Dense(3), jnp.ones((2, 4))
  plain, sites = model.init(jax.random.key(0), x)["params"], pelt.sites(model, x)
  method = pelt.adalora(steps=100, rank=3, target_rank=2, targets="kernel")
  params = method.init(jax.random.key(1), plain, sites)
  step = functools.partial(training.train_step, pelt.bypass(model.apply), max, optax.sgd(1.0))
  with pytest.warns(UserWarning, match="no post-step changes, .* method=") as seen:
    step().init(params)
  step(method).init(params)
  step().init(
    pelt.adalora(100, target_rank=2, rank=3, targets="kernel", group=None).init(
      jax.random.key(1), pelt.train("bias").init(jax.random.key(2), plain, sites), sites
    )
  )
  with pytest.warns(UserWarning, match="no post-step changes"):
    training.jobs_step(pelt.bypass(model.apply), max, optax.sgd(1.0)).init([params, params])
  assert len(seen) == 1
