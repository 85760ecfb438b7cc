import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax.models._layers import constrain
from tests import support
from tests.test_models.helpers import build, built, close, padded, tokens, trees_close


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "bert"])
def test_scanned_equals_looped(name):
  model, params = built(name, "tagging")
  ids, mask = padded(tokens(2, 9), [9, 6], "right")
  looped = models.to_looped(params, model)
  got = jax.jit(model.apply)({"params": params}, ids, mask)
  want = jax.jit(model.clone(scan=False).apply)({"params": looped}, ids, mask)
  # The same operations; only their fusion differs.
  close(got, want, 2e-6)


@pytest.mark.parametrize(
  "options",
  [
    pytest.param(dict(scan=True), marks=pytest.mark.parity),
    pytest.param(dict(remat=True), marks=pytest.mark.parity),
    dict(scan=True, remat=True),
    pytest.param(dict(remat="offload"), marks=pytest.mark.parity),
    dict(scan=True, remat="offload"),
  ],
)
def test_gradients_agree_under_scan_and_remat(options):
  name = "qwen2-mixed"
  model, params = built(name, "tagging", scan=False)
  ids = tokens(2, 9)
  rng = np.random.default_rng(1).normal(size=(2, 9, 5)).astype(np.float32)

  def gradient(model, params):
    return jax.jit(jax.grad(lambda p: (model.apply({"params": p}, ids) * rng).sum()))(params)

  other = build(name, "tagging", **options)
  scan = options.get("scan", False)
  got = gradient(other, models.to_scanned(params) if scan else params)
  trees_close(models.to_looped(got, other) if scan else got, gradient(model, params), 1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_the_host_keeps_the_layers_inputs_and_nothing_else_is_kept(scan):
  model, params = built("qwen2-mixed", "tagging", scan=scan)
  layers, ids = model.config.num_hidden_layers, tokens(2, 9)

  def kept(remat):
    loss = lambda p: jnp.sum(model.clone(remat=remat).apply({"params": p}, ids) ** 2)
    _, back = jax.vjp(loss, params)
    moved = [x for x in jax.tree.leaves(back) if x.sharding.memory_kind == "pinned_host"]
    stays = [x for x in jax.tree.leaves(back) if x.sharding.memory_kind != "pinned_host"]
    return moved, sum(x.nbytes for x in stays)

  size = 4 * 2 * 9 * model.config.hidden_size
  (none, device), (moved, less) = kept(True), kept("offload")
  assert not none and sum(x.nbytes for x in moved) == layers * size
  assert device - less == layers * size


@pytest.mark.parametrize(("name", "task"), [("llama", "lm"), ("bert", "classification")])
def test_conversion_and_back_is_exact_and_has_the_scanned_models_structure(name, task):
  model, params = built(name, task, scan=False)
  scanned = models.to_scanned(params)
  shapes = jax.eval_shape(build(name, task, scan=True).init, jax.random.key(0), tokens(1, 2))
  assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, shapes["params"])
  back = models.to_looped(scanned, model)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_nodes_are_converted_with_their_layers():
  model, params = built("llama", "lm", scan=False)
  ids = tokens(2, 7)
  method = pelt.lora(rank=2, targets=("query", "value"))
  params = method.init(jax.random.key(1), params, pelt.sites(model, ids))
  # Give every layer another B, so that a swap of layers shows.
  b = lambda x: x + jnp.arange(1.0, x.size + 1).reshape(x.shape) / x.size
  params = jax.tree.map(b, params)
  want = jax.jit(pelt.bypass(model.apply))({"params": params}, ids)
  scanned_model = build("llama", "lm", scan=True)
  scanned = models.to_scanned(params)
  node = scanned["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
  assert (node.stacked, node.a.shape) == (1, (3, 32, 2))
  close(jax.jit(pelt.bypass(scanned_model.apply))({"params": scanned}, ids), want, 2e-6)
  back = models.to_looped(scanned, scanned_model)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_layers_that_differ_cannot_be_stacked():
  _, params = built("llama", "lm", scan=False)
  layers = dict(params["model"]["layers"])
  layers["1"] = layers["1"] | {"extra": jnp.zeros(2)}
  with pytest.raises(ValueError, match=r"layers 0 and 1 of 'model/layers' differ .*extra"):
    models.to_scanned({"model": {"layers": layers}})
  layers["1"] = params["model"]["layers"]["1"] | {"input_layernorm": {"scale": jnp.zeros(2)}}
  with pytest.raises(ValueError, match=r"model/layers.*input_layernorm.*other shapes"):
    models.to_scanned({"model": {"layers": layers}})


def test_dropout_differs_from_layer_to_layer_under_scan():
  # With one mask for all layers, two layers with equal weights would drop equally.
  model, params = built("bert", "encoder")
  ids = tokens(1, 6)
  _, state = model.apply(
    {"params": params},
    ids,
    deterministic=False,
    rngs={"dropout": jax.random.key(1)},
    capture_intermediates=lambda m, _: m.name == "dropout",
    mutable=["intermediates"],
  )
  (out,) = state["intermediates"]["encoder"]["layer"]["output"]["dropout"]["__call__"]
  zeros = np.asarray(out) == 0
  assert zeros.shape == (3, 1, 6, 32) and 0.02 < zeros.mean() < 0.25
  assert (zeros[0] != zeros[1]).any() and (zeros[1] != zeros[2]).any()


def test_constrain_is_the_identity_without_a_mesh():
  x = jnp.ones((3, 2, 4))
  assert constrain(x) is x


def test_the_residual_stream_is_split_over_the_batch_axes():
  out = support.on_devices("""
    import jax, jax.numpy as jnp
    from jax.sharding import AxisType
    from pelt_jax.models._layers import constrain
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
      for batch in (8, 6, 3):
        print(jax.jit(constrain)(jnp.ones((batch, 2, 4))).sharding.spec)
  """)
  lines = out.split("\n")
  assert "'data', 'fsdp'" in lines[0], out  # 4 ways
  assert "'data'" in lines[1] and "fsdp" not in lines[1], out  # 6 rows divide by 2 only
  assert "data" not in lines[2], out
