"""Checkpoints: nothing is lost, nothing is taken for something else."""

import errno
import gc
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import training
from tests.support import REPOSITORY, require
from tests.test_training import tiny


def a_tree(seed=0, rank=2):
  key = jax.random.key(seed)
  node = pelt.nodes.LoraWeight(
    optax.MaskedNode(),
    jax.random.normal(key, (3, rank), jnp.bfloat16),
    jnp.ones((rank, 4)),
    jnp.float32(2.0),
  )
  trainable = {"layer/0": {"kernel": node}, "bias": jnp.arange(4, dtype=jnp.int8)}
  return {"trainable": trainable, "state": optax.adam(1e-3).init(trainable), "key": key}


def bits(tree):
  keys = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: jax.random.key_data(x) if keys(x) else x, tree)


def test_round_trip_is_bit_identical(tmp_path):
  tree, meta = a_tree(), {"data": {"next_index": 3}, "history": [[1, 0.1]]}
  training.Checkpoints(tmp_path).save(5, tree, meta)
  step, back, note = training.Checkpoints(tmp_path).restore(a_tree(seed=1))
  assert (step, note) == (5, meta)
  assert tiny.equal(bits(tree), bits(back))
  assert jax.tree.structure(tree) == jax.tree.structure(back)


def test_only_the_last_few_are_kept(tmp_path):
  checkpoints = training.Checkpoints(tmp_path, keep=2)
  assert checkpoints.latest() is None
  for step in (1, 2, 3):
    checkpoints.save(step, {"w": jnp.full(2, step)}, {})
  assert checkpoints.latest() == 3
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
  assert checkpoints.restore({"w": jnp.zeros(2, jnp.int32)}, step=2)[1]["w"].tolist() == [2, 2]


def test_nothing_to_resume(tmp_path):
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    training.Checkpoints(tmp_path).restore({"w": jnp.zeros(2)})


def changed_static(tree):
  node = tree["trainable"]["layer/0"]["kernel"]
  tree["trainable"]["layer/0"]["kernel"] = node.replace(group="other")
  return tree


@pytest.mark.parametrize(
  ("options", "change", "message"),
  [
    ({"lr": 2}, lambda tree: tree, "option lr: saved 1, now 2"),
    ({"lr": 1, "x": 0}, lambda tree: tree, "option x: saved nothing, now 0"),
    ({"lr": 1}, lambda tree: a_tree(rank=3), r"layer/0.*kernel.*\.a: saved .*3, 2.*now .*3, 3"),
    ({"lr": 1}, changed_static, "node .*'trainable'.*now .*'other'"),
    ({"lr": 1}, lambda tree: tree | {"best": jnp.zeros(1)}, "best.*saved nothing"),
  ],
)
def test_another_run_is_refused(tmp_path, options, change, message):
  training.Checkpoints(tmp_path, {"lr": 1}).save(1, a_tree(), {})
  with pytest.raises(training.CheckpointMismatch, match=message):
    training.Checkpoints(tmp_path, options).restore(change(a_tree()))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
  checkpoints = training.Checkpoints(tmp_path)
  checkpoints.save(1, a_tree(), {})
  import shutil

  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
  with pytest.raises(OSError, match=r"step 2 .*disk is full.*step 1 is intact") as caught:
    checkpoints.save(2, a_tree(1), {})
  assert caught.value.errno == errno.ENOSPC
  assert checkpoints.latest() == 1
  assert tiny.equal(bits(checkpoints.restore(a_tree(1))[1]), bits(a_tree()))


@pytest.fixture
def collected():
  """What a test leaves behind is collected here, not in a later test."""
  yield
  gc.collect()


# Orbax leaves tasks of a closed event loop, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collected")
def test_a_disk_that_fills_up_while_writing(tmp_path):
  """A real file system of 2 MB, where mounting one is allowed."""
  require("tmpfs")
  folder = tmp_path / "small"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
  subprocess.run(mount, capture_output=True, check=True)
  try:
    checkpoints = training.Checkpoints(folder)
    checkpoints.save(1, a_tree(), {})
    big = a_tree() | {"noise": np.random.default_rng(0).bytes(1 << 22)}
    big["noise"] = jnp.asarray(np.frombuffer(big["noise"], np.uint8))
    checkpoints._check_space = lambda step, size: None  # as if the space went meanwhile
    with pytest.raises(OSError, match="step 2 could not be written") as caught:
      checkpoints.save(2, big, {})
    assert "disk is full" in str(caught.value)
    again = training.Checkpoints(folder)
    assert again.latest() == 1
    assert tiny.equal(bits(again.restore(a_tree(1))[1]), bits(a_tree()))
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


SAVER = """
  import sys, jax.numpy as jnp
  from pelt_jax import training
  checkpoints = training.Checkpoints(sys.argv[1])
  for step in range(1, 1000):
    checkpoints.save(step, {"w": jnp.full((1 << 20,), step, jnp.int32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("after_ms", [0, 15, 40])
def test_killed_while_saving(tmp_path, after_ms):
  saver = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path)],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    for line in saver.stdout:
      if int(line) == 3:
        break
    time.sleep(after_ms / 1e3)
  finally:
    saver.send_signal(signal.SIGKILL)
    rest = saver.communicate()[0].split()
  finished = int(rest[-1]) if rest else 3
  checkpoints = training.Checkpoints(tmp_path)
  step, tree, meta = checkpoints.restore({"w": jnp.zeros(1 << 20, jnp.int32)})
  # The kill may fall between the rename and the print.
  assert step in (finished, finished + 1)
  assert meta == {"step": step}
  assert (np.asarray(tree["w"]) == step).all()
  checkpoints.save(step + 1, {"w": jnp.zeros(1 << 20, jnp.int32)}, {})
  assert checkpoints.latest() == step + 1
  assert not list(pathlib.Path(tmp_path).glob("*tmp*"))
