"""Where the state of a step lies: as what it belongs to."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pelt_jax as pelt
from pelt_jax import training

MESH = AbstractMesh((2, 2, 4), ("data", "fsdp", "model"))


def at(shape, *spec):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*spec)))


def lora():
  node = pelt.nodes.LoraWeight(None, at((8, 3), "model"), at((3, 12), None, "model"), None)
  return pelt.partition({"q": {"kernel": node}, "b": pelt.nodes.Tuned(at((12,), "model"))})[0]


def specs(tree):
  return [tuple(s.spec) for s in jax.tree.leaves(tree)]


OWN = [("model",), ("model",), (None, "model")]  # b, then a and b of q


@pytest.mark.parametrize(
  ("tx", "whole"),
  [
    (optax.adam(1e-3), 1),
    (optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(1e-3)), None),
    (
      optax.chain(
        optax.adam(1e-3), optax.multi_transform({"trainable": optax.adam(1.0)}, pelt.labels)
      ),
      2,
    ),
    (optax.MultiSteps(optax.sgd(1e-3, momentum=0.9), 2), 2),
  ],
  ids=["adam", "inject_hyperparams", "multi_transform", "MultiSteps"],
)
def test_moments_lie_as_what_trains_and_counters_everywhere(tx, whole):
  trainable = lora()
  state = jax.eval_shape(tx.init, trainable)
  above, below = training.state_shardings(trainable, state, MESH)
  assert jax.tree.structure(above) == jax.tree.structure(trainable) and specs(above) == OWN
  assert jax.tree.structure(below) == jax.tree.structure(state)
  shapes = [x.shape for x in jax.tree.leaves(state)]
  of = {(12,): OWN[0], (8, 3): OWN[1], (3, 12): OWN[2], (): ()}
  assert specs(below) == [of[s] for s in shapes]
  assert shapes.count((8, 3)) >= 2 and (whole is None or shapes.count(()) == whole)


def test_the_longest_path_counts_and_other_shapes_are_whole():
  trainable = {"a": {"w": at((4, 8), None, "model")}, "w": at((4, 8), "model")}
  state = {"mu": trainable, "row": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  _, below = training.state_shardings(trainable, state, MESH)
  assert below["mu"]["a"]["w"].spec == P(None, "model") and below["mu"]["w"].spec == P("model")
  assert below["row"]["w"].spec == P()


def test_means_of_a_post_step_lie_as_what_they_are_of():
  method = pelt.adalora(9, 3, 2, targets="kernel")
  node = pelt.nodes.SvdWeight(None, at((8, 3), "model"), at((3, 12), None, "model"), at((3,)))
  trainable = {"q": {"kernel": node}}
  state = jax.eval_shape(method.post_step.init, trainable)
  _, below = training.state_shardings(trainable, state, MESH)
  for means in (below.sensitivity, below.uncertainty):
    assert means["q/kernel/a"].spec == P("model") and means["q/kernel/b"].spec == P(None, "model")
  assert below.scores.spec == below.kept.spec == P()


def test_moments_are_split_along_the_longest_axis_that_divides():
  wanted = {
    "a": (at((8, 3), "model"), P("model")),  # 16 divides neither 8 nor 3
    "b": (at((32, 4), "model"), P(("model", "data", "fsdp"), None)),
    "c": (at((6, 4, 12), None, None, "model"), P(None, ("data", "fsdp"), "model")),
    "d": (at((4, 8), "fsdp"), P("fsdp", "data")),  # trains as the base lies: one axis is left
    "e": (at(()), P()),
  }
  trainable = {name: x for name, (x, _) in wanted.items()}
  state = jax.eval_shape(optax.sgd(1.0, momentum=0.9).init, trainable)
  above, below = training.state_shardings(trainable, state, MESH, moments=("data", "fsdp"))
  assert above == {name: x.sharding for name, x in trainable.items()}
  assert {n: s.spec for n, s in below[0].trace.items()} == {n: s for n, (_, s) in wanted.items()}


def test_an_axis_that_the_mesh_lacks():
  for moments in (("dp",), "dp"):  # a string is one name
    with pytest.raises(ValueError, match=r"moments=\('dp',\): the mesh has axes"):
      training.state_shardings({}, {}, MESH, moments=moments)


def test_one_axis_may_be_a_string():
  trainable = {"w": at((4, 8))}
  state = jax.eval_shape(optax.sgd(1.0, momentum=0.9).init, trainable)
  _, below = training.state_shardings(trainable, state, MESH, moments="data")
  assert below[0].trace["w"].spec == P(None, "data")
