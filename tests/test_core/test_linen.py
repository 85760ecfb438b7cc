"""Any Linen model: every module kind, lifted transforms, module styles; loud errors."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax._transform import add_bypass
from pelt_jax._walk import update_at
from tests.test_core import tiny
from tests.test_core.tiny import values


def lora_of(model, *args, targets="*", rank=1, moved=True, **kwargs):
  """Plain params, params with LoRA on what `targets` names, moved off zero."""
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  params = nn.meta.unbox(model.init(keys, *args, **kwargs)["params"])
  method = pelt.lora(rank=rank, alpha=3, targets=targets)
  adapted = method.init(jax.random.key(1), params, pelt.sites(model, *args, **kwargs))
  if not moved:
    return params, adapted
  trainable, frozen = pelt.partition(adapted)
  return params, pelt.combine(jax.tree.map(lambda x: x + 0.125, trainable), frozen)


# Sums of at most a few dozen float32 terms of order 1: rounding stays below 1e-5.
TOLERANCE = dict(rtol=0, atol=1e-5)


class Raw(nn.Module):
  """A kernel without a rule."""

  @nn.compact
  def __call__(self, x):
    return x @ self.param("w", nn.initializers.normal(), (x.shape[-1], 3))


class Scaled(nn.Dense):
  """A subclass that scales what its parent computes."""

  @nn.compact
  def __call__(self, x):
    return 2.0 * super().__call__(x)


class Twisted(nn.Dense):
  """A subclass that computes something else with the same leaf."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    return x @ kernel * 61.0


X = (2, 3, 4)
general = nn.DenseGeneral
MODULES: dict[str, tuple[Any, tuple[int, ...]]] = {
  "dense": (nn.Dense(5), X),
  "dense, vector": (nn.Dense(5), (4,)),
  "dense, no bias": (nn.Dense(5, use_bias=False), X),
  "dense, own dot_general": (nn.Dense(5, dot_general=jax.lax.dot_general), X),
  "dense, precision": (nn.Dense(5, precision="highest"), X),
  "general, two features": (general((2, 5)), X),
  "general, two axes": (general(5, axis=(-2, -1)), X),
  "general, axes out of order": (general((2, 2), axis=(-1, -2)), X),
  "general, middle axis": (general(5, axis=1), X),
  "general, batch": (general(5, axis=-1, batch_dims=(0,)), X),
  "general, two batch": (general((2, 5), axis=2, batch_dims=(0, 1)), X),
  "general, batch, no bias": (general(5, batch_dims=(0,), use_bias=False), X),
  "einsum": (nn.Einsum((4, 2, 5), "...i,iho->...ho"), X),
  "einsum, experts": (nn.Einsum((3, 4, 5), "bei,eio->beo"), X),
  "einsum, kernel read backwards": (nn.Einsum((5, 4), "bti,oi->bto", use_bias=False), X),
  "einsum, two contracted": (nn.Einsum((3, 4, 5), "bti,tio->bo"), X),
  "conv": (nn.Conv(5, (3,)), X),
  "raw": (Raw(), X),
  "subclass that scales": (Scaled(5), X),
  "subclass that overrides": (Twisted(5), X),
  "attention": (nn.MultiHeadDotProductAttention(2), X),
}


@pytest.mark.parametrize("name", MODULES)
def test_lora_equals_its_merged_weights(name):
  model, shape = MODULES[name]
  x = values(shape, 0)
  plain, adapted = lora_of(model, x)
  got = pelt.bypass(model.apply)({"params": adapted}, x)
  want = model.apply({"params": pelt.merge(adapted)}, x)
  np.testing.assert_allclose(got, want, **TOLERANCE)
  assert got.dtype == want.dtype
  assert jnp.abs(want - model.apply({"params": plain}, x)).max() > 1e-3
  # A module nobody knows gets the merged array even without the bypass.
  np.testing.assert_allclose(model.apply({"params": adapted}, x), want, **TOLERANCE)


