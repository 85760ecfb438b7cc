"""Plain functions of trees with nodes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax._transform import PostStep, Transform
from tests.support import on_devices
from tests.test_core import tiny
from tests.test_core.tiny import values


def tree(group="fast"):
  """A LoRA in a group on a kernel, a tuned bias, a plain leaf."""
  lora = nodes.LoraWeight(
    values((4, 3), 0), values((4, 2), 1), values((2, 3), 2), jnp.asarray(0.5), group=group
  )
  return {"d": {"kernel": lora, "bias": nodes.Tuned(values((3,), 3))}, "w": values((3, 2), 4)}


def loss(params, x):
  d, w = params["d"], params["w"]
  y = jnp.tanh(d["kernel"].matmul(x) + d["bias"].materialize()[None])
  return jnp.sum((y @ w) ** 2)


X = values((5, 4), 7)


def is_hole(x):
  return isinstance(x, optax.MaskedNode)


def test_labels_on_params_updates_and_holes():
  names = pelt.labels(tree())
  assert names["d"]["kernel"].a == names["d"]["kernel"].b == "fast"
  assert names["d"]["kernel"].base == names["d"]["kernel"].scaling == names["w"] == "frozen"
  assert names["d"]["bias"].value == "trainable"
  assert jax.tree.structure(names) == jax.tree.structure(tree())
  frozen = jax.tree.map(lambda x: x, tree()) | {"d": {**tree()["d"]}}
  frozen["d"]["kernel"] = frozen["d"]["kernel"].replace(group=None)
  assert pelt.labels(frozen)["d"]["kernel"].a == "frozen"


def test_partition_and_combine_are_inverse():
  for parts in (pelt.partition(tree()), pelt.partition(tree(), extra=True)):
    for ordered in (parts, parts[::-1]):
      joined = pelt.combine(*ordered)
      assert jax.tree.structure(joined) == jax.tree.structure(tree())
      jax.tree.map(np.testing.assert_array_equal, joined, tree())
  trainable, extra, base = pelt.partition(tree(), extra=True)
  assert [len(jax.tree.leaves(t)) for t in (trainable, extra, base)] == [3, 1, 2]
  assert is_hole(trainable["w"]) and is_hole(trainable["d"]["kernel"].scaling)
  np.testing.assert_array_equal(extra["d"]["kernel"].scaling, 0.5)


def test_combine_refuses_two_values():
  trainable, frozen = pelt.partition(tree())
  with pytest.raises(ValueError, match=r"2 trees have a value at \['d'\]\['kernel'\].base"):
    pelt.combine(frozen, tree())
  with pytest.raises(ValueError, match="at least one"):
    pelt.combine()
  with pytest.raises(ValueError):
    pelt.combine(trainable, {"w": frozen["w"]})


def test_partition_of_plain_params_raises():
  with pytest.raises(ValueError, match="nothing in params trains"):
    pelt.partition({"w": jnp.ones(2)})


def test_value_and_grad_is_that_of_the_trainable_part():
  trainable, frozen = pelt.partition(tree())
  value, grads = pelt.value_and_grad(loss)(trainable, frozen, X)
  whole_value, whole = jax.value_and_grad(loss)(tree(), X)
  np.testing.assert_array_equal(value, whole_value)
  assert jax.tree.structure(grads) == jax.tree.structure(trainable)
  jax.tree.map(np.testing.assert_array_equal, grads, pelt.partition(whole)[0])
  aux = pelt.value_and_grad(lambda p, x: (loss(p, x), x.shape), has_aux=True)
  assert aux(trainable, frozen, X)[0][1] == X.shape


def train(route, group="fast", steps=3):
  """Params after some steps by one of the two routes, and the optimizer's state."""
  inner = optax.adamw(0.1, weight_decay=0.5)
  # Adam raises a float to an integer power.
  with jax.numpy_dtype_promotion("standard"):
    if route == "partition":
      trainable, frozen = pelt.partition(tree(group))
      state = inner.init(trainable)
      for _ in range(steps):
        _, grads = pelt.value_and_grad(loss)(trainable, frozen, X)
        updates, state = inner.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
      return pelt.combine(trainable, frozen), state
    one = lambda: inner
    groups = {"trainable": one(), "fast": one(), "frozen": optax.set_to_zero()}
    tx = optax.multi_transform(groups, pelt.labels)
    params = tree(group)
    state = tx.init(params)
    for _ in range(steps):
      trainable, frozen = pelt.partition(params)
      _, some = pelt.value_and_grad(loss)(trainable, frozen, X)
      grads = pelt.combine(some, jax.tree.map(jnp.zeros_like, frozen))
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params, state


