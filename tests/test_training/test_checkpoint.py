"""Checkpoints: nothing is lost, nothing is taken for something else."""

import errno
import gc
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import training
from tests.support import REPOSITORY, on_devices, require
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


def saved(folder, step, tree, meta, options=None):
  """Checkpoints with one that is written."""
  checkpoints = training.Checkpoints(folder, options)
  checkpoints.save(step, tree, meta)
  checkpoints.wait()
  return checkpoints


def bits(tree):
  keys = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: jax.random.key_data(x) if keys(x) else x, tree)


def test_round_trip_is_bit_identical(tmp_path):
  tree, meta = a_tree(), {"data": {"next_index": 3}, "history": [[1, 0.1]]}
  saved(tmp_path, 5, tree, meta)
  step, back, note = training.Checkpoints(tmp_path).restore(a_tree(seed=1))
  assert (step, note) == (5, meta)
  assert tiny.equal(bits(tree), bits(back))
  assert jax.tree.structure(tree) == jax.tree.structure(back)


def test_only_the_last_few_are_kept(tmp_path):
  checkpoints = training.Checkpoints(tmp_path, keep=2)
  assert checkpoints.latest() is None
  for step in (1, 2, 3):
    checkpoints.save(step, {"w": jnp.full(2, step)}, {})
  checkpoints.wait()
  assert checkpoints.latest() == 3
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
  assert checkpoints.restore({"w": jnp.zeros(2, jnp.int32)}, step=2)[1]["w"].tolist() == [2, 2]


def test_nothing_to_resume(tmp_path):
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    training.Checkpoints(tmp_path).restore({"w": jnp.zeros(2)})


def test_a_step_that_is_not_there_and_a_folder_that_is_none(tmp_path):
  checkpoints = saved(tmp_path / "there", 2, {"w": jnp.zeros(2)}, {})
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7, but of \[2\]"):
    checkpoints.restore({"w": jnp.zeros(2)}, step=7)
  (tmp_path / "file").write_text("")
  with pytest.raises(NotADirectoryError, match="folder=.*file' is a file"):
    training.Checkpoints(tmp_path / "file")


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
  saved(tmp_path, 1, a_tree(), {}, {"lr": 1})
  with pytest.raises(training.CheckpointMismatch, match=message):
    training.Checkpoints(tmp_path, options).restore(change(a_tree()))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
  checkpoints = saved(tmp_path, 1, a_tree(), {})
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
  with pytest.raises(OSError, match=r"step 2 .*disk is full.*step 1 is intact") as caught:
    checkpoints.save(2, a_tree(1), {})
  assert caught.value.errno == errno.ENOSPC
  assert checkpoints.latest() == 1
  assert tiny.equal(bits(checkpoints.restore(a_tree(1))[1]), bits(a_tree()))


@pytest.fixture
def commits(monkeypatch):
  """What is called when a checkpoint is about to appear."""
  actions = []

  def acting(real):
    def moved(source, target, **options):
      for act in actions if "orbax-checkpoint-tmp" in str(source) else ():
        act(target)
      return real(source, target, **options)

    return moved

  for name in ("rename", "replace"):
    monkeypatch.setattr(os, name, acting(getattr(os, name)))
  return actions


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, commits):
  checkpoints = saved(tmp_path, 1, {"w": jnp.zeros(3)}, {})
  gate = threading.Event()
  commits.append(lambda target: gate.wait(60))
  x = jnp.arange(1 << 18)
  checkpoints.save(2, {"w": x}, {})  # returns while the gate is shut
  jax.block_until_ready(jax.jit(lambda x: 0 * x, donate_argnums=0)(x))
  assert checkpoints.latest() == 1 and not (tmp_path / "2").exists()
  gate.set()
  checkpoints.wait()
  assert checkpoints.latest() == 2
  back = checkpoints.restore({"w": jnp.zeros(1 << 18, jnp.int32)})[1]["w"]
  np.testing.assert_array_equal(np.asarray(back), np.arange(1 << 18))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", ["save", "wait", "close", "restore"])
def test_a_failure_in_the_background_is_told_by_the_next_call(tmp_path, commits, call):
  checkpoints = saved(tmp_path, 1, {"w": jnp.zeros(3)}, {})

  def fail(target):
    raise OSError(errno.EIO, "the cable was pulled")

  commits.append(fail)
  checkpoints.save(2, {"w": jnp.ones(3)}, {})
  arguments = {"save": (3, {"w": jnp.ones(3)}, {}), "restore": ({"w": jnp.ones(3)},)}
  message = "step 2 could not be written.*cable was pulled.*step 1 is intact"
  with pytest.raises(OSError, match=message):
    getattr(checkpoints, call)(*arguments.get(call, ()))
  commits.clear()
  assert checkpoints.restore({"w": jnp.ones(3)})[0] == 1


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
    checkpoints = saved(folder, 1, a_tree(), {})
    big = a_tree() | {"noise": np.random.default_rng(0).bytes(1 << 22)}
    big["noise"] = jnp.asarray(np.frombuffer(big["noise"], np.uint8))
    checkpoints._check_space = lambda step, size: None  # as if the space went meanwhile
    with pytest.raises(OSError, match="step 2 could not be written.*step 1 is intact") as caught:
      checkpoints.save(2, big, {})
      checkpoints.wait()
    assert "disk is full" in str(caught.value)
    checkpoints.save(3, a_tree(2), {})  # the next one works
    checkpoints.wait()
    assert checkpoints.latest() == 3
    shutil.rmtree(folder / "3")
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