def test_rules_are_used_where_they_exist():
  """No product builds the merged kernel: the jaxpr has no array of its size but the base."""
  x = jnp.ones((2, 64))
  _, adapted = lora_of(nn.Dense(48), x)
  text = str(jax.make_jaxpr(lambda p: pelt.bypass(nn.Dense(48).apply)({"params": p}, x))(adapted))
  assert text.count("64,48") == 1, text
  _, adapted = lora_of(Twisted(48), x)
  text = str(jax.make_jaxpr(lambda p: pelt.bypass(Twisted(48).apply)({"params": p}, x))(adapted))
  assert text.count("64,48") > 1


def test_embed_and_attend():
  class Tied(nn.Module):
    def setup(self):
      self.table = nn.Embed(7, 4)

    def __call__(self, ids):
      return self.table.attend(self.table(ids))

    def encode(self, ids):
      return self.table(ids)

  model, ids = Tied(), jnp.array([[0, 6, 3], [1, 1, 2]])
  plain, adapted = lora_of(model, ids, targets="table", rank=2)
  node = adapted["table"]["embedding"]
  np.testing.assert_array_equal(node.a, 0.125)  # zero at first: the roles of a and b change
  apply, merged = pelt.bypass(model.apply), pelt.merge(adapted)
  for method in (None, "encode"):
    got = apply({"params": adapted}, ids, method=method)
    want = model.apply({"params": merged}, ids, method=method)
    np.testing.assert_allclose(got, want, **TOLERANCE)
  table = plain["table"]["embedding"] + 1.5 * node.a @ node.b  # alpha 3, rank 2
  np.testing.assert_allclose(merged["table"]["embedding"], table, **TOLERANCE)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"epsilon": 0.1}], ids=str)
def test_norms_with_tuned_leaves(kind, options):
  if kind is nn.RMSNorm and options.get("use_scale") is False:
    return  # nothing to train
  model, x = kind(**options), values(X, 0)
  params = jax.tree.map(lambda p: values(p.shape, 3), model.init(jax.random.key(0), x)["params"])
  tuned = pelt.train("*").init(jax.random.key(0), params, pelt.sites(model, x))
  want = model.apply({"params": params}, x)
  np.testing.assert_array_equal(pelt.bypass(model.apply)({"params": tuned}, x), want)


def test_norm_banks_by_row():
  model, x = nn.LayerNorm(), values(X, 0)
  params = model.init(jax.random.key(0), x)["params"]
  sites = pelt.sites(model, x)
  members = [
    pelt.train("*").init(
      jax.random.key(0), jax.tree.map(lambda p, n=n: values(p.shape, n), params), sites
    )
    for n in range(3)
  ]
  got = pelt.bypass(model.apply)({"params": pelt.bank(members)}, x, rows=jnp.array([2, 1]))
  for b, n in enumerate((2, 1)):
    want = model.apply({"params": pelt.merge(members[n])}, x)[b]
    np.testing.assert_allclose(got[b], want, **TOLERANCE)


# Lifted transforms.


class Inner(nn.Module):
  """A dense layer that is a carry step too."""

  @nn.compact
  def __call__(self, x, _=None):
    return jnp.tanh(nn.Dense(4, name="dense")(x)), None


class Lifted(nn.Module):
  """`Inner` under a lifted transform."""

  kind: str

  @nn.compact
  def __call__(self, x):
    scan = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    made = {
      "remat": lambda: nn.remat(Inner),
      "jit": lambda: nn.jit(Inner),
      "scan": lambda: nn.scan(Inner, **scan),
      "scan of remat": lambda: nn.scan(nn.remat(Inner), **scan),
      "jit of scan": lambda: nn.jit(nn.scan(Inner, **scan)),
      "scan of scan": lambda: nn.scan(nn.scan(Inner, **scan), **scan),
      "vmap": lambda: nn.vmap(
        Inner, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True}
      ),
    }[self.kind]()
    return made(name="inner")(x)[0]


LIFTED = ("remat", "jit", "scan", "scan of remat", "jit of scan", "scan of scan", "vmap")


