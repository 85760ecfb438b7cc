"""Adapter folders: bit for bit, refused where they do not fit, never half-written."""

import builtins
import json
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import _node, nodes
from pelt_jax._walk import get_at, update_at
from tests.test_core import tiny
from tests.test_core.tiny import values


@pytest.fixture
def base():
  return {"dense": {"kernel": values((4, 3), 0), "bias": values((3,), 1)}, "other": values((5,), 2)}


def adapter(base, n=0):
  lora = nodes.LoraWeight(
    base["dense"]["kernel"],
    values((4, 2), 10 + n),
    values((2, 3), 20 + n),
    jnp.asarray(0.3),
    nodes.Dropout(jnp.asarray(0.1)),
    group="fast",
  )
  branch = nodes.Bottleneck(values((3, 2), 3), None, values((2, 3), 4), None, None)
  chain = _node.Chain((nodes.After(branch, tap="in"), nodes.AroundNorm(branch)))
  return {
    **base,
    "dense": {"kernel": lora, "bias": nodes.Guard(base["dense"]["bias"]), "bypass": chain},
  }


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_bit_for_bit(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  loaded = pelt.load(tmp_path, base)
  assert_same(loaded, adapter(base))
  assert loaded["dense"]["kernel"].group == "fast"
  assert loaded["dense"]["bypass"].nodes[0].tap == "in"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "uint8", "bool"])
def test_every_dtype_round_trips(dtype, tmp_path):
  base = {"w": jnp.ones((2, 3), dtype)}
  pelt.save(tmp_path, {"w": nodes.Tuned(base["w"] * jnp.zeros((), dtype))})
  assert_same(pelt.load(tmp_path, base), {"w": nodes.Tuned(jnp.zeros((2, 3), dtype))})


