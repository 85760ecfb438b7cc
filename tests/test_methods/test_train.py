"""Full fine-tuning, parts of it and BitFit, on reference models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
import pelt_jax.models
from pelt_jax._walk import walk
from tests.test_core import tiny
from tests.test_core.tiny import values

BERT = {
  "model_type": "bert",
  "vocab_size": 13,
  "hidden_size": 8,
  "intermediate_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "max_position_embeddings": 6,
}
LLAMA = {
  "model_type": "llama",
  "vocab_size": 13,
  "hidden_size": 8,
  "intermediate_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "max_position_embeddings": 6,
}
IDS = jnp.array([[1, 5, 2, 9], [3, 3, 12, 0]])


def abstract(config, method, **options):
  """Counts of a method on a model that is never built."""
  model = pelt.models.from_config(config, task="classification", num_labels=2, **options)
  sites = pelt.sites(model, IDS)

  def init(key):
    return method.init(key, model.init(key, IDS)["params"], sites)

  return pelt.count(jax.eval_shape(init, jax.random.key(0)), sites)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  ("config", "width", "depth"),
  [
    ({"model_type": "bert"}, 768, 12),
    pytest.param(
      {
        "model_type": "bert",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
      },
      1024,
      24,
      marks=pytest.mark.parity,
    ),
  ],
)
def test_bitfit_counts(config, width, depth, scan):
  whole = abstract(config, pelt.bitfit(), scan=scan)
  assert whole.trainable == 11 * width * depth + 2 * width == {768: 102_912, 1024: 272_384}[width]
  assert whole.head == 2  # the classifier's bias
  half = abstract(config, pelt.bitfit(("query", "ffn_in")), scan=scan)
  assert half.trainable == 5 * width * depth == {768: 46_080, 1024: 122_880}[width]


def test_head_trains_whole_beside_bitfit():
  method = pelt.chain(pelt.train("head"), pelt.bitfit())
  counts = abstract({"model_type": "bert"}, method)
  assert counts.trainable == 102_912 and counts.head == 2 * 768 + 2
  turned = abstract({"model_type": "bert"}, pelt.chain(pelt.bitfit(), pelt.train("head")))
  assert turned == counts


@pytest.mark.parametrize("scan", [False, True])
def test_lora_count_on_roberta_base(scan):
  counts = abstract({"model_type": "roberta"}, pelt.lora(rank=8), scan=scan)
  assert counts.trainable == counts.stored == 294_912 and counts.rank == 8
  assert counts.changed == 24 * 768 * 768


def test_bias_free_model_is_refused():
  with pytest.raises(ValueError, match="no biases"):
    abstract(LLAMA, pelt.bitfit())
  with pytest.raises(ValueError, match="no biases|none that is free|matches"):
    abstract(LLAMA, pelt.bitfit("query"))


def test_a_head_with_the_only_biases_is_not_trained_in_silence():
  config = LLAMA | {"attention_bias": False}
  for task in ("tagging", "classification"):
    model = pelt.models.from_config(config, task=task, num_labels=2)
    shapes = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), IDS))["params"]
    sites = pelt.sites(model, IDS)
    init = lambda m, p=shapes, s=sites: jax.eval_shape(lambda k: m.init(k, p, s), jax.random.key(0))
    for method in (
      pelt.bitfit(),
      pelt.chain(pelt.bitfit(), pelt.train("head")),
      pelt.chain(pelt.train("head"), pelt.bitfit()),
    ):
      with pytest.raises(ValueError, match="none that is free outside its head"):
        init(method)


def test_bert_base_counts():
  whole = abstract({"model_type": "bert"}, pelt.bitfit())
  # Without the classifier's 2 * 768 + 2: 0.094 %.
  assert whole.total - 1538 == 109_482_240
  assert round(100 * whole.trainable / 109_482_240, 3) == 0.094


def test_leaves_of_a_module_itself_and_below_it():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, name="d")(x + self.param("cls", nn.initializers.ones, (4,))[None])

  x = jnp.ones((2, 4))
  params = Model().init(jax.random.key(0), x)["params"]
  sites = pelt.sites(Model(), x)
  assert pelt.count(pelt.train("*").init(jax.random.key(0), params, sites)).trainable == 19
  assert pelt.count(pelt.full().init(jax.random.key(0), params, sites)).trainable == 19

  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Model(name="enc")(x)

  params = Outer().init(jax.random.key(0), x)["params"]
  sites = pelt.sites(Outer(), x)
  assert pelt.count(pelt.train("enc/*").init(jax.random.key(0), params, sites)).trainable == 19


def test_the_rank_of_a_trained_matrix_is_bounded_by_its_sides():
  model, x = nn.DenseGeneral((2, 64)), jnp.ones((2, 64))
  params = model.init(jax.random.key(0), x)["params"]
  trained = pelt.train("kernel").init(jax.random.key(0), params, pelt.sites(model, x))
  assert pelt.count(trained).rank == 64  # not 2, the number of heads


def test_half_precision_leaves_compute_and_merge_in_their_dtype():
  """A float32 master trains; the model around it sees the leaf's own dtype."""
  model = nn.Dense(3, param_dtype=jnp.bfloat16)
  x = jnp.ones((2, 4), jnp.bfloat16)
  params = model.init(jax.random.key(0), x)["params"]
  trained = pelt.full().init(jax.random.key(0), params, pelt.sites(model, x))
  master = jax.tree.map(lambda v: v.astype(jnp.float32) + 1e-4, trained)
  assert master["kernel"].value.dtype == jnp.float32
  assert pelt.bypass(model.apply)({"params": master}, x).dtype == jnp.bfloat16
  merged = pelt.merge(master)
  assert merged["kernel"].dtype == merged["bias"].dtype == jnp.bfloat16


