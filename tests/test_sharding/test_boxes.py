"""Models whose params come in Flax's partitioning boxes: the boxes live inside nodes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec as P

import pelt_jax as pelt

LAYERS, WIDTH, HIDDEN = 3, 4, 6
RULES = (("embed", None), ("mlp", "model"), ("layers", None))
BOXES = {"logical": nn.with_logical_partitioning, "mesh": nn.with_partitioning}


class Block(nn.Module):
  """x + down(relu(up(norm(x)))), every leaf boxed."""

  boxed: str

  @nn.compact
  def __call__(self, x, _=None):
    box = BOXES[self.boxed]
    kernel, bias = nn.initializers.lecun_normal(), nn.initializers.normal(0.1)
    h = nn.LayerNorm(
      scale_init=box(nn.initializers.ones, ("embed",)),
      bias_init=box(bias, ("embed",)),
      name="norm",
    )(x)
    up = nn.Dense(
      HIDDEN, kernel_init=box(kernel, ("embed", "mlp")), bias_init=box(bias, ("mlp",)), name="up"
    )
    down = nn.Dense(WIDTH, use_bias=False, kernel_init=box(kernel, ("mlp", "embed")), name="down")
    return x + down(nn.relu(up(h))), None


class Stack(nn.Module):
  """Blocks, looped or scanned."""

  boxed: str
  scan: bool

  @nn.compact
  def __call__(self, x):
    if not self.scan:
      for i in range(LAYERS):
        x, _ = Block(self.boxed, name=f"layer_{i}")(x)
      return x
    scanned = nn.scan(
      nn.remat(Block, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=LAYERS,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(self.boxed, name="layers")(x, None)[0]


class Case(NamedTuple):
  """A model, its params and input, the name of a layer and the names of its leading axes."""

  module: nn.Module
  params: Any
  x: jax.Array
  layer: str
  lead: tuple


METHOD = pelt.chain(pelt.lora(rank=2, alpha=6, targets=("up", "down")), pelt.train("norm"))


@pytest.fixture(scope="module", params=[("logical", False), ("mesh", True)], ids=str)
def case(request) -> Case:
  boxed, scan = request.param
  module, x = Stack(boxed, scan), jax.random.normal(jax.random.key(0), (2, 5, WIDTH))
  params = module.init(jax.random.key(1), x)["params"]
  return Case(module, params, x, "layers" if scan else "layer_1", ("layers",) if scan else ())


@pytest.fixture(scope="module")
def adapted(case):
  """Params with nodes: at their start, and moved from it."""
  sites = pelt.sites(case.module, case.x)
  new = METHOD.init(jax.random.key(2), case.params, sites)
  trainable, frozen = pelt.partition(new)
  return new, pelt.combine(jax.tree.map(lambda t: t + 0.3, trainable), frozen)


def is_box(x):
  return isinstance(x, meta.Partitioned)


def test_every_array_of_a_boxed_leaf_is_boxed_and_the_node_is_not(case, adapted):
  node = adapted[0][case.layer]["up"]["kernel"]
  assert isinstance(node, pelt.nodes.LoraWeight)
  assert type(node.a) is type(node.base) is type(case.params[case.layer]["up"]["kernel"])
  assert node.base.names == (*case.lead, "embed", "mlp")
  assert node.a.names == (*case.lead, "embed", None)
  assert node.b.names == (*case.lead, None, "mlp")


def test_bypassed_merged_and_materialized_agree(case, adapted):
  start, moved = adapted
  wanted = case.module.apply({"params": case.params}, case.x)
  np.testing.assert_allclose(
    pelt.bypass(case.module.apply)({"params": start}, case.x), wanted, atol=1e-6
  )
  out = pelt.bypass(case.module.apply)({"params": moved}, case.x)
  assert jnp.abs(out - wanted).max() > 0.1
  # float32: three layers of sums over 6 terms of order 1 to 10.
  np.testing.assert_allclose(
    case.module.apply({"params": moved}, case.x), out, rtol=1e-5, atol=1e-5
  )
  merged = pelt.merge(moved)
  assert jax.tree.structure(merged) == jax.tree.structure(case.params)  # boxes and names included
  np.testing.assert_allclose(
    case.module.apply({"params": merged}, case.x), out, rtol=1e-5, atol=1e-5
  )
  # Without boxes the same numbers come out.
  plain = pelt.bypass(case.module.apply)({"params": pelt.unbox(moved)}, case.x)
  np.testing.assert_array_equal(plain, out)
  assert not any(is_box(b) for b in jax.tree.leaves(pelt.unbox(moved), is_leaf=is_box))


def test_flax_finds_a_spec_for_every_array(case, adapted):
  start, _ = adapted
  specs = nn.get_partition_spec(start)
  node = specs[case.layer]["up"]["kernel"]
  assert isinstance(node, pelt.nodes.LoraWeight)
  assert node.base == P(*case.lead, "embed", "mlp")
  assert node.a == P(*case.lead, "embed", None) and node.b == P(*case.lead, None, "mlp")
  assert node.scaling == P()
  assert specs[case.layer]["norm"]["scale"].value == P(*case.lead, "embed")
  on_mesh = nn.logical_to_mesh(specs, RULES)
  down = on_mesh[case.layer]["down"]["kernel"]
  none = (None,) * len(case.lead)
  assert down.a == P(*none, "model", None) and down.b == P(*none, None, None)
  # Abstract params give the same.
  abstract = nn.get_partition_spec(jax.eval_shape(lambda: start))
  assert jax.tree.leaves(abstract) == jax.tree.leaves(specs)


def test_device_put_by_flax_shardings(case, adapted):
  mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  _, moved = adapted
  specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(moved), mesh, RULES)
  placed = jax.device_put(pelt.unbox(moved), specs)
  assert placed[case.layer]["down"]["kernel"].a.sharding.spec[-2] == "model"
  wanted = pelt.bypass(case.module.apply)({"params": moved}, case.x)
  np.testing.assert_array_equal(pelt.bypass(case.module.apply)({"params": placed}, case.x), wanted)


@pytest.mark.parametrize("case", [("mesh", True)], ids=str, indirect=True)
def test_get_sharding_names_the_mesh(case, adapted):  # logical names are no axes of a mesh
  mesh = jax.make_mesh(
    (1, 1, 1), ("layers", "embed", "mlp"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  start, _ = adapted
  node = nn.get_sharding(start, mesh)[case.layer]["up"]["kernel"]
  assert node.b == jax.sharding.NamedSharding(mesh, P(*case.lead, None, "mlp"))
  assert node.scaling == jax.sharding.NamedSharding(mesh, P())


def test_shardings_of_a_boxed_tree_follow_the_base_specs(case, adapted):
  mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  base = nn.logical_to_mesh(nn.get_partition_spec(case.params), RULES)
  _, moved = adapted
  found = pelt.shardings(moved, base, mesh)
  none = (None,) * len(case.lead)
  assert found[case.layer]["up"]["kernel"].b.spec == P(*none, None, "model")
  placed = jax.device_put(moved, found)  # boxes stay
  assert is_box(placed[case.layer]["up"]["kernel"].b)


def test_optimizer_states_and_gradients_keep_the_boxes(case, adapted):
  _, moved = adapted
  trainable, frozen = pelt.partition(moved)
  loss = lambda p: (pelt.bypass(case.module.apply)({"params": p}, case.x) ** 2).mean()
  _, grads = pelt.value_and_grad(loss)(trainable, frozen)
  assert jax.tree.structure(grads) == jax.tree.structure(trainable)
  assert grads[case.layer]["up"]["kernel"].a.names == (*case.lead, "embed", None)
  assert jnp.abs(grads[case.layer]["up"]["kernel"].a.value).max() > 0


def test_saved_adapters_keep_their_names(case, adapted, tmp_path):
  _, moved = adapted
  pelt.save(tmp_path / "adapter", moved)
  loaded = pelt.load(tmp_path / "adapter", case.params)
  assert jax.tree.structure(loaded) == jax.tree.structure(moved)
  jax.tree.map(np.testing.assert_array_equal, loaded, moved)
  assert loaded[case.layer]["down"]["kernel"].a.names == (*case.lead, "mlp", None)


def test_a_tree_without_boxes_stays_without(case):
  start = METHOD.init(jax.random.key(2), meta.unbox(case.params), pelt.sites(case.module, case.x))
  assert not any(is_box(b) for b in jax.tree.leaves(start, is_leaf=is_box))


def test_fused_lora_is_boxed_too(case):
  method = pelt.lora(rank=2, targets="up", fused=((0,), 2))
  node = method.init(jax.random.key(2), case.params, pelt.sites(case.module, case.x))[case.layer][
    "up"
  ]["kernel"]
  assert node.a.names == (*case.lead, None, "embed", None)
  assert node.b.names == (*case.lead, None, None, None)
  mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  down = pelt.lora(rank=2, targets="down", fused=((0,), 2))
  nodes = down.init(jax.random.key(2), case.params, pelt.sites(case.module, case.x))
  base = nn.logical_to_mesh(nn.get_partition_spec(case.params), RULES)
  found = pelt.shardings(nodes, base, mesh)[case.layer]["down"]["kernel"]
  none = (None,) * len(case.lead)
  assert found.a.spec == P(*none, None, "model", None) and "model" not in found.b.spec


def test_a_box_may_name_the_first_axes_alone():
  class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
      box = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
      return nn.DenseGeneral((2, 3), kernel_init=box, use_bias=False, name="up")(x)

  module, x = Heads(), jnp.ones((2, WIDTH))
  params = module.init(jax.random.key(0), x)["params"]
  assert params["up"]["kernel"].value.ndim == 3
  node = pelt.lora(rank=2, targets="up").init(jax.random.key(1), params, pelt.sites(module, x))
  node = node["up"]["kernel"]
  assert node.a.names == ("embed", None) and node.b.names == (None, "mlp", None)
  assert node.b.value.shape == (2, 2, 3)
