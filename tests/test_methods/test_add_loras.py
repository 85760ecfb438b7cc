"""Arithmetic of LoRAs: sums, negation and interpolation, factors, pruning and ties by hand."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax.methods._add_loras import HOWS, PRUNING
from pelt_jax.quantization import quantize
from tests.test_core.tiny import values
from tests.test_methods.test_to_lora import Stretched, best, delta, lora

FACTORS = ("linear", *PRUNING)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def options(how, density=1.0):
  """What a combination cannot do without."""
  given = {"density": density} if how.removesuffix("_svd") in PRUNING else {}
  return given | ({"key": jax.random.key(0)} if how.startswith("dare") else {})


def added(terms, weights, how, **kwargs):
  """One weight's LoRAs added: its node."""
  adapters = {name: {"w": node} for name, node in terms.items()}
  given = dict(zip(terms, weights, strict=True))
  return pelt.add_loras(adapters, given, how=how, **{**options(how), **kwargs})["w"]


def three(ranks=(2, 2, 2), lead=()):
  """LoRAs of unequal scaling over one matrix, or a stack of some."""
  below = values((*lead, 6, 5), 0, jnp.float64)
  scalings = ([0.5], [3.0], [2.0]) if not lead else ([0.5, 1.0], [3.0, 0.25], [2.0, 2.0])
  return {
    name: lora(below, rank, 10 * i, scaling=jnp.array(s if lead else s[0]))
    for i, (name, rank, s) in enumerate(zip("xyz", ranks, scalings, strict=True), 1)
  }


