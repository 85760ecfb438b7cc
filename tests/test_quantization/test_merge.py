"""Merging into 4 bits: what is lost, training that loses nothing, saving, generating."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax._walk import every_node, get_at
from pelt_jax.quantization import MergeAware, NF4Weight, quantize, requantize
from tests.test_models.helpers import close
from tests.test_quantization.test_checkpoints import CONFIG, IDS
from tests.test_quantization.test_weight import codes_of, drawn

LONG = pytest.mark.parity
GATE = "model/layers/0/mlp/gate_proj/kernel"


def over(kernel, aware=True, seed=1, size=1.0, axes="io:ir,ro", stacked=0, **options):
  """A LoRA of rank 3 over a quantized kernel."""
  below = quantize(kernel, stacked=stacked, **options)
  a, b = drawn(*kernel.shape[:-1], 3, seed=seed), drawn(*kernel.shape[:-2], 3, kernel.shape[-1])
  scaling = jnp.full(kernel.shape[:stacked], 0.5)
  node = pelt.nodes.LoraWeight(below, a * size, b, scaling, axes=axes, stacked=stacked)
  return MergeAware(node, stacked=stacked) if aware else node


def llama(scan=False, *, aware, **options):
  model = models.from_config(CONFIG, scan=scan)
  base = model.init(jax.random.key(0), IDS)["params"]
  sites = pelt.sites(model, IDS)
  method = pelt.qlora(rank=4, alpha=4, merge_aware=aware, **options)
  return model, base, method.init(jax.random.key(1), base, sites)


def nudged(params, by=0.05):
  trainable, frozen = pelt.partition(params)
  leaves, tree = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  moved = [x + by * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return pelt.combine(jax.tree.unflatten(tree, moved), frozen)


def test_it_multiplies_by_the_quantized_sum():
  kernel, x = drawn(128, 6), jnp.asarray(drawn(5, 128, seed=3))
  node = over(kernel)
  lora = node.base
  whole = np.asarray(lora.base.materialize()) + 0.5 * np.asarray(lora.a) @ np.asarray(lora.b)
  want = quantize(whole)
  close(node.materialize(), want.materialize(), 1e-6)
  close(node.einsum("...i,io->...o", x), x @ np.asarray(want.materialize()), 1e-6)
  assert (codes_of(want) != codes_of(lora.base)).mean() > 0.2  # the change is seen


@pytest.mark.parametrize("read", ["einsum", "lookup", "materialize"])
def test_gradients_pass_straight_through(read):
  """dx = g Q(W + s a b)^T; da = s dW b^T, db = s a^T dW with dW = x^T g, as if Q were not there."""
  node = over(drawn(128, 6))
  x, ids = jnp.asarray(drawn(5, 128, seed=3)), jnp.array([3, 9, 3])
  run = {
    "einsum": lambda node, x: node.einsum("...i,io->...o", x),
    "lookup": lambda node, x: node.lookup(ids),
    "materialize": lambda node, x: x @ node.materialize(),
  }[read]
  out, back = jax.vjp(run, node, x)
  g = jnp.asarray(drawn(*out.shape, seed=4))
  of_node, dx = back(g)
  dw = jnp.zeros(node.shape).at[ids].add(g) if read == "lookup" else x.T @ g
  close(of_node.base.a, 0.5 * dw @ node.base.b.T, 1e-5)
  close(of_node.base.b, 0.5 * node.base.a.T @ dw, 1e-5)
  if read != "lookup":
    close(dx, g @ node.materialize().T, 1e-6)


def test_no_product_of_the_kernels_size_is_made_for_the_change():
  """Beside the products of a quantized layer there are those of the change, and a @ b twice."""
  kernel, tokens = drawn(256, 256), 512
  x = jnp.asarray(drawn(tokens, 256, seed=3))

  def flops(aware):
    node = over(kernel, aware)
    loss = lambda a, x: node_with(node, a).einsum("...i,io->...o", x).sum()
    cost = jax.jit(jax.grad(loss, (0, 1))).lower(drawn(256, 3), x).compile().cost_analysis()
    return cost["flops"]

  whole = 2 * tokens * 256 * 256  # one product with a gradient of the kernel's size
  assert flops(True) - flops(False) < 0.7 * whole  # two quantizations, at this few tokens


def node_with(node, a):
  if isinstance(node, MergeAware):
    return node.replace(base=node_with(node.base, a))
  return node.replace(a=a)


def test_the_backward_pass_keeps_codes_alone():
  node, x = over(drawn(128, 64), double_quant=True), jnp.asarray(drawn(4, 128))
  _, back = jax.vjp(lambda x, n: n.einsum("...i,io->...o", x), x, node)
  kept = [r for r in jax.tree.leaves(back) if hasattr(r, "shape")]
  assert max(r.size * r.dtype.itemsize for r in kept) == 128 * 64 // 2


@pytest.mark.parametrize(
  ("scan", "options"),
  [
    (True, {"layout": "words"}),
    pytest.param(False, {}, marks=LONG),
    pytest.param(True, {"double_quant": False, "layout": "flat", "book": "fp4"}, marks=LONG),
  ],
)
def test_the_merged_model_is_what_was_trained(tmp_path, scan, options):
  """Trained, merged into codes, saved, loaded, generated from: the same weights throughout."""
  model, base, params = llama(scan, aware=True, **options)
  apply = pelt.bypass(model.apply)
  tx = optax.adam(3e-2)
  trainable, frozen = pelt.partition(params)

  def loss(params):
    logits = apply({"params": params}, IDS)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean()

  grad = jax.jit(pelt.value_and_grad(loss))
  state, losses = tx.init(trainable), []
  for _ in range(6):
    value, grads = grad(trainable, frozen)
    with jax.numpy_dtype_promotion("standard"):  # Adam powers a float by a counter
      updates, state = tx.update(grads, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    losses.append(float(value))
  assert losses[-1] < losses[0] - 0.5
  params = pelt.combine(trainable, frozen)
  merged, lost = requantize(params)
  assert all(isinstance(n, NF4Weight) for n in every_node(merged))
  assert all(v.error < 1e-6 and v.kept > 1 - 1e-5 and v.update > 0 for v in lost.values())
  seen = jax.jit(pelt.merge)(params)
  for path in lost:
    np.testing.assert_array_equal(get_at(merged, path).materialize(), get_at(seen, path))
  run = lambda apply, params: jax.jit(lambda p: apply({"params": p}, IDS))(params)
  np.testing.assert_array_equal(run(apply, merged), run(apply, params))

  models.save_pretrained(tmp_path / "four", model, merged)
  again, found = models.from_pretrained(tmp_path / "four", scan=scan)
  close(run(pelt.bypass(again.apply), found), run(apply, params), 1e-5)
  write = lambda apply, params: training.generate(apply, params, IDS[:, :4], max_new_tokens=5)
  one, other = write(pelt.bypass(again.apply), found), write(apply, params)
  np.testing.assert_array_equal(one.tokens, other.tokens)
  pelt.save(tmp_path / "adapter", params)
  loaded = pelt.load(tmp_path / "adapter", base)
  np.testing.assert_array_equal(run(apply, loaded), run(apply, params))


def test_what_plain_training_loses():
  """By hand: the parts of a change that a merge keeps, and the noise it adds."""
  kernel = drawn(128, 16)
  node = over(kernel, aware=False, size=0.05)
  params, losses = requantize({"layer": {"kernel": node, "bias": np.ones(16, np.float32)}})
  w = np.asarray(node.base.materialize(), np.float64)
  change = 0.5 * np.asarray(node.a, np.float64) @ np.asarray(node.b, np.float64)
  after = np.asarray(quantize(np.float32(w + change)).materialize(), np.float64)
  size = np.linalg.norm(change)
  found = losses["layer/kernel"]
  close(found.update, size / np.linalg.norm(w), 1e-5)
  close(found.error, np.linalg.norm(after - w - change) / size, 1e-5)
  close(found.kept, ((after - w) * change).sum() / size**2, 1e-4)
  assert found.error > 1 and found.kept < 0.9 and 0 < found.codes < 0.1
  np.testing.assert_allclose(params["layer"]["kernel"].materialize(), after, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(params["layer"]["bias"], 1)


def test_the_same_change_is_kept_where_it_was_trained_for():
  """What plain training learned is gone after the merge; a merge-aware node has it still."""
  kernel = drawn(256, 64)
  for layout in ("rows", "words", "flat"):
    plain = over(kernel, aware=False, size=0.03, layout=layout)
    one, lost = requantize({"kernel": plain})
    other, kept = requantize({"kernel": MergeAware(plain)})
    np.testing.assert_array_equal(one["kernel"].codes, other["kernel"].codes)
    assert lost["kernel"].error > 1 and kept["kernel"].error == 0
    assert (
      lost["kernel"].codes
      == kept["kernel"].codes
      == np.mean(codes_of(one["kernel"]) != codes_of(plain.base)).astype(np.float32)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_changes_of_half_precision_kernels_count(dtype):
  """W + change is coded before it is rounded to the kernel's dtype."""
  kernel = jnp.asarray(drawn(128, 16), dtype)
  node = over(kernel, aware=False, size=1e-4)
  w = np.asarray(quantize(kernel.astype("float32")).materialize(), np.float64)
  change = 0.5 * np.asarray(node.a, np.float64) @ np.asarray(node.b, np.float64)
  _, losses = requantize({"kernel": node})
  close(losses["kernel"].update, np.linalg.norm(change) / np.linalg.norm(w), 1e-2)


