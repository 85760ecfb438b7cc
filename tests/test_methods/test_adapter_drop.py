"""AdapterDrop: fixed and drawn n, what is saved, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pelt_jax as pelt
from pelt_jax import models, nodes
from pelt_jax._walk import update_at, walk
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

LONG = pytest.mark.parity
LAYERS = 3
IDS = tokens(2, 6)


def adapted(method, name="bert", scan=False, task="encoder"):
  model, base = built(name, task)
  if not scan:
    looped = model.clone(scan=False)
    model, base = looped, models.to_looped(base, model)
  params = method.init(jax.random.key(1), base, pelt.sites(model, IDS))
  trains = any(label != "frozen" for label in jax.tree.leaves(pelt.labels(params)))
  return model, base, moved(params) if trains else params, pelt.bypass(model.apply)


def without(params, n):
  """The same tree whose lowest n layers lost their adapters."""
  stack = dict(params["encoder"]["layer"])
  for i in range(n):
    layer = dict(stack[str(i)])
    layer["output"] = dict(layer["output"])
    layer["output"]["LayerNorm"] = {
      k: v.base if isinstance(v, nodes.Guard) else v
      for k, v in layer["output"]["LayerNorm"].items()
      if k != "bypass"
    }
    stack[str(i)] = layer
  return params | {"encoder": {"layer": stack}}


@pytest.mark.parametrize("n", range(LAYERS + 1))
def test_fixed_n_leaves_the_lowest_layers_as_they_were(n):
  """n = 0: all adapters; n = L: the base, bit for bit."""
  model, base, params, apply = adapted(pelt.adapter_drop(n, bottleneck=5))
  at = sorted(p for p, v in walk(params) if isinstance(v, nodes.AroundNorm))
  assert at == [f"encoder/layer/{i}/output/LayerNorm/bypass" for i in range(n, LAYERS)]
  assert pelt.count(params).trainable == (LAYERS - n) * (2 * 5 * 32 + 5 + 32)
  if n == LAYERS:
    np.testing.assert_array_equal(
      apply({"params": params}, IDS), model.apply({"params": base}, IDS)
    )
  if n == 0:
    same = adapted(pelt.adapter("pfeiffer", bottleneck=5))[2]
    assert jax.tree.structure(same) == jax.tree.structure(params)


class Layers(nn.Module):
  """Eleven small layers."""

  @nn.compact
  def __call__(self, x):
    for i in range(11):
      x = nn.Dense(2, name=f"layer_{i}")(x)
    return x


def test_layers_are_counted_and_not_spelt():
  """Layer 10 is the last, though its name comes before that of layer 2."""
  model, x = Layers(), jnp.ones((1, 2))
  roles = {"layer": (pelt.Role("layer_*"),), "ffn": (pelt.Role("layer_*", "after", "in"),)}
  sites = pelt.sites(model, x, roles=roles)
  base = model.init(jax.random.key(0), x)["params"]
  method = pelt.adapter_drop(10, robust=True, style="parallel", bottleneck=1)
  params = method.init(jax.random.key(1), base, sites)
  assert [int(params[f"layer_{i}"]["bypass"].nodes[1].layer) for i in range(11)] == [*range(11)]


def products(n):
  """How many products the gradient's program has."""
  _, _, params, apply = adapted(pelt.adapter_drop(n, bottleneck=5))
  trainable, frozen = pelt.partition(params)
  loss = lambda p: jnp.sum(apply({"params": p}, IDS) ** 2)
  gradient = lambda t: pelt.value_and_grad(loss)(t, frozen)[1]
  return str(jax.make_jaxpr(gradient)(trainable)).count("dot_general")


def test_the_backward_pass_ends_above_the_dropped_layers():
  counts = [products(n) for n in range(LAYERS)]
  # A dropped layer loses its adapter's products, and its own backward ones.
  assert counts[0] - counts[1] > 10 and counts[1] - counts[2] > 10


def test_a_layer_that_may_be_dropped_has_an_arm_without_a_backward_pass():
  """Of each layer's two arms, the gradient's program has products in one alone."""
  _, _, params, apply = adapted(pelt.adapter_drop(0, robust=True, bottleneck=5))
  trainable, frozen = pelt.partition(params)
  loss = lambda p: jnp.sum(apply({"params": p}, IDS) ** 2)
  program = jax.make_jaxpr(lambda t: pelt.value_and_grad(loss)(t, frozen)[1])(trainable)
  arms = [
    tuple(sorted(str(arm).count("dot_general") for arm in equation.params["branches"]))
    for equation in program.eqns
    if equation.primitive.name == "cond"
  ]
  assert len(arms) == 2 * LAYERS
  forward, backward = arms[:LAYERS], arms[LAYERS:]
  assert all(fewer > 0 for fewer, _ in forward)
  assert all(none == 0 and products > 0 for none, products in backward), backward


