"""The main job in two real processes: one process's numbers, whatever happens to one of them."""

import importlib
import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from pelt_jax import training
from tests.support import REPOSITORY
from tests.test_training import tiny

ROWS, BATCH, EPOCHS = 24, 4, 30  # a checkpoint ends each epoch
EVERY, STEPS = ROWS // BATCH, ROWS // BATCH * EPOCHS
TOLERANCE = 1e-5  # relative, float32: sums of rows and of features in another order


@pytest.fixture
def processes(monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
  return importlib.import_module("processes").Processes


@pytest.fixture
def start(processes, tmp_path):
  """Starts the job; several processes share weights (fsdp)."""
  model, data = tmp_path / "llama", tmp_path / "data.jsonl"
  model.mkdir()
  tiny.save_llama(model, hidden_size=32, intermediate_size=64)
  text = lambda i: {"prompt": f"{i}:", "completion": f" {i * i} cats on {7 * i} mats"}
  data.write_text("".join(json.dumps(text(i)) + "\n" for i in range(ROWS)))
  settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
  settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

  def job(name, count):
    options = {"model": model, "train": data, "eval": data, "batch": BATCH, "epochs": EPOCHS}
    options |= {"task": "lm", "length": 32, "lr": 0.01, "set": "dropout=0.1"}
    command = ["experiments/finetune.py", "--quiet", "--resume", "--out", str(tmp_path / name)]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command += ["--distributed", "--mesh", f"fsdp={count}"] if count > 1 else []
    return processes(command, count, **settings)

  return job


def losses(jobs, out):
  codes = jobs.wait(300)
  assert not any(codes), "\n".join(jobs.texts())
  report = json.loads((out / "report.json").read_text())
  assert report["steps"] == STEPS
  return np.array([loss for _, loss in report["loss"]] + [report["metric"]["after"]])


def newest(out):
  return max((int(p.name) for p in out.glob("checkpoints/*") if p.name.isdigit()), default=0)


def until(jobs, out, step):
  end = time.monotonic() + 300
  while newest(out) < step:
    assert time.monotonic() < end and jobs.jobs[0].poll() is None, "\n".join(jobs.texts())
    time.sleep(0.005)


@pytest.mark.parity
def test_two_processes_equal_one_also_when_one_is_killed_or_terminated(start, tmp_path):
  whole = losses(start("one", 1), tmp_path / "one")
  assert len(set(whole.round(4))) > STEPS / 2  # they tell steps apart
  np.testing.assert_allclose(losses(start("two", 2), tmp_path / "two"), whole, rtol=TOLERANCE)

  out = tmp_path / "out"
  jobs = start("out", 2)
  until(jobs, out, 2 * EVERY)
  jobs.jobs[1].send_signal(signal.SIGKILL)
  assert jobs.wait(300) == [1, -signal.SIGKILL]
  # Noticed in a step, or by a save that was under way.
  assert re.search("If a process was lost, .* --resume|Start again, and resume", jobs.texts()[0])
  saved = newest(out)
  assert 2 * EVERY <= saved < STEPS

  jobs = start("out", 1)  # on another number of processes
  until(jobs, out, saved + EVERY)
  jobs.jobs[0].send_signal(signal.SIGTERM)
  assert jobs.wait(300) == [143]
  saved = newest(out)
  assert saved < STEPS and not (out / "report.json").exists()

  jobs = start("out", 2)
  until(jobs, out, saved + EVERY)
  jobs.jobs[1].send_signal(signal.SIGTERM)  # one is told, all stop
  assert jobs.wait(300) == [143, 143]
  assert newest(out) < STEPS

  np.testing.assert_allclose(losses(start("out", 1), out), whole, rtol=TOLERANCE)


@pytest.mark.parametrize(
  "given",
  [
    {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
    {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
    {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
    {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"},
  ],
)
def test_what_processes_are_told_must_be_whole(given):
  with pytest.raises(ValueError, match="expected host:port of process 0, how many there are"):
    training.initialize_distributed(given)


@pytest.mark.parametrize("given", [{}, {"JAX_COORDINATOR_ADDRESS": "a:1"}])
def test_without_a_cluster_the_variables_are_named(monkeypatch, given):
  def initialize():
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  named = "JAX_COORDINATOR_ADDRESS.*JAX_NUM_PROCESSES.*JAX_PROCESS_ID.* expected .* by itself"
  with pytest.raises(ValueError, match=named):
    training.initialize_distributed(given)