def key_bias_gradient(config, ids=IDS):
  """The largest gradient of a key's bias, and of a value's, in float64."""
  # Flax's LayerNorm promotes float64 with float32.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    model = pelt.models.from_config(config, task="classification", num_labels=2, dtype=jnp.float64)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids))["params"]
    flat, tree = jax.tree.flatten(shapes)
    base = jax.tree.unflatten(tree, [values(x.shape, i, x.dtype) for i, x in enumerate(flat)])
    sites = pelt.sites(model, ids)
    params = pelt.bitfit(("key", "value")).init(jax.random.key(0), base, sites)
    trainable, frozen = pelt.partition(params)
    apply = pelt.bypass(model.apply)
    objective = lambda p: jnp.sum(jnp.sin(apply({"params": p}, ids)))
    grads = jax.jit(pelt.value_and_grad(objective))(trainable, frozen)[1]
    sizes = {jax.tree_util.keystr(p): float(jnp.abs(g).max())
             for p, g in jax.tree_util.tree_leaves_with_path(grads)}  # fmt: skip
    worst = lambda name: max(v for k, v in sizes.items() if name in k)
    key, value = ("key", "value") if config["model_type"] == "bert" else ("k_proj", "v_proj")
    return worst(key), worst(value)


def test_key_bias_has_no_gradient_unless_keys_are_rotated():
  key, value = key_bias_gradient(BERT)
  assert key < 1e-14 and value > 1e-4
  key, value = key_bias_gradient(LLAMA | {"attention_bias": True})
  assert key > 1e-6 and value > 1e-4


@pytest.mark.parity
def test_a_rotated_keys_bias_has_no_gradient_where_there_is_one_key():
  key, value = key_bias_gradient(LLAMA | {"attention_bias": True}, IDS[:, :1])
  assert key < 1e-14 and value > 1e-4


def test_bias_gradient_is_the_sum_over_rows_and_tokens():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  base, sites = tiny.looped_params(), pelt.sites(model, ids, mask)
  params = pelt.bitfit("head").init(jax.random.key(0), base, sites)
  trainable, frozen = pelt.partition(params)
  weights = values((tiny.BATCH, tiny.TIME, 3), 1)
  apply = pelt.bypass(model.apply)
  objective = lambda p: jnp.sum(apply({"params": p}, ids, mask) * weights)
  grads = pelt.value_and_grad(objective)(trainable, frozen)[1]
  np.testing.assert_allclose(grads["head"]["bias"].value, weights.sum((0, 1)), rtol=1e-6)


def test_bitfit_leaves_scales_alone():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  params = pelt.bitfit().init(jax.random.key(0), tiny.looped_params(), pelt.sites(model, ids, mask))
  moved = [p for p, v in walk(params) if isinstance(v, pelt.nodes.Tuned)]
  assert moved and all(p.endswith("/bias") for p in moved)
  assert len(moved) == 3 * 8 + 1  # four projections, two norms, two matrices; the head


def test_layers_are_chosen_by_number():
  model, (ids, mask) = tiny.Model(), tiny.inputs()
  sites = pelt.sites(model, ids, mask)
  init = lambda method: method.init(jax.random.key(0), tiny.looped_params(), sites)
  params = init(pelt.bitfit("mlp/up", layers=(0, 2)))
  moved = [p for p, v in walk(params) if isinstance(v, pelt.nodes.Tuned)]
  assert moved == ["h_0/mlp/up/bias", "h_2/mlp/up/bias"]
  with pytest.raises(ValueError, match="no layer"):
    init(pelt.bitfit("mlp/up", layers=(5,)))
  scanned = tiny.Model(mode="scan")
  with pytest.raises(ValueError, match="stacked by a scan"):
    pelt.lora(2, targets="mlp/up", layers=(0,)).init(
      jax.random.key(0), tiny.in_mode(tiny.looped_params(), "scan"), pelt.sites(scanned, ids)
    )