def test_both_routes_give_equal_params_to_the_bit():
  one, _ = train("partition", "trainable")
  two, _ = train("multi_transform", "trainable")
  jax.tree.map(np.testing.assert_array_equal, one, two)
  # Optax compiles Adam's bias correction per tree: with two groups the last bit may differ.
  three, _ = train("multi_transform")
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  jax.tree.map(close, jax.tree.leaves(one), jax.tree.leaves(three))


@pytest.mark.parametrize("route", ["partition", "multi_transform"])
def test_frozen_leaves_stay_and_have_no_state(route):
  params, state = train(route)
  before, after = tree(), params
  np.testing.assert_array_equal(after["w"], before["w"])
  np.testing.assert_array_equal(after["d"]["kernel"].base, before["d"]["kernel"].base)
  np.testing.assert_array_equal(after["d"]["kernel"].scaling, before["d"]["kernel"].scaling)
  assert jnp.abs(after["d"]["kernel"].a - before["d"]["kernel"].a).min() > 0
  arrays = [x.shape for x in jax.tree.leaves(state) if jnp.ndim(x)]
  assert sorted(arrays) == sorted(2 * [(4, 2), (2, 3), (3,)])


def test_clipping_sees_trainable_leaves_only():
  trainable, frozen = pelt.partition(tree())
  _, grads = pelt.value_and_grad(loss)(trainable, frozen, X)
  norm = optax.tree.norm(grads)
  assert norm < optax.tree.norm(jax.grad(loss)(tree(), X))
  clip = optax.clip_by_global_norm(norm * 1.01)  # above the trainable norm: nothing is clipped
  kept, _ = clip.update(grads, clip.init(trainable))
  jax.tree.map(np.testing.assert_array_equal, kept, grads)


def test_vmap_over_jobs_equals_separate_runs():
  """Seeds, alphas and learning rates differ; the base is shared and not mapped."""
  base = values((4, 3), 0)

  def job(seed, alpha):
    a, b = values((4, 2), seed), values((2, 3), 50 + seed)
    lora = nodes.LoraWeight(base, a, b, jnp.asarray(alpha / 2))
    bias = nodes.Tuned(values((3,), 90 + seed))
    return {"d": {"kernel": lora, "bias": bias}, "w": values((3, 2), 4)}

  jobs = [job(s, a) for s, a in ((0, 1.0), (1, 4.0), (2, 16.0))]
  rates = jnp.array([0.1, 0.01, 0.03])

  def step(trainable, extra, shared, rate):
    _, grads = pelt.value_and_grad(loss)(trainable, pelt.combine(extra, shared), X)
    return jax.tree.map(lambda p, g: p - rate * g, trainable, grads)

  parts = [pelt.partition(j, extra=True) for j in jobs]
  join = lambda i: jax.tree.map(lambda *v: jnp.stack(v), *(p[i] for p in parts))
  many = jax.vmap(step, in_axes=(0, 0, None, 0))(join(0), join(1), parts[0][2], rates)
  for i, part in enumerate(parts):
    alone = step(*part, rates[i])
    close = lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, many, alone)


