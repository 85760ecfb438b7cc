"""Layers chosen by the norm of their adapters' gradients: norms, choice, the pruned tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes
from pelt_jax._walk import get_at, walk
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

LONG = pytest.mark.parity
SMALL = {"bottleneck": 5}


def grads(*ups, name="up"):
  """Gradients of one adapter per layer, of which `up` alone trains."""
  adapter = lambda up: nodes.After(nodes.Bottleneck(**{name: jnp.array(up)}))
  return {"layers": {str(i): {"bypass": adapter(up)} for i, up in enumerate(ups)}}


def test_norms_are_those_of_the_mean_gradient():
  first = grads([3.0, 0.0], [1.0, 1.0], [0.0, 0.0], [8.0, 0.0])
  second = grads([3.0, 8.0], [-1.0, -1.0], [0.0, 2.0], [0.0, 6.0])
  got = pelt.gradnorm_layers(iter([first, second]), keep=4)
  assert got == {0: 5.0, 1: 0.0, 2: 1.0, 3: 5.0}  # layer 1's gradients cancel
  assert pelt.gradnorm_layers(first, keep=1) == {3: 8.0}  # one tree alone
  # Two adapters of one layer count together, what is no adapter does not.
  more = grads([3.0])
  more["layers"]["0"]["attention"] = grads([4.0])["layers"]["0"]
  more["layers"]["0"]["norm"] = {"scale": nodes.Tuned(jnp.array([100.0]))}
  more["head"] = {"kernel": nodes.Tuned(jnp.array([100.0]))}
  assert pelt.gradnorm_layers(more, keep=1) == {0: 5.0}


def test_ranking_and_threshold():
  tree = grads([1.0], [3.0], [2.0], [2.0])
  assert pelt.gradnorm_layers(tree, keep=1) == {1: 3.0}
  assert pelt.gradnorm_layers(tree, keep=2) == {1: 3.0, 2: 2.0}  # of equals the lower layer
  assert pelt.gradnorm_layers(tree, threshold=2.0) == {1: 3.0, 2: 2.0, 3: 2.0}
  # bfloat16 gradients are averaged in float32: 256 + 1 is no bfloat16.
  one, two = (grads(jnp.array([v], jnp.bfloat16)) for v in (256.0, 1.0))
  assert pelt.gradnorm_layers([one, two], keep=1) == {0: 128.5}


def test_scanned_layers_have_a_norm_each():
  """The first axis is the layers'; a site's number further down the path is none."""
  up = jnp.array([[[3.0], [0.0]], [[0.0], [1.0]], [[0.0], [6.0]]])
  bias = jnp.array([[4.0], [0.0], [8.0]])
  node = nodes.After(nodes.Bottleneck(up=up, up_bias=bias, stacked=1), stacked=1)
  tree = {"block": {"layer": {"1": {"ffn": {"bypass": node}}}}}
  assert pelt.gradnorm_layers(tree, keep=2) == {0: 5.0, 2: 10.0}


def adapted(method, name="bert", scan=False):
  model, base = built(name, "encoder")
  if not scan:
    model, base = model.clone(scan=False), models.to_looped(base, model)
  sites = pelt.sites(model, tokens(2, 6))
  return model, base, sites, moved(method.init(jax.random.key(1), base, sites))


@pytest.mark.parametrize("style", ["pfeiffer", pytest.param("houlsby", marks=LONG)])
def test_pruned_params_are_those_of_adapters_in_these_layers(style):
  """The tree, the numbers, the other layers' bits; `layers=` takes what was chosen."""
  chosen = {0: 3.0, 2: 1.5}
  _, base, sites, params = adapted(pelt.adapter(style, **SMALL))
  pruned = pelt.gradnorm_prune(params, chosen)
  fresh = pelt.adapter(style, layers=chosen, **SMALL).init(jax.random.key(1), base, sites)
  assert jax.tree.structure(pruned) == jax.tree.structure(fresh)
  assert jax.tree.leaves(pelt.labels(pruned)) == jax.tree.leaves(pelt.labels(fresh))
  assert pelt.count(pruned).trainable == pelt.count(fresh).trainable
  for path, value in walk(pruned):
    before = get_at(params, path)
    if hasattr(value, "branch"):
      assert path.split("/")[2] in ("0", "2")
    elif "/1/" in path and isinstance(before, nodes.Guard):
      before = before.base
    jax.tree.map(np.testing.assert_array_equal, value, before)