@pytest.mark.parametrize("kind", LIFTED)
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_lifted_transforms(kind, outer):
  model, x = Lifted(kind), values((2, 3, 4), 0)
  plain, adapted = lora_of(model, x)
  site = next(s for s in pelt.sites(model, x) if s.name == "kernel")
  assert site.shape == (4, 4)
  assert site.stacked == {"scan of scan": (3, 3), "remat": (), "jit": ()}.get(kind, (3,))
  node = adapted["inner"]["dense"]["kernel"]
  assert node.stacked == len(site.stacked) and node.scaling.shape == site.stacked
  if site.stacked:  # a layer drawn like another would hide a mix-up
    assert len(np.unique(np.asarray(node.a))) == node.a.size
  got = outer(pelt.bypass(model.apply))({"params": adapted}, x)
  np.testing.assert_allclose(got, model.apply({"params": pelt.merge(adapted)}, x), **TOLERANCE)
  assert jnp.abs(got - model.apply({"params": plain}, x)).max() > 1e-3


def test_vmap_of_the_applied_function():
  model, x = Lifted("scan"), values((5, 2, 3, 4), 0)
  _, adapted = lora_of(model, x[0])
  apply = pelt.bypass(model.apply)
  got = jax.vmap(lambda v: apply({"params": adapted}, v))(x)
  want = jnp.stack([apply({"params": adapted}, v) for v in x])
  np.testing.assert_allclose(got, want, **TOLERANCE)


def test_jit_of_the_plain_model_leaves_no_trace():
  """`jax.jit` does not key on interceptors; a bypass entered outside would give stale results."""
  model, x = nn.Dense(3), values((2, 4), 0)
  params, adapted = lora_of(model, x)
  adapted = tuned_after(model, params, x)
  plain, bypassed = jax.jit(model.apply), jax.jit(pelt.bypass(model.apply))
  before = plain({"params": params}, x)
  moved = bypassed({"params": adapted}, x)
  np.testing.assert_array_equal(plain({"params": params}, x), before)
  np.testing.assert_array_equal(bypassed({"params": params}, x), before)
  assert jnp.abs(moved - before).max() > 1e-3
  with pytest.raises(RuntimeError, match="use pelt.bypass"):
    plain({"params": adapted}, x)


def tuned_after(model, params, x, path="", width=3):
  branch = nodes.Bottleneck(
    jnp.full((width, 2), 0.5), None, jnp.full((2, width), 0.25), None, jnp.asarray(2.0)
  )
  return add_bypass(params, pelt.sites(model, x), path, nodes.After(branch))


# The five module styles: `next` called twice must not make new names.


class Setup(nn.Module):
  def setup(self):
    self.first, self.second = nn.Dense(4), nn.Dense(4)

  def __call__(self, x):
    return self.second(jnp.tanh(self.first(x)))


class Named(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="second")(jnp.tanh(nn.Dense(4, name="first")(x)))


class AutoNamed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(jnp.tanh(nn.Dense(4)(x)))