@pytest.mark.parametrize("scan", [pytest.param(False, marks=LONG), True])
def test_one_program_serves_every_n(scan):
  method = pelt.adapter_drop(0, robust=True, bottleneck=5)
  model, base, params, apply = adapted(method, scan=scan)
  compiled = []

  @jax.jit
  def run(params, n):
    compiled.append(n)
    return apply({"params": pelt.drop_to(params, n)}, IDS)

  looped = models.to_looped(params, model) if scan else params
  plain = pelt.bypass(model.clone(scan=False).apply)
  for n in range(LAYERS + 1):
    tree = without(pelt.drop_to(looped, 0), n)
    close(run(params, n), plain({"params": tree}, IDS), 5e-6)
  assert len(compiled) == 1
  close(run(params, LAYERS), model.apply({"params": base}, IDS), 2e-6)


@LONG
@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=LONG)])
def test_gradients_of_dropped_layers_are_zero(scan):
  _, _, params, apply = adapted(pelt.adapter_drop(2, robust=True, bottleneck=5), scan=scan)
  trainable, frozen = pelt.partition(params)
  loss = lambda p: jnp.sum(apply({"params": p}, IDS) ** 2)
  _, grads = jax.jit(pelt.value_and_grad(loss))(trainable, frozen)
  if scan:
    (node,) = (v for _, v in walk(grads) if isinstance(v, nodes.AroundNorm))
    sizes = [float(jnp.abs(node.branch.up[i]).max()) for i in range(LAYERS)]
  else:
    found = {p: v for p, v in walk(grads) if isinstance(v, nodes.AroundNorm)}
    sizes = [
      float(jnp.abs(found[f"encoder/layer/{i}/output/LayerNorm/bypass"].branch.up).max())
      for i in range(LAYERS)
    ]
  assert sizes[:2] == [0.0, 0.0] and sizes[2] > 0


@LONG
def test_n_is_drawn_once_per_batch_and_evenly():
  """The same n in all layers of a call; 0, ..., L - 1 alike; the top adapter always acts."""
  _, _, params, apply = adapted(pelt.adapter_drop(0, robust=True, bottleneck=5))
  run = jax.jit(lambda key: apply({"params": params}, IDS, train_nodes=True, rngs={"dropout": key}))
  outputs = [run(jax.random.key(i)) for i in range(60)]
  fixed = jax.jit(lambda n: apply({"params": pelt.drop_to(params, n)}, IDS))
  fixed = [fixed(n) for n in range(LAYERS + 1)]
  drawn = []
  for out in outputs:
    apart = [float(jnp.abs(out - f).max()) for f in fixed]
    assert min(apart) < 5e-6  # the output is that of some n, not of a mixture of layers
    drawn.append(int(np.argmin(apart)))
  counts = np.bincount(drawn, minlength=LAYERS + 1)
  assert counts[LAYERS] == 0 and (counts[:LAYERS] > 8).all(), counts
  with pytest.raises(ValueError, match="needs random numbers: pass rngs="):
    apply({"params": params}, IDS, train_nodes=True)


@LONG
@pytest.mark.parametrize("style", ["houlsby", pytest.param("parallel", marks=LONG)])
def test_taps_stay_inside_their_arm(style):
  method = pelt.adapter_drop(1, robust=True, style=style, bottleneck=5)
  _, _, params, apply = adapted(method, "llama", scan=True)
  out = jax.jit(apply)({"params": params}, IDS)
  fixed = pelt.adapter_drop(1, style=style, bottleneck=5)
  model, base, _, plain = adapted(fixed, "llama")
  looped = models.to_looped(params, model.clone(scan=True))
  want = fixed.init(jax.random.key(0), base, pelt.sites(model, IDS))
  mine = {p: v for p, v in walk(looped) if isinstance(v, nodes.After)}
  places = [p for p, v in walk(want) if isinstance(v, nodes.After)]
  assert len(places) == (2 if style == "houlsby" else 1) * (LAYERS - 1)
  merged = update_at(want, {path: mine[path] for path in places})
  close(out, plain({"params": merged}, IDS), 5e-6)


@pytest.mark.parametrize(("options", "match"), [
  ({"drop": -1}, "drop must be a whole number"),
  ({"drop": True}, "drop must be a whole number"),
  ({"style": "none"}, "style must be one of"),
])  # fmt: skip
def test_bad_options(options, match):
  with pytest.raises(ValueError, match=match):
    pelt.adapter_drop(**options)


def test_what_does_not_fit_the_model_is_named():
  with pytest.raises(ValueError, match="drop=4, but the model has 3 layers"):
    adapted(pelt.adapter_drop(4))
  with pytest.raises(ValueError, match="a scan stacks them .* unstack first: models.to_looped"):
    adapted(pelt.adapter_drop(1), scan=True)
  _, base, params, _ = adapted(pelt.adapter_drop(1, robust=True, bottleneck=5))
  for drop in (4, -1, 1.5, "1"):
    with pytest.raises(ValueError, match=f"drop={drop!r}: expected 0 to 3"):
      pelt.drop_to(params, drop)
  with pytest.raises(ValueError, match="hold no adapters of adapter_drop"):
    pelt.drop_to(base, 1)
  model, base = built("t5", "seq2seq")
  sites = pelt.sites(model, IDS, decoder_input_ids=IDS)
  with pytest.raises(ValueError, match="needs one stack of layers"):
    pelt.adapter_drop(1).init(jax.random.key(0), base, sites)