@LONG
def test_norms_of_a_model_looped_and_scanned():
  """Both trees give the same norms, those of the gradients themselves."""
  ids, norms = tokens(2, 6), []
  model, _, _, scanned = adapted(pelt.adapter("pfeiffer", **SMALL), scan=True)
  for params, apply in (
    (scanned, model.apply),
    (models.to_looped(scanned, model), model.clone(scan=False).apply),
  ):
    loss = lambda p, x, apply=apply: jnp.sum(pelt.bypass(apply)({"params": p}, x) ** 2)
    trainable, frozen = pelt.partition(params)
    _, tree = jax.jit(pelt.value_and_grad(loss))(trainable, frozen, ids)
    norms.append(pelt.gradnorm_layers([tree], keep=3))
  np.testing.assert_allclose([*norms[0].values()], [*norms[1].values()], rtol=1e-5)
  assert [*norms[0]] == [*norms[1]] == [0, 1, 2]
  for layer in range(3):
    of_layer = jax.tree.leaves(tree["encoder"]["layer"][str(layer)])
    want = sum(float(jnp.sum(x**2)) for x in of_layer) ** 0.5
    np.testing.assert_allclose(norms[1][layer], want, rtol=1e-6)


@LONG
def test_what_is_no_adapter_stays():
  """Prefixes and trained norms; the node that may leave a layer out goes with its adapter."""
  ids = tokens(2, 6)
  model, _, _, params = adapted(pelt.mam(length=2, bottleneck=5, hidden=4))
  pruned = pelt.gradnorm_prune(pelt.fold(params), [1])
  kinds = [type(v) for _, v in walk(pruned)]
  assert kinds.count(nodes.Prefix) == 3 and kinds.count(nodes.After) == 1
  assert pelt.bypass(model.apply)({"params": pruned}, ids).shape == (2, 6, 32)
  robust = pelt.adapter_drop(1, robust=True, bottleneck=5)
  model, _, _, params = adapted(robust)
  pruned = pelt.gradnorm_prune(params, [0, 2])
  found = [p for p, v in walk(pruned) if isinstance(v, nodes.DropBelow)]
  assert found == ["encoder/layer/0/bypass", "encoder/layer/2/bypass"]
  apply = pelt.bypass(model.apply)
  alone = apply({"params": pelt.gradnorm_prune(params, [2])}, ids)
  close(apply({"params": pruned}, ids), alone, 2e-6)  # n = 1: layer 0's adapter rests


def test_bad_input_is_named():
  tree = grads([1.0], [3.0])
  choose = lambda **options: pelt.gradnorm_layers(tree, **options)
  for options in ({}, {"keep": 1, "threshold": 0.5}):
    with pytest.raises(ValueError, match="give one of keep and threshold"):
      choose(**options)
  with pytest.raises(ValueError, match="keep must be a whole number of at least 1"):
    choose(keep=0)
  with pytest.raises(ValueError, match=r"keep=3, but adapters are in 2 layers, \[0, 1\]"):
    choose(keep=3)
  with pytest.raises(ValueError, match=r"threshold=4.0 is above .* \{0: 1.0, 1: 3.0\}"):
    choose(threshold=4.0)
  with pytest.raises(ValueError, match="grads is empty"):
    pelt.gradnorm_layers([], keep=1)
  with pytest.raises(TypeError, match=r"got ArrayImpl; pelt.value_and_grad gives \(loss, grads\)"):
    pelt.gradnorm_layers((jnp.ones(()), tree), keep=1)
  with pytest.raises(ValueError, match="grads hold no adapters"):
    pelt.gradnorm_layers({"head": nodes.Tuned(jnp.ones(2))}, keep=1)
  with pytest.raises(ValueError, match=r"layers \[1\] are not finite"):
    pelt.gradnorm_layers(grads([1.0], [np.nan]), keep=1)
  both = {"encoder": grads([1.0]), "decoder": grads([1.0])}
  with pytest.raises(ValueError, match=r"\['decoder/layers', 'encoder/layers'\]"):
    pelt.gradnorm_layers(both, keep=1)
  with pytest.raises(ValueError, match="layers is empty"):
    pelt.gradnorm_prune(tree, [])
  with pytest.raises(ValueError, match=r"layers \[7\] have no adapters; layers \[0, 1\] do"):
    pelt.gradnorm_prune(tree, [1, 7])
  scanned = adapted(pelt.adapter("pfeiffer", **SMALL), scan=True)[3]
  with pytest.raises(ValueError, match="a scan stacks the layers .* unstack first"):
    pelt.gradnorm_prune(scanned, [1])