class OwnLeaf(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param("w", nn.initializers.normal(), (4, 4))
    return nn.Dense(4)(jnp.tanh(x @ w))


class Nested(nn.Module):
  @nn.compact
  def __call__(self, x):
    return AutoNamed()(jnp.tanh(Setup()(x)))


class Wrapper(nn.Module):
  """Calls one module, by default once."""

  make: Any
  times: int = 1

  @nn.compact
  def __call__(self, x):
    inner = self.make(name="inner")
    for _ in range(self.times):
      x = inner(x)
    return nn.Dense(4)(x)  # auto-named after


class TwiceMore(pelt._node.Bypass):
  """`x + next(next(x)) + next(x)`: three runs in one call."""

  scale: Any = pelt._node.own()

  def __call__(self, call, x):
    return x * self.scale + call.next(call.next(x)) + call.next(x)


@pytest.mark.parametrize("make", [Setup, Named, AutoNamed, OwnLeaf, Nested])
@pytest.mark.parametrize("times", [1, 2])
def test_next_many_times_on_every_module_style(make, times):
  model, x = Wrapper(make, times), values((2, 4), 0)
  params = model.init(jax.random.key(0), x)["params"]
  adapted = add_bypass(params, pelt.sites(model, x), "inner", TwiceMore(jnp.asarray(0.5)))
  inner = lambda v: make().apply({"params": params["inner"]}, v)
  want = x
  for _ in range(times):
    want = want * 0.5 + inner(inner(want)) + inner(want)
  want = nn.Dense(4).apply({"params": params["Dense_0"]}, want)
  for apply in (pelt.bypass(model.apply), jax.jit(pelt.bypass(model.apply))):
    np.testing.assert_allclose(apply({"params": adapted}, x), want, **TOLERANCE)


def test_shared_scope_and_super_run_the_node_once():
  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
      inner = nn.Dense(4, name="inner")
      nn.share_scope(self, inner)
      return inner(x)

  for kind in (Outer, lambda name: Scaled(4, name=name)):
    model, x = Wrapper(kind), values((2, 4), 0)
    params = model.init(jax.random.key(0), x)["params"]
    branch = nodes.Bottleneck(jnp.eye(4), None, jnp.eye(4), None, None, activation="identity")
    adapted = add_bypass(params, pelt.sites(model, x), "inner", nodes.After(branch))
    factor = 1.0 if kind is Outer else 2.0
    y = 2 * factor * nn.Dense(4).apply({"params": params["inner"]}, x)  # y + y, once
    want = nn.Dense(4).apply({"params": params["Dense_0"]}, y)
    np.testing.assert_allclose(pelt.bypass(model.apply)({"params": adapted}, x), want, **TOLERANCE)


# Errors, never silent no-ops.


def test_a_role_named_like_leaves_means_the_role():
  class Two(nn.Module):
    roles: ClassVar = {"embedding": (pelt.Role("words"),)}

    @nn.compact
    def __call__(self, ids):
      return nn.Embed(5, 3, name="words")(ids) + nn.Embed(5, 3, name="places")(ids)

  model, ids = Two(), jnp.array([[1, 2]])
  params = model.init(jax.random.key(0), ids)["params"]
  for roles, adapted in ((None, 1), ({}, 2)):  # without roles it is the leaves' own name
    method = pelt.lora(rank=1, targets="embedding")
    new = method.init(jax.random.key(1), params, pelt.sites(model, ids, roles=roles))
    assert sum(isinstance(new[n]["embedding"], nodes.LoraWeight) for n in params) == adapted


def test_a_target_that_matches_nothing_names_the_nearest():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  params, sites = tiny.looped_params(), pelt.sites(model, ids, mask)
  with pytest.raises(ValueError, match="'attn/querry' matches no leaf site.*attn/query"):
    pelt.lora(targets="attn/querry").init(jax.random.key(0), params, sites)
  with pytest.raises(ValueError, match="none stated"):
    pelt.lora(targets="query_role").init(jax.random.key(0), params, sites)
  roles = {"query": (pelt.Role("attn/query"),)}
  named = pelt.sites(model, ids, mask, roles=roles)
  with pytest.raises(ValueError, match=r"Nearest roles: \['query'\]\. Nearest paths"):
    pelt.lora(targets="querry").init(jax.random.key(0), params, named)
  with pytest.raises(ValueError, match=r"Nearest roles: \['all-linear'\]"):
    pelt.lora(targets="all_linear").init(jax.random.key(0), params, sites)
  with pytest.raises(ValueError, match="no layer"):
    pelt.lora(targets="query", rank=2, layers=(7,)).init(jax.random.key(0), params, sites)


class Branching(nn.Module):
  """Two matrices, of which a call uses one; `decode` uses the other."""

  @nn.compact
  def __call__(self, x, other=False):
    a, b = nn.Dense(4, name="a"), nn.Dense(4, name="b")
    return (
      b(x) if other and not self.is_initializing() else a(b(x) if self.is_initializing() else x)
    )


def test_a_site_that_is_never_called_is_refused():
  model, x = Branching(), values((2, 4), 0)
  params = model.init(jax.random.key(0), x)["params"]
  sites = pelt.sites(model, x)
  assert not next(s for s in sites if s.path == "b/kernel").called
  with pytest.raises(ValueError, match="never call.*b/kernel"):
    pelt.lora(rank=1, targets="b").init(jax.random.key(0), params, sites)
  with pytest.raises(ValueError, match="'b'"):
    add_bypass(params, sites, "b", TwiceMore(jnp.asarray(1.0)))
  # A leaf that the trace does not reach may still be trained.
  assert pelt.count(pelt.train("b").init(jax.random.key(0), params, sites)).trainable == 20


@pytest.mark.parametrize("mode", ["loop", "scan_remat"])
def test_forgetting_the_bypass_raises(mode):
  model, (ids, mask) = tiny.Model(mode=mode), tiny.inputs()
  params, sites = tiny.in_mode(tiny.looped_params(), mode), pelt.sites(tiny.Model(mode=mode), ids)
  node = TwiceMore(jnp.full((3,) if mode != "loop" else (), 0.5), stacked=int(mode != "loop"))
  at = "h_1/mlp" if mode == "loop" else "h/mlp"
  adapted = add_bypass(params, sites, at, node)
  bypassed = jax.jit(pelt.bypass(model.apply))
  bypassed({"params": adapted}, ids, mask)  # tracing it must not disarm the guard
  for apply in (model.apply, jax.jit(model.apply)):
    with pytest.raises(RuntimeError, match=r"use pelt\.bypass\(model\.apply\)"):
      apply({"params": adapted}, ids, mask)


def test_a_node_at_a_parameter_free_module_is_guarded_by_an_enclosing_leaf():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  adapted = add_bypass(
    tiny.looped_params(), pelt.sites(model, ids), "h_0/attn/core",
    nodes.Prefix(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3))),
  )  # fmt: skip
  with pytest.raises(RuntimeError, match="use pelt.bypass"):
    model.apply({"params": adapted}, ids, mask)