def test_it_reports_outside_jit_alone():
  with pytest.raises(TypeError, match="outside jax.jit"):
    jax.jit(lambda p: requantize(p)[0])({"kernel": over(drawn(64, 4))})


def test_odd_sizes_count_no_padding():
  kernel = drawn(37, 5)
  node = over(kernel, aware=False, layout="flat")
  merged, losses = requantize({"kernel": node})
  differ = codes_of(merged["kernel"])[:185] != codes_of(node.base)[:185]
  close(losses["kernel"].codes, differ.mean(), 1e-6)


def test_stacked_layers_are_merged_one_by_one():
  kernels = drawn(3, 64, 5)
  node = over(kernels, stacked=1, double_quant=True)
  merged = requantize({"kernel": node})[0]["kernel"]
  assert merged.stacked == 1 and merged.offset.shape == (3,)
  for i in range(3):
    one = jax.tree.map(lambda x, i=i: x[i], node)
    one = one.replace(
      stacked=0, base=one.base.replace(stacked=0, base=one.base.base.replace(stacked=0))
    )
    alone = requantize({"kernel": one})[0]["kernel"]
    np.testing.assert_array_equal(merged.codes[i], alone.codes)
    np.testing.assert_array_equal(merged.materialize()[i], alone.materialize())


def test_two_changes_and_one_of_fused_parts():
  model, _, params = llama(aware=False, targets=("gate_proj",))
  sites = pelt.sites(model, IDS)
  twice = pelt.chain(pelt.lora(2, targets=("gate_proj",)), pelt.merge_aware())
  params = nudged(twice.init(jax.random.key(3), params, sites))
  node = get_at(params, GATE)
  assert isinstance(node, MergeAware) and isinstance(node.base.base.base, NF4Weight)
  want = quantize(node.base.materialize(), double_quant=True)
  np.testing.assert_array_equal(get_at(requantize(params)[0], GATE).codes, want.codes)
  kernel = drawn(64, 96)
  leaf = pelt.nodes.FusedLora(
    quantize(kernel), drawn(2, 64, 3), drawn(2, 3, 32, seed=2), jnp.float32(0.1)
  )
  merged = requantize({"kernel": MergeAware(leaf)})[0]["kernel"]
  np.testing.assert_array_equal(merged.codes, quantize(leaf.materialize()).codes)


def test_what_cannot_be_merged_says_why():
  model, base, _ = llama(aware=False)
  sites = pelt.sites(model, IDS)
  aware = pelt.merge_aware()
  for tree in (base, pelt.nf4().init(jax.random.key(0), base, sites)):
    with pytest.raises(ValueError, match=r"merge_aware: no weight in 4 bits has a change.*last"):
      aware.init(jax.random.key(0), tree, sites)
    with pytest.raises(ValueError, match=r"no change over 4-bit codes.*pelt.nf4"):
      requantize(tree)
  with pytest.raises(ValueError, match="down_proj/kernel' has dropout.*set dropout=0"):
    pelt.qlora(2, dropout=0.1, merge_aware=True).init(jax.random.key(0), base, sites)
  gated = pelt.chain(pelt.nf4(), pelt.unipelt(2, rank=2, bottleneck=3, gate_pool="token"))
  tree = gated.init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="merge_aware: .* cannot be merged: .*gate"):
    aware.init(jax.random.key(0), tree, sites)
  with pytest.raises(ValueError, match="cannot be merged into plain params"):
    requantize(tree)