ANY = [pytest.param(None, marks=pytest.mark.parity, id=f"random{i}") for i in range(5)]


@pytest.mark.parametrize("after_ms", [15, *ANY])
def test_killed_while_saving(tmp_path, after_ms):
  """Saves follow each other, so that any moment is during one."""
  if after_ms is None:
    after_ms = random.SystemRandom().uniform(0, 200)
    print(f"{after_ms} ms")
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
  # That which was begun last may be written or not; the one before it is.
  assert step in (finished - 1, finished, finished + 1)
  assert meta == {"step": step}
  assert (np.asarray(tree["w"]) == step).all()
  checkpoints.save(step + 1, {"w": jnp.zeros(1 << 20, jnp.int32)}, {})
  checkpoints.wait()
  assert checkpoints.latest() == step + 1
  assert not list(pathlib.Path(tmp_path).glob("*tmp*"))


MESHES = """
  import sys
  import jax, jax.numpy as jnp, numpy as np, optax
  import pelt_jax as pelt
  from pelt_jax import training
  from tests.test_training import tiny

  model, base = tiny.llama(hidden_size=64, intermediate_size=128)
  sites = pelt.sites(model, jnp.zeros((1, 4), jnp.int32))
  method = pelt.chain(pelt.nf4(block=32), pelt.lora(rank=2, targets="all-linear"))

  def tree(mesh, seed):
    params = method.init(jax.random.key(seed), base, sites)
    params = jax.tree.map(lambda x: x + jnp.ones((), x.dtype) * seed, params)
    shardings = pelt.shardings(params, training.base_specs(sites, mesh), mesh)
    params = jax.device_put(params, shardings)
    state = optax.adam(1e-3).init(pelt.partition(params)[0])
    return {"params": params, "state": state, "key": jax.random.key(seed)}

  def delta(tree):
    return pelt.partition(tree["params"])[0]

  one, other = training.make_mesh("fsdp=4"), training.make_mesh("data=2,model=2")
  with jax.set_mesh(one):
    saved = tree(one, 1)
    for name, part in (("full", saved), ("delta", delta(saved))):
      checkpoints = training.Checkpoints(f"{sys.argv[1]}/{name}")
      checkpoints.save(3, part, {"data": {"next": 12}})
      checkpoints.close()
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  with jax.set_mesh(other):
    like = tree(other, 2)
    for name, before, after in (("full", saved, like), ("delta", delta(saved), delta(like))):
      step, back, meta = training.Checkpoints(f"{sys.argv[1]}/{name}").restore(after)
      assert (step, meta) == (3, {"data": {"next": 12}})
      assert jax.tree.structure(back) == jax.tree.structure(before)
      moved = 0
      for a, b, c in zip(*map(jax.tree.leaves, (before, back, after)), strict=True):
        np.testing.assert_array_equal(np.asarray(plain(a)), np.asarray(plain(b)))
        assert b.sharding.is_equivalent_to(c.sharding, b.ndim)
        moved += not a.sharding.is_equivalent_to(c.sharding, b.ndim)
      assert moved > 0
"""


@pytest.mark.parity
def test_another_mesh(tmp_path):
  """All of params with codes and moments, and what trains alone."""
  on_devices(textwrap.dedent(MESHES).replace("sys.argv[1]", repr(str(tmp_path))), devices=4)


def test_a_damaged_checkpoint_is_named_with_the_one_before(tmp_path):
  checkpoints = saved(tmp_path, 1, {"w": jnp.arange(1 << 12)}, {})
  checkpoints.save(2, {"w": jnp.arange(1 << 12)}, {})
  checkpoints.close()
  arrays = (p for p in (tmp_path / "2" / "arrays").rglob("*") if p.is_file())
  largest = max(arrays, key=lambda p: p.stat().st_size)
  content = largest.read_bytes()
  like = {"w": jnp.zeros(1 << 12, jnp.int32)}
  message = "checkpoint .*2 is damaged .*; remove it to resume from that of step 1"
  for damage in (lambda: largest.write_bytes(content[: len(content) // 2]), largest.unlink):
    damage()
    with pytest.raises(OSError, match=message):
      training.Checkpoints(tmp_path).restore(like)
  shutil.rmtree(tmp_path / "2")
  assert training.Checkpoints(tmp_path).restore(like)[0] == 1


def test_a_flipped_bit_is_told(tmp_path):
  """Orbax restores it as if nothing were; the sums of bits that were saved know better."""
  tree = a_tree() | {"w": jax.random.normal(jax.random.key(0), (64, 64))}
  saved(tmp_path, 1, tree, {})
  arrays = [p for p in (tmp_path / "1" / "arrays").rglob("*") if p.is_file()]
  payload = max(arrays, key=lambda p: p.stat().st_size)
  content = payload.read_bytes()
  assert len(content) > 64 * 64 * 3  # floats at random, hardly compressed
  payload.write_bytes(content[:8000] + bytes([content[8000] ^ 4]) + content[8001:])
  with pytest.raises(OSError, match=r"damaged \(the bits of \['w'\] are not those .* start anew"):
    training.Checkpoints(tmp_path).restore(tree)
  payload.write_bytes(content)
  assert training.Checkpoints(tmp_path).restore(tree)[0] == 1