@pytest.mark.parametrize("how", HOWS)
def test_one_at_weight_1_is_itself(how, float64):
  for lead in ((), (2,)):
    node = three(lead=lead)["y"]
    made = added({"y": node}, [1], how)
    assert made.a.shape == node.a.shape and made.base is node.base
    np.testing.assert_array_equal(made.scaling, np.ones(lead))
    np.testing.assert_allclose(delta(made), delta(node), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_sums_are_exact_for_unequal_ranks_and_scalings(lead, float64):
  terms = three((1, 3, 2), lead)
  want = delta(terms["x"]) - 2.5 * delta(terms["y"]) + 0.75 * delta(terms["z"])
  made = added(terms, [1, -2.5, 0.75], "cat")
  assert made.a.shape[-1] == 6 and made.stacked == len(lead)
  np.testing.assert_allclose(delta(made), want, rtol=0, atol=1e-13)
  np.testing.assert_array_equal(made.scaling, np.ones(lead))
  whole = added(terms, [1, -2.5, 0.75], "svd", rank=5)
  np.testing.assert_allclose(delta(whole), want, rtol=0, atol=1e-13)
  cut = added(terms, [1, -2.5, 0.75], "svd")  # the largest of the ranks
  assert cut.a.shape[-1] == 3
  np.testing.assert_allclose(delta(cut), best(want, 3)[0], rtol=0, atol=1e-13)
  share = added(terms, [1, -2.5, 0.75], "svd", rank=1.0)
  assert share.a.shape[-1] == 5


def test_negation_cancels_and_a_difference_is_one(float64):
  terms = three()
  for how in ("cat", "svd"):
    none = added({"x": terms["x"], "y": terms["x"]}, [1, -1], how)
    np.testing.assert_allclose(delta(none), 0, rtol=0, atol=1e-15)
    against = added({"x": terms["x"]}, [-1], how)
    np.testing.assert_allclose(delta(against), -delta(terms["x"]), rtol=0, atol=1e-14)
  # With the original it is the base, however it was negated: also factor by factor.
  for how in FACTORS:
    against = added({"x": terms["x"]}, [-1], how)
    back = added({"x": terms["x"], "y": against}, [1, 1], "cat")
    np.testing.assert_allclose(delta(back), 0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("how", ["cat", "svd", "linear", "magnitude_prune_svd"])
def test_interpolation_ends_at_its_ends(how, float64):
  terms = {n: t for n, t in three().items() if n != "z"}
  for t, end in ((0.0, "x"), (1.0, "y")):
    made = added(terms, [1 - t, t], how)
    np.testing.assert_allclose(delta(made), delta(terms[end]), rtol=0, atol=1e-13)
  if how in ("cat", "svd"):
    middle = added(terms, [0.5, 0.5], how, **({"rank": 4} if how == "svd" else {}))
    want = (delta(terms["x"]) + delta(terms["y"])) / 2
    np.testing.assert_allclose(delta(middle), want, rtol=0, atol=1e-13)


def test_linear_has_cross_terms(float64):
  """a = sum sgn(c) sqrt|c| a_n, b = sum sqrt|c| b_n, and a b = sum_mn of all products."""
  terms, weights = three(), (1.0, -2.0, 0.25)
  c = [w * float(t.scaling) for w, t in zip(weights, terms.values(), strict=True)]  # .5, -6, .5
  each = list(zip(c, terms.values(), strict=True))
  a = sum(np.sign(x) * abs(x) ** 0.5 * np.asarray(t.a) for x, t in each)
  b = sum(abs(x) ** 0.5 * np.asarray(t.b) for x, t in each)
  made = added(terms, weights, "linear")
  np.testing.assert_allclose(made.a, a, rtol=0, atol=1e-14)
  np.testing.assert_allclose(made.b, b, rtol=0, atol=1e-14)
  cross = sum(
    np.sign(x) * abs(x * y) ** 0.5 * np.asarray(s.a) @ np.asarray(t.b)
    for (x, s), (y, t) in itertools.product(each, repeat=2)
  )
  np.testing.assert_allclose(delta(made), cross, rtol=0, atol=1e-13)
  plain = sum(w * delta(t) for w, t in zip(weights, terms.values(), strict=True))
  assert np.abs(cross - plain).max() > 0.1


def by_hand(*matrices, eye=True):
  """LoRAs of scaling 1 whose a is given and whose b is the identity."""
  below = jnp.zeros((2, 2))
  one = lambda a: nodes.LoraWeight(below, jnp.array(a), jnp.eye(2), jnp.ones(()))
  return {f"n{i}": one(m) for i, m in enumerate(matrices)}


# With density 0.75 three entries of four stay; c = (1, 4), so roots 1 and 2.
FIRST = [[3.0, -1.0], [0.5, 2.0]]  # 3, -1, ., 2
SECOND = [[2.0, 4.0], [1.0, -3.0]]  # 2, 4, ., -3


@pytest.mark.parametrize(
  ("how", "majority", "a"),
  [
    ("magnitude_prune", "total", [[3 + 4, -1 + 8], [0, 2 - 6]]),
    # 3 and 2 agree; of -1 and 4 the sum is 3, of 2 and -3 it is -1: one of each stays.
    ("ties", "total", [[(3 + 4) / 2, 8], [0, -6]]),
    # One minus and one plus are no majority: plus.
    ("ties", "frequency", [[(3 + 4) / 2, 8], [0, 2]]),
  ],
)
def test_pruning_and_ties_by_hand(how, majority, a):
  made = added(by_hand(FIRST, SECOND), [1, 4], how, density=0.75, majority=majority)
  np.testing.assert_array_equal(made.a, a)
  # Of the identity three of four entries stay, a zero too; both agree, or both add up.
  np.testing.assert_array_equal(made.b, np.eye(2) * (3 if how == "magnitude_prune" else 1.5))


def test_ties_of_whole_changes_by_hand():
  """As above with the weights themselves, the sign elected before they act."""
  terms = by_hand(FIRST, SECOND)
  made = added(terms, [1, -4], "ties_svd", density=0.75)
  want = [[(3 - 8) / 2, -16], [0, 12]]
  np.testing.assert_allclose(made.materialize(), want, rtol=0, atol=2e-6)
  made = added(terms, [1, -4], "magnitude_prune_svd", density=0.5)
  np.testing.assert_allclose(made.materialize(), [[3, -16], [0, 14]], rtol=0, atol=3e-6)


def test_negative_weights_in_ties_by_hand():
  """The sign of a weight goes to a alone, and has no vote."""
  made = added(by_hand(FIRST, SECOND), [1, -4], "ties", density=0.75)
  np.testing.assert_array_equal(made.a, [[(3 - 4) / 2, -8], [0, 6]])
  np.testing.assert_array_equal(made.b, 1.5 * np.eye(2))


def test_the_number_that_stays_is_rounded_down_and_the_first_of_equals_stay():
  for density, kept in ((0.24, 0), (0.25, 1), (0.74, 2), (1.0, 4)):
    made = added(by_hand([[1.0, -1.0], [1.0, 1.0]]), [1], "magnitude_prune", density=density)
    np.testing.assert_array_equal(
      np.asarray(made.a).reshape(-1), [1, -1, 1, 1][:kept] + [0] * (4 - kept)
    )


@pytest.mark.parametrize("how", ["dare_linear", "dare_linear_svd"])
def test_dare_keeps_its_share_and_its_mean(how, float64):
  terms = {n: t for n, t in three().items() if n != "z"}

  def draw(key):
    node = added(
      terms, [1.0, 0.5], how, density=0.25, key=key, **({"rank": 5} if "svd" in how else {})
    )
    return node.a, node.b

  a, b = jax.vmap(draw)(jax.random.split(jax.random.key(0), 3000))
  if how == "dare_linear":
    roots = [0.5**0.5, 1.5**0.5]
    want = sum(r * np.asarray(t.a) for r, t in zip(roots, terms.values(), strict=True))
    np.testing.assert_allclose(a.mean(0), want, rtol=0, atol=0.15)
    zero = np.asarray(a == 0).mean()  # both terms were dropped
    np.testing.assert_allclose(zero, 0.75**2, atol=0.01)
    # Factors draw apart: an entry of a says nothing about one of b.
    both = np.mean(np.asarray(a[:, 0, 0] == 0) & np.asarray(b[:, 0, 0] == 0))
    np.testing.assert_allclose(both, 0.75**4, atol=0.03)
  else:
    want = delta(terms["x"]) + 0.5 * delta(terms["y"])
    np.testing.assert_allclose(np.mean(a @ b, 0), want, rtol=0, atol=0.15)


def test_dare_draws_by_name_and_place():
  below = jnp.zeros((8, 8))
  node = nodes.LoraWeight(below, jnp.ones((8, 8)), jnp.ones((8, 8)), jnp.ones(()))
  two = {n: {"u": node, "v": node} for n in ("x", "y")}
  mix = lambda adapters, key=0, **w: pelt.add_loras(
    adapters, w, how="dare_ties", density=0.5, key=jax.random.key(key)
  )
  made = mix(two, x=1, y=1)
  turned = mix({n: two[n] for n in ("y", "x")}, y=1, x=1)
  jax.tree.map(np.testing.assert_array_equal, made, turned)
  assert (made["u"].a != made["v"].a).any() and (made["u"].a != made["u"].b).any()
  assert (made["u"].a != mix(two, 1, x=1, y=1)["u"].a).any()
  assert set(np.unique(made["u"].a)) == {0.0, 2.0}  # the mean of those that stayed, doubled


@pytest.mark.parametrize("how", [h for h in HOWS if not h.startswith("dare")])
def test_stacked_is_looped(how, float64):
  stacked, weights = three(lead=(2,)), (1.0, -0.5, 2.0)
  whole = added(stacked, weights, how, **options(how, 0.6))
  for i in range(2):
    take = lambda x, i=i: x[i]
    one = {n: jax.tree.map(take, t).replace(stacked=0) for n, t in stacked.items()}
    layer = added(one, weights, how, **options(how, 0.6))
    np.testing.assert_allclose(delta(whole)[i], delta(layer), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
  ("axes", "shape", "a", "b"),
  [
    ("ihd:ir,rhd", (6, 2, 3), (6, 2), (2, 2, 3)),
    ("eio:eir,ero", (2, 4, 5), (2, 4, 2), (2, 2, 5)),
    ("oi:ir,ro", (5, 4), (4, 2), (2, 5)),
  ],
)
def test_experts_and_other_axes(axes, shape, a, b, float64):
  """Kernels of any axes; each expert is a matrix of its own."""
  make = lambda i: nodes.LoraWeight(
    jnp.zeros(shape),
    values(a, i, jnp.float64),
    values(b, i + 1, jnp.float64),
    jnp.asarray(0.5),
    axes=axes,
  )
  terms = {"x": make(1), "y": make(3)}
  want = delta(terms["x"]) - delta(terms["y"])
  for how, rank in (("cat", None), ("svd", 4)):
    np.testing.assert_allclose(delta(added(terms, [1, -1], how, rank=rank)), want, atol=1e-13)
  for how in ("linear", "magnitude_prune_svd"):
    one = added({"x": terms["x"]}, [1], how)
    assert one.a.shape == a and one.axes == axes
    np.testing.assert_allclose(delta(one), delta(terms["x"]), rtol=0, atol=1e-13)
  if axes[0] == "e":  # of each expert half of the entries
    pruned = added({"x": terms["x"]}, [1], "magnitude_prune", density=0.5)
    np.testing.assert_array_equal((np.asarray(pruned.a) != 0).sum((1, 2)), [4, 4])


def test_ties_votes_without_weights():
  """An adapter at weight 0 adds nothing, but its signs count."""
  made = added(by_hand([[1.0, 0.0], [0.0, 1.0]], [[-2.0, 0.0], [0.0, 2.0]]), [1, 0], "ties")
  np.testing.assert_array_equal(made.a, [[0, 0], [0, 0.5]])


def test_where_an_adapter_has_none_its_change_is_zero(float64):
  terms = three()
  below = terms["x"].base
  adapters = {"x": {"u": terms["x"], "v": below}, "y": {"u": below, "v": terms["y"]}}
  for how in ("cat", "svd", "linear", "ties", "magnitude_prune_svd"):
    made = pelt.add_loras(adapters, {"x": 2, "y": -1}, how=how, **options(how))
    np.testing.assert_allclose(delta(made["u"]), 2 * delta(terms["x"]), rtol=0, atol=1e-13)
    np.testing.assert_allclose(delta(made["v"]), -delta(terms["y"]), rtol=0, atol=1e-13)


def test_several_on_a_weight_and_fused_ones(float64):
  below = values((6, 6), 0, jnp.float64)
  two = lora(lora(below, 1, 1, scaling=3.0), 2, 3)
  whole = lambda node: np.asarray(node.materialize() - below)
  other = lora(below, 3, 7)
  fused = nodes.FusedLora(
    below, values((2, 6, 1), 5, jnp.float64), values((2, 1, 2), 6, jnp.float64), jnp.asarray(2.0)
  )
  terms = {"two": two, "other": other, "fused": fused}
  made = added(terms, [1, 2, -1], "cat")
  assert made.a.shape == (6, 1 + 2 + 3 + 2) and made.base is below
  want = whole(two) + 2 * whole(other) - whole(fused)
  np.testing.assert_allclose(delta(made), want, rtol=0, atol=1e-13)
  for how in FACTORS:
    np.testing.assert_allclose(delta(added({"two": two}, [1], how)), whole(two), atol=1e-13)
  assert added({"two": two, "other": other}, [1, 1], "linear").a.shape == (6, 3)


def test_over_4_bits_in_16_bits_and_saved(tmp_path):
  kernel = values((64, 8), 0)
  below = quantize(kernel)
  a, b = (jnp.asarray(values(s, i), jnp.bfloat16) for i, s in enumerate(((64, 2), (2, 8))))
  node = nodes.LoraWeight(below, a, b, jnp.asarray(0.3), dropout=nodes.Dropout(jnp.asarray(0.1)))
  made = added({"x": node, "y": node}, [0.25, 0.5], "cat")
  assert made.base is below and made.a.dtype == jnp.float32 and made.dropout is None
  want = 0.75 * 0.3 * np.asarray(a, np.float32) @ np.asarray(b, np.float32)
  np.testing.assert_allclose(made.a @ made.b, want, rtol=0, atol=1e-5)
  half = added({"x": node, "y": node}, [0.25, 0.5], "svd", dtype=jnp.bfloat16)
  assert half.a.dtype == half.b.dtype == jnp.bfloat16 and half.scaling.dtype == jnp.float32
  pelt.save(tmp_path, {"w": made})
  again = pelt.load(tmp_path, {"w": kernel})
  jax.tree.map(np.testing.assert_array_equal, again, {"w": made})


def test_weights_may_be_traced_and_learned(float64):
  """Mixing weights by gradient: d<G, sum w_n D_n>/dw_n = <G, D_n>."""
  terms = three()
  g = values((6, 5), 9, jnp.float64)

  @jax.jit
  @jax.grad
  def slope(weights):
    return jnp.vdot(added(terms, list(weights), "cat").materialize(), g)

  want = [np.vdot(delta(t), g) for t in terms.values()]
  np.testing.assert_allclose(slope(jnp.array([1.0, 0.5, -2.0])), want, rtol=1e-12)
  jitted = jax.jit(lambda w: added(terms, list(w), "svd", rank=5).materialize())
  want = added(terms, [1, 0.5, -2], "cat").materialize()
  np.testing.assert_allclose(jitted(jnp.array([1.0, 0.5, -2.0])), want, rtol=0, atol=1e-13)


def test_heads():
  below = jnp.zeros((2, 2))
  node = by_hand(FIRST)["n0"]
  task = lambda v, **more: {"w": node, "head": nodes.Tuned(jnp.full(3, v)), "norm": below, **more}
  one, two, none = task(1.0), task(2.0), {"w": node, "head": jnp.zeros(3), "norm": below}
  add = lambda adapters, **kw: pelt.add_loras(adapters, dict.fromkeys(adapters, 0.5), **kw)
  made = add({"one": one, "none": none})
  assert made["head"] is one["head"] and made["norm"] is below
  with pytest.raises(ValueError, match="'head'.*choose whose they are, head='one'"):
    add({"one": one, "two": two})
  assert add({"one": one, "two": two}, head="two")["head"] is two["head"]
  assert add({"one": one, "none": none}, head="none")["head"] is none["head"]


def test_bad_input():
  terms = by_hand(FIRST, SECOND)
  below, node = terms["n0"].base, terms["n0"]
  adapters = {name: {"w": t} for name, t in terms.items()}
  ones = dict.fromkeys(terms, 1)

  def refused(match, adapters=adapters, weights=ones, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
      pelt.add_loras(adapters, weights, **kwargs)

  refused("how must be one of .*'cat'.*got 'sum'", how="sum")
  refused("rank must be", how="svd", rank=0)
  refused("rank must be", how="svd", rank=1.5)
  refused("'cat' has no use for rank=", rank=2)
  refused("'linear' has no use for density=", how="linear", density=0.5)
  refused("'ties' has no use for key=", how="ties", density=0.5, key=jax.random.key(0))
  refused("'ties' needs density=", how="ties")
  refused("'dare_ties_svd' needs key=", how="dare_ties_svd", density=0.5)
  for density in (0.0, -1.0, 1.5):
    refused("density must be", how="ties", density=density)
  refused("majority must be", how="ties", density=0.5, majority="most")
  refused("adapters is empty", {}, {})
  refused("one weight to each", weights={"n0": 1})
  refused("finite", weights={"n0": 1, "n1": float("nan")})
  refused("head='n2'", head="n2")
  refused("hold no LoRA", {n: {"w": below} for n in terms})
  refused("other values at 'w'", {"n0": {"w": node}, "n1": {"w": node.replace(base=below + 1)}})
  refused("different models: not all have 'v'", {"n0": {"w": node}, "n1": {"v": node}})
  unequal = node.replace(a=node.a[:, :1], b=node.b[:1])
  some = {"n0": {"w": node}, "n1": {"w": unequal}}
  for how in FACTORS:
    refused(f"'{how}' adds factors.*'n0': 2, 'n1': 1.*'cat'", some, how=how, **options(how))
  refused("different ways", {"n0": {"w": node}, "n1": {"w": node.replace(axes="oi:ir,ro")}})
  refused("trained it as it is", {"n0": {"w": node}, "n1": {"w": nodes.Tuned(below)}})
  tuned = node.replace(base=nodes.Tuned(below))
  refused("(?s)n1.*w: a LoraWeight over a leaf", {"n0": {"w": node}, "n1": {"w": tuned}})
  gate = nodes.MeanGate(jnp.zeros((2, 1)), jnp.zeros(1))
  refused(
    "(?s)n0.*to_lora.*w: its gate", {"n0": {"w": node.replace(scaling=gate)}, "n1": {"w": node}}
  )
  bypass = {"w": node, "bypass": nodes.After(nodes.Bottleneck(below, None, below, None))}
  refused("After wraps a module's call", {"n0": bypass, "n1": {"w": node}})
  odd = {"w": Stretched(below, jnp.ones(2))}
  refused("w: a Stretched is no LoRA pair", {"n0": odd, "n1": {"w": node}})


def test_factors_that_are_no_change_are_refused():
  x = jnp.ones((1, 4))
  model = nn.Dense(3, use_bias=False)
  base = model.init(jax.random.key(0), x)["params"]
  started = pelt.pissa(2, targets="kernel").init(jax.random.key(1), base, pelt.sites(model, x))
  with pytest.raises(ValueError, match="'kernel' starts from a part of the weight"):
    pelt.add_loras({"one": started}, {"one": -1})
