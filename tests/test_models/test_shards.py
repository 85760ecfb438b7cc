"""Checkpoints read in parts: the same numbers, and only the bytes of the parts."""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pelt_jax import models, training
from pelt_jax.models._safetensors import read_header, write
from pelt_jax.models._shards import check_function
from tests.support import on_devices
from tests.test_training import tiny


@pytest.fixture
def asked(monkeypatch):
  """Bytes of each read that the system was asked for."""
  sizes, real = [], os.preadv

  def counting(descriptor, buffers, offset):
    sizes.append(sum(map(len, buffers)))
    return real(descriptor, buffers, offset)

  monkeypatch.setattr(os, "preadv", counting)
  return sizes


WHOLE = slice(None)


@pytest.mark.parametrize(
  ("shape", "index", "reads"),
  [
    ((6, 8), (slice(2, 4), WHOLE), 1),  # rows lie together
    ((6, 8), (WHOLE, slice(2, 4)), 6),  # columns do not
    ((6, 8), (slice(1, 3), slice(4, 8)), 2),
    ((6, 8), (WHOLE, WHOLE), 1),
    ((3, 4, 5), (slice(1, 3), slice(1, 2), WHOLE), 2),
    ((3, 4, 5), (slice(1, 3), WHOLE, WHOLE), 1),
    ((7,), (slice(3, 7),), 1),
    ((), (), 1),
    ((0, 4), (WHOLE, slice(0, 2)), 0),
    ((6, 8), (slice(6, 6), WHOLE), 0),
  ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_part_asks_for_its_own_bytes(tmp_path, asked, shape, index, reads, dtype):
  value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
  file = tmp_path / "x.safetensors"
  tensors = {"before": np.ones(3, dtype), "x": value, "y": np.ones(9, dtype)}
  write(file, {n: (v.shape, v.dtype) for n, v in tensors.items()}, tensors.__getitem__, {})
  found = read_header(file)["x"].part(index)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, value[index])
  assert len(asked) == reads
  assert sum(asked) == found.nbytes


def test_the_system_may_give_less_than_was_asked(tmp_path, monkeypatch):
  real = os.preadv
  few = lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:5]], offset)
  monkeypatch.setattr(os, "preadv", few)
  file, value = tmp_path / "x.safetensors", np.arange(12, dtype=np.int32)
  write(file, {"x": (value.shape, value.dtype)}, lambda name: value, {})
  entry = read_header(file)["x"]
  np.testing.assert_array_equal(entry.part((slice(2, 9),)), value[2:9])
  file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(ValueError, match="became shorter while it was read"):
    entry.part((slice(2, 12),))


WORKER = """
  import os, pathlib, sys, tempfile
  import jax, jax.numpy as jnp, numpy as np
  import pelt_jax as pelt
  from pelt_jax import models, training
  from tests.test_training import tiny

  folder = pathlib.Path(tempfile.mkdtemp())
  tiny.save_llama(folder, hidden_size=64, intermediate_size=128, num_attention_heads=4)
  asked, real = [0], os.preadv
  def counting(descriptor, buffers, offset):
    asked[0] += sum(map(len, buffers))
    return real(descriptor, buffers, offset)
  os.preadv = counting

  sizes = {n: e for f in folder.glob("*.safetensors")
           for n, e in models._safetensors.read_header(f).items()}
  total = sum(e.dtype.itemsize * int(np.prod(e.shape)) for e in sizes.values())
  mesh = training.make_mesh("fsdp=2,model=2")
  seen = []

  def shardings(model, shapes):
    seen.append(training.model_shardings(mesh)(model, shapes))
    return seen[-1]

  for scan in (False, True):
    for transform in (None, pelt.nf4(block=32, double_quant=True)):
      options = {"scan": scan, "transform": transform}
      _, whole = models.from_pretrained(folder, **options)
      asked[0] = 0
      _, parts = models.from_pretrained(folder, shardings=shardings, **options)
      assert asked[0] == total, (asked, total)  # each byte once, whatever devices share
      assert jax.tree.structure(whole) == jax.tree.structure(parts)
      assert len(jax.tree.leaves(parts)) == len(jax.tree.leaves(seen[-1]))
      jax.tree.map(lambda a, s: (_ for _ in ()).throw(AssertionError(a.sharding))
                   if a.sharding != s else None, parts, seen[-1])
      for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        # The mean that double quantization subtracts is a sum in another order: one rounding.
        exact = transform is None or a.dtype != jnp.float32
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0 if exact else 2**-22)
      split = [x for x in jax.tree.leaves(parts) if not x.sharding.is_fully_replicated]
      assert len(split) > 5
"""


def test_parts_on_a_mesh_are_the_whole():
  on_devices(WORKER, devices=4)


def test_a_leaf_without_a_sharding_is_named(tmp_path):
  tiny.save_llama(tmp_path)
  with pytest.raises(ValueError, match=r"shardings gave None for .*, expected a jax.sharding"):
    models.from_pretrained(tmp_path, shardings=lambda model, shapes: {})


def test_shardings_are_a_function_of_a_model_and_shapes():
  message = r"expected a function .* such as training.model_shardings\(mesh\)"
  for given in ({}, jax.make_mesh((1,), ("fsdp",)), training.model_shardings):
    with pytest.raises(TypeError, match=message):
      check_function(given)
  with pytest.raises(TypeError, match=message):
    models.from_pretrained("absent", shardings=training.model_shardings)


def test_a_fresh_head_is_the_same_in_parts(tmp_path):
  tiny.save_bert(tmp_path)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = lambda model, shapes: jax.tree.map(lambda leaf: where, shapes)
  load = lambda **options: models.from_pretrained(
    tmp_path, task="classification", num_labels=3, dtype=jnp.bfloat16, **options
  )[1]
  assert tiny.equal(load(), load(shardings=shardings))
