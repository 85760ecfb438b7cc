"""LoRA, and LoRA over 4 bits, on eight virtual devices: losses, placement, no wasted traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pelt_jax as pelt
from pelt_jax import models, training
from tests.support import on_devices

WORKER = "from tests.test_sharding import worker as w\n"


@pytest.mark.parity
@pytest.mark.parametrize(("mesh", "remat"), [("data=2,model=4", True), ("fsdp=8", "offload")])
def test_scanned_and_rematerialized(mesh, remat):
  on_devices(f"{WORKER}w.check_trees(*w.check_training({mesh!r}, scan=True, remat={remat!r}))")


@pytest.mark.parity  # the same again, on the other form of the model
@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=8", "data=2,fsdp=2,model=2"])
def test_looped(mesh):
  on_devices(f"{WORKER}w.check_trees(*w.check_training({mesh!r}, scan=False, remat=False))")


@pytest.mark.parity
@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=8"])
def test_the_check_sees_the_gradients_of_kernels_that_train(mesh):
  on_devices(f"{WORKER}w.check_detector({mesh!r})")


@pytest.mark.parity
@pytest.mark.parametrize(
  ("mesh", "layout", "scan", "moved"),
  [
    ("fsdp=8", "rows", False, {"u8"}),
    ("fsdp=8", "words", True, {"u32"}),
    ("data=2,fsdp=2,model=2", "rows", False, {"u8"}),
    ("model=8", "rows", True, set()),
  ],
)
def test_codes_travel_and_weights_do_not(mesh, layout, scan, moved):
  on_devices(f"{WORKER}assert w.check_codes({mesh!r}, {layout!r}, {scan}) == {moved}")


@pytest.mark.parametrize("axes", [("fsdp", "model"), ("data", "model"), ("fsdp",)])
def test_base_specs_follow_roles(axes):
  sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
  config = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False, **sizes}
  model = models.from_config(config | {"num_key_value_heads": 2}, scan=True)
  mesh = jax.make_mesh((1,) * len(axes), axes)
  specs = training.base_specs(pelt.sites(model, jnp.ones((1, 2), jnp.int32)), mesh)
  fsdp, tensor = ("fsdp" if "fsdp" in axes else None), ("model" if "model" in axes else None)
  layer = specs["model"]["layers"]
  assert layer["self_attn"]["q_proj"]["kernel"] == P(None, fsdp, tensor)
  assert layer["mlp"]["down_proj"]["kernel"] == P(None, tensor, fsdp)
  assert specs["model"]["embed_tokens"]["embedding"] == P(tensor, fsdp)
  assert specs["lm_head"]["kernel"] == P(None, tensor)  # whole under FSDP: used chunk by chunk
  assert specs["model"]["norm"]["scale"] == P()


@pytest.mark.parametrize(
  ("axes", "spec"),
  [
    (("data", "fsdp", "model"), P(("data", "fsdp"))),
    (("fsdp", "model"), P(("fsdp",))),
    (("model",), P()),
  ],
)
def test_rows_lie_over_all_batch_axes(axes, spec):
  mesh = jax.make_mesh((1,) * len(axes), axes)
  placed = training.place_batch({"labels": np.arange(4), "mask": np.ones((4, 2))}, mesh)
  assert {name: x.sharding.spec for name, x in placed.items()} == {"labels": spec, "mask": spec}
  np.testing.assert_array_equal(placed["labels"], np.arange(4))


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    ({"rows": 6}, r"batch of 6 rows does not divide over 4 devices \(data=2, fsdp=2\)"),
    ({"rows": 8, "labels": np.ones(7)}, r"same number of rows, got .*'labels': \(7,\)"),
    ({"rows": 8, "step": np.int32(3)}, r"same number of rows, got .*'step': \(\)"),
    ({}, r"same number of rows, got shapes \{\}"),
  ],
)
def test_a_batch_that_cannot_be_placed(batch, message):
  mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "model"))
  batch = {n: np.ones((x, 5)) if n == "rows" else x for n, x in batch.items()}
  with pytest.raises(ValueError, match=message):
    training.place_batch(batch, mesh)


@pytest.mark.parity
def test_without_being_told_xla_moves_what_codes_stand_for():
  on_devices(f"{WORKER}assert w.check_codes('fsdp=8', 'rows', False, gather=False) == {{'f32'}}")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lora", "qlora"])
@pytest.mark.parametrize(("mesh", "scan"), [("data=2,model=4", False), ("fsdp=8", True)])
def test_traffic_is_the_base_and_the_closed_form(name, mesh, scan):
  on_devices(f"{WORKER}w.check_traffic({name!r}, {mesh!r}, {scan})")


@pytest.mark.parity
def test_gradients_alone_move_where_devices_share_the_batch_alone():
  calls = "".join(f"w.check_batch_alone({n!r})\n" for n in ("houlsby", "fusion", "bank"))
  on_devices(WORKER + calls)


@pytest.mark.parity
@pytest.mark.parametrize(("mesh", "paged"), [("fsdp=8", False), ("data=2,fsdp=2,model=2", True)])
def test_moments_follow_the_batch(mesh, paged):
  on_devices(f"{WORKER}w.check_moments({mesh!r}, {paged})")


def test_gathered_names_what_is_there():
  on_devices(f"{WORKER}w.check_gathered()")