def test_delta_and_the_rest_make_the_whole():
  added = pelt.delta(tree())
  assert len(jax.tree.leaves(added)) == 4 and is_hole(added["w"])
  assert is_hole(added["d"]["kernel"].base)


def test_merge_lists_every_path_it_cannot():
  branch = nodes.Bottleneck(jnp.ones((3, 1)), None, jnp.ones((1, 3)), None, None)
  params = tree()
  params["d"]["bypass"] = nodes.After(branch)
  params["e"] = {"bypass": nodes.AroundNorm(branch)}
  params["f"] = pelt.bank([{"f": tree()["d"]["kernel"]}] * 2)["f"]
  with pytest.raises(
    ValueError, match=r"(?s)d/bypass: After.*e/bypass: AroundNorm.*f: a bank of 2"
  ):
    pelt.merge(params)
  assert pelt.merge({"w": params["w"]}) == {"w": params["w"]}


def test_merge_keeps_structure_and_dtype():
  merged = pelt.merge(tree())
  assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), merged) == {
    "d": {"kernel": ((4, 3), "float32"), "bias": ((3,), "float32")},
    "w": ((3, 2), "float32"),
  }


def test_count():
  total = pelt.count(tree())
  assert total == pelt.Count(
    trainable=4 * 2 + 2 * 3 + 3, stored=17, changed=15, rank=2, head=None, total=21, bytes=68
  )


def test_penalty_is_zero_without_regularisers():
  np.testing.assert_array_equal(pelt.penalty(tree()), jnp.zeros((), jnp.float32))


def test_penalties_of_several_dtypes_add_up_in_the_widest():
  def fusion(dtype):
    value = jnp.zeros((2, 2), dtype)
    return nodes.Fusion(None, None, None, None, None, value, names=("a",), regularization=0.5)

  with jax.enable_x64(True):
    kinds = ("bfloat16", "float32", "float64")
    total = pelt.penalty({kind: {"bypass": nodes.After(fusion(kind))} for kind in kinds})
    assert total.dtype == jnp.float64 and float(total) == 3 * 0.5 * 2


def test_chain_runs_post_steps_in_order_and_refuses_strangers():
  def step(factor, offset):
    update = lambda state, old, new, grads, record=None: (
      jax.tree.map(lambda x: x * factor + offset, new), state + 1,
    )  # fmt: skip
    return Transform(lambda key, params, sites: params, PostStep(lambda p: jnp.zeros(()), update))

  chain = pelt.chain(step(2.0, 0.0), Transform(lambda k, p, s: p), step(1.0, 1.0))
  state = chain.post_step.init(None)
  new, state = chain.post_step.update(state, jnp.ones(()), jnp.asarray(3.0), None)
  assert float(new) == 7.0 and [float(s) for s in state] == [1.0, 1.0]
  assert pelt.chain(Transform(lambda k, p, s: p)).post_step is None
  for wrong in ((), (lambda: None,)):
    with pytest.raises(TypeError, match="chain takes|Transform"):
      pelt.chain(*wrong)


def test_transforms_can_be_jitted_with_sites_static():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  base, sites = tiny.looped_params(), pelt.sites(model, ids, mask)
  assert hash(sites) == hash(pelt.sites(model, ids, mask))
  method = pelt.chain(pelt.lora(rank=2, targets="mlp/up"), pelt.bitfit())
  eager = method.init(jax.random.key(0), base, sites)
  jitted = jax.jit(method.init, static_argnums=2)(jax.random.key(0), base, sites)
  assert jax.tree.structure(eager) == jax.tree.structure(jitted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)