class TwoWays(nn.Module):
  """A module reached by a method that is not `__call__`."""

  def setup(self):
    self.inner = Setup()
    self.last = nn.Dense(4)

  def __call__(self, x):
    return self.last(self.inner(x))

  def decode(self, x):
    return self.last(self.inner.first(x))

  def direct(self, x):
    return self.inner.half(x)


class Halves(Setup):
  def half(self, x):
    return self.first(x)


def test_a_node_reached_by_another_method_raises():
  class Outer(nn.Module):
    def setup(self):
      self.inner = Halves()

    def __call__(self, x):
      return self.inner(x)

    def half(self, x):
      return self.inner.half(x)

  model, x = Outer(), values((2, 4), 0)
  params = model.init(jax.random.key(0), x)["params"]
  adapted = add_bypass(params, pelt.sites(model, x), "inner", TwiceMore(jnp.asarray(0.5)))
  apply = pelt.bypass(model.apply)
  apply({"params": adapted}, x)
  with pytest.raises(ValueError, match="did not run.*inner/bypass"):
    apply({"params": adapted}, x, method="half")
  # nodes below the method run
  below = add_bypass(params, pelt.sites(model, x), "inner/first", TwiceMore(jnp.asarray(0.5)))
  assert jnp.isfinite(apply({"params": below}, x, method="half")).all()


@pytest.mark.parametrize("name", ["rows", "train_nodes", "record"])
def test_an_argument_of_the_same_name_is_refused(name):
  space: dict[str, Any] = {"nn": nn}
  exec(f"class Odd(nn.Module):\n  def __call__(self, x, {name}=None):\n    return x", space)
  with pytest.raises(TypeError, match=name):
    pelt.bypass(space["Odd"]().apply)


def test_bad_arguments():
  with pytest.raises(TypeError, match="Linen|Module"):
    pelt.sites("model", 1)
  with pytest.raises(TypeError, match="apply|Callable"):
    pelt.bypass("model")


