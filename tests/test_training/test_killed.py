"""The main job, killed at random moments and resumed: the same bits as if nothing had happened."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import support
from tests.test_training import tiny

pytestmark = pytest.mark.parity
ROWS, BATCH, EPOCHS = 12, 4, 10  # a checkpoint ends each epoch: every 3 of 30 steps
EVERY = ROWS // BATCH
STEPS = EVERY * EPOCHS
KILLS = 5
PAGED = 200  # steps; a checkpoint every 50


def shown(output, steps):
  """The steps that the progress bar showed."""
  return [int(n) for n in re.findall(rf"(\d+)/{steps}\b", output)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """stories260K, or a random model where it is absent."""
  try:
    return support.PROVIDERS["stories"]()
  except support.Absent:
    if "stories" in support.required():
      raise
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Rows that differ, so their order shows; no two fit into one packed row."""
  file = tmp_path_factory.mktemp("data") / "data.jsonl"
  words = ("cat", "dog", "bird", "tree", "ball", "girl")
  text = lambda i: " ".join(f"The {words[(i + j) % 6]} saw {i}." for j in range(6 + i % 3))
  rows = [{"prompt": "Once upon a time.", "completion": f" {text(i)}"} for i in range(ROWS)]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return file


@pytest.fixture(scope="module")
def argv(model, data):
  """Arguments without --out."""
  options = {"model": model, "train": data, "eval": data, "batch": BATCH, "epochs": EPOCHS}
  options |= {"task": "lm", "length": 64, "lr": 0.01, "set": "dropout=0.1"}  # keys matter
  flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
  return flags


def start(argv, out, cache, *flags):
  """The job as a process that shows its progress bar."""
  environment = os.environ | {
    **{"PYTHONPATH": str(support.REPOSITORY), "JAX_PLATFORMS": "cpu"},
    **{"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "TERM": "xterm", "COLUMNS": "160"},
    # The programs are the same each time.
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
    [sys.executable, "experiments/finetune.py", *argv, "--out", str(out), *flags],
    cwd=support.REPOSITORY,
    env=environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def finish(job, steps=STEPS):
  """Waits for the job; returns the first step it showed."""
  output = job.communicate(timeout=300)[0].decode()
  assert job.returncode == 0, output[-4000:]
  return shown(output, steps)[0]


def kill(job, step, delay, steps=STEPS):
  """Kills the job `delay` seconds after it showed `step`; the first and last step it showed."""
  output = ""
  while not (seen := shown(output, steps)) or seen[-1] < step:
    chunk = os.read(job.stdout.fileno(), 1 << 16).decode(errors="replace")
    assert chunk, f"the job ended before step {step}:\n{output[-4000:]}"
    output += chunk
  time.sleep(delay)
  job.send_signal(signal.SIGKILL)
  job.communicate()
  assert job.returncode == -signal.SIGKILL, f"the job was faster than the kill at step {step}"
  return seen[0], seen[-1]


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_five_kills_change_no_bit(argv, tmp_path):
  whole, out, cache = (tmp_path / name for name in ("whole", "out", "cache"))
  assert finish(start(argv, whole, cache)) == 0
  report = json.loads((whole / "report.json").read_text())
  assert report["steps"] == STEPS and len({loss for _, loss in report["loss"]}) > STEPS // 2

  seed = random.SystemRandom().getrandbits(32)
  print(f"seed {seed}")
  rng = random.Random(seed)
  starts, last = [], 0
  for step in sorted(rng.sample(range(1, STEPS - EVERY), KILLS)):
    first, latest = kill(start(argv, out, cache, "--resume"), step, rng.uniform(0, 0.2))
    assert first == last
    starts.append(first)
    saves = sorted(path.name for path in (out / "checkpoints").glob("*"))
    last = max((int(name) for name in saves if name.isdigit()), default=0)
    print(f"from {first}, meant to die at {step}, died at {latest} or later; left {saves}")
    assert not (out / "report.json").exists()
  assert finish(start(argv, out, cache, "--resume")) == last
  assert max(starts) > 0 and last > 0  # they went on, and did not start again

  resumed = json.loads((out / "report.json").read_text())
  assert resumed["loss"] == report["loss"]
  assert resumed["scores"] == report["scores"]
  assert files(out / "adapter") == files(whole / "adapter")


def test_paged_and_killed_after_two_hundred_steps(data, tmp_path):
  """Unpaged; paged; paged and killed twice: the same parameters, bit by bit."""
  model = tmp_path / "llama"
  # 256 x 400 numbers are over the 100,000 from which on state is paged; the others are under it.
  tiny.save_llama(model, hidden_size=256, intermediate_size=400, num_hidden_layers=1)
  options = {"model": model, "train": data, "eval": data, "batch": 2, "steps": PAGED}
  options |= {"task": "lm", "length": 32, "lr": 0.001, "method": "full"}
  argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
  runs = {name: tmp_path / name for name in ("unpaged", "paged", "killed")}
  cache = tmp_path / "cache"
  assert finish(start(argv, runs["unpaged"], cache), PAGED) == 0
  argv.append("--paged")
  assert finish(start(argv, runs["paged"], cache), PAGED) == 0
  for step, before in ((70, 0), (130, 50)):
    first, _ = kill(start(argv, runs["killed"], cache, "--resume"), step, 0.05, PAGED)
    assert first >= before
  assert finish(start(argv, runs["killed"], cache, "--resume"), PAGED) >= 100
  reports = [json.loads((run / "report.json").read_text()) for run in runs.values()]
  assert all(report["steps"] == PAGED for report in reports)
  assert all(report["loss"] == reports[0]["loss"] for report in reports)
  assert reports[0]["loss"][-1][1] < 0.5 * reports[0]["loss"][0][1]
  assert files(runs["unpaged"] / "adapter") == files(runs["paged"] / "adapter")
  assert files(runs["unpaged"] / "adapter") == files(runs["killed"] / "adapter")