def test_the_file_holds_no_leaf_of_the_base(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  stored = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
  arrays = 4 * (4 * 2 + 2 * 3 + 1 + 1 + 2 * (3 * 2 + 2 * 3))
  assert arrays < stored < arrays + 1500  # the header
  index = json.loads((tmp_path / "adapter.json").read_text())
  assert set(index["base"]) == {"dense/kernel", "dense/bias", "other"}


def test_another_value_raises_and_names_the_leaf(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  for path in ("dense/kernel", "dense/bias", "other"):
    leaf = get_at(base, path)
    changed = leaf.at[(0,) * leaf.ndim].multiply(1 + 1e-6)
    with pytest.raises(ValueError, match=f"{path}.*other values"):
      pelt.load(tmp_path, update_at(base, {path: changed}))
  swapped = base["other"][::-1]  # the same numbers in another order
  with pytest.raises(ValueError, match="other"):
    pelt.load(tmp_path, base | {"other": swapped})


def test_another_shape_or_leaf_raises(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  with pytest.raises(ValueError, match=r"other.*\[5\].*\[6\]"):
    pelt.load(tmp_path, base | {"other": jnp.ones(6)})
  with pytest.raises(ValueError, match="other"):
    pelt.load(tmp_path, {"dense": base["dense"]})
  with pytest.raises(ValueError, match="more"):
    pelt.load(tmp_path, base | {"more": jnp.ones(1)})
  with pytest.raises(ValueError, match="dense/kernel"):
    pelt.load(tmp_path, base | {"dense": {"bias": base["dense"]["bias"]}})


def test_another_dtype_only_warns(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  half = base | {"other": jnp.asarray(base["other"], jnp.bfloat16)}
  with pytest.warns(UserWarning, match="'other' was float32.*bfloat16"):
    loaded = pelt.load(tmp_path, half)
  assert loaded["other"].dtype == jnp.bfloat16


def test_fingerprint_sees_order_and_every_bit():
  from pelt_jax._save import fingerprint

  x = jnp.zeros((8,)).at[3].set(1.0)
  seen = {int(fingerprint(jnp.roll(x, i))) for i in range(8)}
  assert len(seen) == 8
  assert int(fingerprint(x)) != int(fingerprint(-x))
  assert int(fingerprint(jnp.zeros(3))) != int(fingerprint(-jnp.zeros(3)))
  with jax.enable_x64(True):
    one = jnp.asarray([1.0, 2.0], jnp.float64)
    assert int(fingerprint(one)) != int(fingerprint(one + 2.0**-52))


@pytest.mark.parametrize(
  "break_it",
  [
    lambda f: (f / "adapter.json").write_text("{"),
    lambda f: (f / "adapter.json").write_text("[]"),
    lambda f: (f / "adapter.json").write_text('{"format": "other", "version": 1}'),
    lambda f: next(f.glob("*.safetensors")).write_bytes(b"short"),
    lambda f: os.truncate(next(f.glob("*.safetensors")), 200),
    lambda f: next(f.glob("*.safetensors")).unlink(),
  ],
  ids=["json", "list", "format", "garbage", "truncated", "missing"],
)
def test_damaged_files_are_refused(base, tmp_path, break_it):
  pelt.save(tmp_path, adapter(base))
  break_it(tmp_path)
  with pytest.raises(ValueError, match="adapter"):
    pelt.load(tmp_path, base)


def test_an_index_without_its_parts_is_damaged(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  index = json.loads((tmp_path / "adapter.json").read_text())
  for key in ("nodes", "base", "tensors"):
    (tmp_path / "adapter.json").write_text(json.dumps({k: v for k, v in index.items() if k != key}))
    with pytest.raises(ValueError, match="damaged"):
      pelt.load(tmp_path, base)


def test_no_adapter(base, tmp_path):
  with pytest.raises(FileNotFoundError, match="no adapter"):
    pelt.load(tmp_path / "absent", base)
  with pytest.raises(FileNotFoundError, match="no adapter"):
    pelt.load(tmp_path, base)
  with pytest.raises(ValueError, match="no nodes"):
    pelt.save(tmp_path, base)
  assert not list(tmp_path.iterdir())


def test_unknown_class_is_refused(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  path = tmp_path / "adapter.json"
  path.write_text(path.read_text().replace('"LoraWeight"', '"os.system"'))
  with pytest.raises(ValueError, match="dense/kernel.*os.system.*not a known node class"):
    pelt.load(tmp_path, base)


@pytest.mark.parametrize("at", [1, 2])
def test_killed_at_a_rename_leaves_the_previous(base, tmp_path, monkeypatch, at):
  pelt.save(tmp_path, adapter(base, 0))
  calls, real = [], os.replace

  def dies(*args: Any) -> None:
    calls.append(args)
    if len(calls) == at:
      raise KeyboardInterrupt
    real(*args)

  monkeypatch.setattr(os, "replace", dies)
  with pytest.raises(KeyboardInterrupt):
    pelt.save(tmp_path, adapter(base, 1))
  monkeypatch.undo()
  assert_same(pelt.load(tmp_path, base), adapter(base, 0))
  pelt.save(tmp_path, adapter(base, 1))
  assert_same(pelt.load(tmp_path, base), adapter(base, 1))
  assert len(list(tmp_path.glob("adapter-*.safetensors"))) == 1


def test_full_disk_leaves_the_previous(base, tmp_path, monkeypatch):
  pelt.save(tmp_path, adapter(base, 0))
  before = sorted(p.name for p in tmp_path.iterdir())
  real = builtins.open

  def full(path, mode="r", *args, **kwargs):
    file = real(path, mode, *args, **kwargs)
    if "w" in mode and str(path).startswith(str(tmp_path)):
      file.write(b"part")

      class Full:
        def __enter__(self):
          return self

        def __exit__(self, *_):
          file.close()

        def write(self, data):
          raise OSError(28, "No space left on device")

      return Full()
    return file

  monkeypatch.setattr(builtins, "open", full)
  with pytest.raises(OSError, match="No space"):
    pelt.save(tmp_path, adapter(base, 1))
  monkeypatch.undo()
  assert sorted(p.name for p in tmp_path.iterdir()) == before
  assert_same(pelt.load(tmp_path, base), adapter(base, 0))


def test_saving_the_same_again_changes_nothing(base, tmp_path):
  pelt.save(tmp_path, adapter(base))
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  pelt.save(tmp_path, adapter(base))
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_scanned_params_round_trip(tmp_path):
  model, (ids, _) = tiny.Model(mode="scan"), tiny.inputs()
  base = tiny.in_mode(tiny.looped_params(), "scan")
  method = pelt.lora(rank=2, targets="mlp/up", dropout=0.1)
  params = method.init(jax.random.key(0), base, pelt.sites(model, ids))
  pelt.save(tmp_path, params)
  assert_same(pelt.load(tmp_path, base), params)


def test_boxed_params_round_trip(tmp_path):
  init = nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", "columns"))
  model, x = nn.Dense(3, kernel_init=init), jnp.ones((2, 4))
  base = model.init(jax.random.key(0), x)["params"]
  params = pelt.lora(rank=2, targets="kernel").init(jax.random.key(0), base, pelt.sites(model, x))
  assert params["kernel"].a.names == ("rows", None) and params["kernel"].b.names == (
    None,
    "columns",
  )
  pelt.save(tmp_path, params)
  loaded = pelt.load(tmp_path, base)
  assert_same(loaded, params)
  assert pelt.merge(loaded)["kernel"].names == ("rows", "columns")
  with pytest.raises(ValueError, match="boxed"):
    pelt.load(tmp_path, nn.unbox(base))