def test_frozen_dict_params_work():
  from flax.core import freeze

  model, x = nn.Dense(3), values((2, 4), 0)
  params = model.init(jax.random.key(0), x)["params"]
  want = model.apply({"params": params}, x)
  method, sites = pelt.lora(rank=2, targets="kernel"), pelt.sites(model, x)
  adapted = method.init(jax.random.key(0), params, sites)
  np.testing.assert_array_equal(pelt.bypass(model.apply)(freeze({"params": adapted}), x), want)
  frozen = freeze(adapted)
  assert pelt.count(frozen).trainable == 14
  np.testing.assert_array_equal(pelt.merge(frozen)["kernel"], params["kernel"])
  trainable, rest = pelt.partition(frozen)
  np.testing.assert_array_equal(
    pelt.bypass(model.apply)({"params": pelt.combine(trainable, rest)}, x), want
  )


# Values handed out.


def gated(mode):
  gate = lambda i: nodes.MeanGate(values((tiny.WIDTH, 1), i), values((1,), 9 + i))
  branch = lambda i: nodes.Bottleneck(
    values((tiny.WIDTH, 2), i), None, values((2, tiny.WIDTH), i), None, jnp.asarray(1.0)
  )
  return tiny.in_mode(
    tiny.at_layers(
      tiny.looped_params(), "mlp/bypass", lambda i: nodes.After(nodes.Gated(gate(i), branch(i)))
    ),
    mode,
  )


def test_record_in_loop_and_scan():
  ids, mask = tiny.inputs()
  run = lambda mode, **options: pelt.bypass(tiny.Model(mode=mode).apply)(
    {"params": gated(mode)}, ids, mask, record="gates", **options
  )
  out, looped = run("loop")
  assert sorted(looped) == [f"h_{i}/mlp" for i in range(3)]
  (scanned_out, variables), scanned = run("scan", mutable=["intermediates"])
  assert list(scanned) == ["h/mlp"] and not variables
  np.testing.assert_allclose(scanned_out, out, **TOLERANCE)
  want = jnp.stack([looped[f"h_{i}/mlp"]["gates"] for i in range(3)])
  np.testing.assert_allclose(scanned["h/mlp"]["gates"], want, **TOLERANCE)
  assert want.shape == (3, tiny.BATCH) and jnp.std(want) > 0


def test_record_under_a_scan_that_declares_nothing_raises():
  ids, mask = tiny.inputs()
  model = tiny.Model(mode="scan", declare=False)
  with pytest.raises(ValueError, match="variable_axes"):
    pelt.bypass(model.apply)({"params": gated("scan")}, ids, mask, record=("gates",))
  # Without record the same model runs.
  assert pelt.bypass(model.apply)({"params": gated("scan")}, ids, mask).shape == (4, 5, 3)


# Rows.


def test_rows_are_checked():
  model, x = nn.Dense(3), values((4, 4), 0)
  members = [lora_of(model, x, moved=False)[1] for _ in range(2)]
  banked, apply = pelt.bank(members), pelt.bypass(model.apply)
  with pytest.raises(ValueError, match="pass rows="):
    apply({"params": banked}, x)
  with pytest.raises(ValueError, match=r"rows has shape \(3,\).*\(4,\)"):
    apply({"params": banked}, x, rows=jnp.array([0, 1, 0]))
  for bad in ([0, 1, 2, 0], [0, -1, 1, 0]):
    with pytest.raises(ValueError, match="2 members"):
      apply({"params": banked}, x, rows=jnp.array(bad))
    traced = jax.jit(apply)({"params": banked}, x, rows=jnp.array(bad))
    wrong = [r not in (0, 1) for r in bad]
    np.testing.assert_array_equal(jnp.isnan(traced).all(-1), wrong)
    np.testing.assert_array_equal(jnp.isnan(traced).any(-1), wrong)


def test_unequal_members_are_named():
  model, x = Named(), values((2, 4), 0)
  one = lora_of(model, x, targets="first")[1]
  two = lora_of(model, x, targets="second")[1]
  with pytest.raises(ValueError, match="first.*second|second.*first"):
    pelt.bank([one, two])


def test_update_at_does_not_touch_the_original():
  params = {"a": {"b": 1}}
  assert update_at(params, {"a/c": 2}) == {"a": {"b": 1, "c": 2}} and params == {"a": {"b": 1}}