def test_two_methods_cannot_train_one_leaf():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  base, sites = tiny.looped_params(), pelt.sites(model, ids, mask)
  init = lambda *m: pelt.chain(*m).init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="head/kernel.*trains already"):
    init(pelt.train("head"), pelt.lora(rank=2, targets="head"))
  with pytest.raises(ValueError, match="head/kernel.*already"):
    init(pelt.lora(rank=2, targets="head"), pelt.train("head/kernel"))
  with pytest.raises(ValueError, match="full"):
    init(pelt.lora(rank=2, targets="head"), pelt.full())
  # A module or role claims what is left.
  params = init(pelt.lora(rank=2, targets="head"), pelt.train("head"))
  assert isinstance(params["head"]["bias"], nodes.Tuned)
  assert isinstance(params["head"]["kernel"], nodes.LoraWeight)


@pytest.mark.parity
def test_full_equals_plain_optax_to_the_bit():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  base = tiny.looped_params()
  params = pelt.full().init(jax.random.key(0), base, pelt.sites(model, ids, mask))
  trainable, frozen = pelt.partition(params)
  assert not jax.tree.leaves(frozen)
  tx = optax.sgd(0.1, momentum=0.9)
  objective = lambda apply: lambda p: jnp.sum(apply({"params": p}, ids, mask) ** 2)
  ours, theirs = objective(pelt.bypass(model.apply)), objective(model.apply)
  state, plain_state = tx.init(trainable), tx.init(base)
  for _ in range(2):
    grads = jax.jit(pelt.value_and_grad(ours))(trainable, frozen)[1]
    updates, state = tx.update(grads, state)
    trainable = optax.apply_updates(trainable, updates)
    updates, plain_state = tx.update(jax.jit(jax.grad(theirs))(base), plain_state)
    base = optax.apply_updates(base, updates)
  jax.tree.map(np.testing.assert_array_equal, pelt.merge(pelt.combine(trainable, frozen)), base)


def test_shardings_on_eight_devices():
  on_devices("""
    import jax, jax.numpy as jnp, pelt_jax as pelt
    from jax.sharding import PartitionSpec as P
    from pelt_jax import nodes
    mesh = jax.make_mesh((2, 4), ("fsdp", "model"))
    w = jnp.ones((8, 12))
    lora = nodes.LoraWeight(w, jnp.ones((8, 2)), jnp.ones((2, 12)), jnp.ones(()))
    many = nodes.LoraWeight(
      jnp.ones((3, 8, 12)), jnp.ones((3, 8, 2)), jnp.ones((3, 2, 12)), jnp.ones(3), stacked=1)
    branch = nodes.Bottleneck(jnp.ones((8, 2)), None, jnp.ones((2, 8)), None, None)
    params = {
      "in": {"kernel": lora, "bias": nodes.Tuned(jnp.ones(12)), "bypass": nodes.After(branch)},
      "out": {"kernel": lora}, "scan": {"kernel": many}, "odd": jnp.ones((6, 3)),
    }
    specs = {
      "in": {"kernel": P("fsdp", "model"), "bias": P("model")},
      "out": {"kernel": P("model", "fsdp")},
      "scan": {"kernel": P(None, "fsdp", "model")}, "odd": P("fsdp", "model"),
    }
    got = pelt.shardings(params, specs, mesh)
    placed = jax.device_put(params, got)
    def same(s, *want):
      full = tuple(s.spec) + (None,) * (len(want) - len(s.spec))
      assert full == want, (s.spec, want)
    same(got["in"]["kernel"].base, "fsdp", "model")
    same(got["in"]["kernel"].a, None, None)
    same(got["in"]["kernel"].b, None, "model")
    same(got["out"]["kernel"].a, "model", None)
    same(got["out"]["kernel"].b, None, None)
    same(got["scan"]["kernel"].b, None, None, "model")
    same(got["in"]["bias"].value, "model")
    same(got["in"]["bypass"].branch.down, None, None)
    same(got["odd"], "fsdp", None)  # 4 does not divide 3
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    try:
      pelt.shardings(params, {"in": specs["in"]}, mesh)
    except ValueError as error:
      assert "odd" in str(error) or "out" in str(error)
    else:
      raise AssertionError("a missing spec must raise")
  """)
