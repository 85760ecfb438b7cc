"""A process told to keep freed memory does not fault it in again."""

import os
import subprocess
import sys

import pytest

from pelt_jax import training
from tests.support import REPOSITORY, require

STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from pelt_jax import training
if sys.argv[1] == "keep":
  assert training.keep_freed_memory()
f = jax.jit(lambda x: jnp.max(x @ x.T))  # 100 MB between the two
x = jnp.ones((5000, 8))
f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str, **environment: str) -> str:
  env = {k: v for k, v in os.environ.items() if not k.startswith(("GLIBC_", "MALLOC_"))}
  env |= {"JAX_PLATFORMS": "cpu", **environment}
  command = [sys.executable, "-c", STEPS, how]
  done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
  return done.stdout or done.stderr


def test_a_steps_memory_is_faulted_in_once():
  require("glibc")
  kept, freed = int(run("keep")), int(run("free"))
  assert freed > 3 * 100e6 / 65536  # pages may be larger than the usual 4096 bytes
  assert kept < 0.01 * freed


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_the_environments_wishes_stand(name, monkeypatch):
  monkeypatch.setenv(name, "")
  assert not training.keep_freed_memory()
