"""Settings and fixtures of the whole suite."""

import functools
import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In the fast suite compiling takes most of the time, and half of that goes into XLA:CPU's fusion
# emitters. Later versions have no such flag, and an unknown one ends the process.
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") and importlib.metadata.version(
  "jaxlib"
).startswith("0.10."):
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] = flags.strip()

import jax  # after the choice of platform
import jaxtyping
import pytest
from jax._src.interpreters import mlir  # the public module has copies of the names

from tests import support

# Traced programs stay alive; walking through all of them again and again costs 15 % of the time.
gc.set_threshold(100_000, 50, 50)

# JAX makes an MLIR context for each program and keeps it as long as the program, and each one makes
# the next one slower: over the suite, a third of the time and most of the memory. One serves all.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# Silent promotion of dtypes or ranks hides mistakes that only show in bfloat16 or on odd shapes.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotations of the package's functions are checked at run time, in tests only. Must come before
# the first import of pelt_jax.
jaxtyping.install_import_hook("pelt_jax", "tests.support.checked")


# Linux lets a process map memory 65,530 times, and programs take three maps each and more: past
# that, the next one ends the process.
_MAPS, _MOST_MAPS = pathlib.Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="module", autouse=True)
def forgotten():
  """Forgets compiled programs after a module, once there are very many."""
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
    jax.clear_caches()


collect_ignore = ["test_interop/make_values.py", "test_interop/make_hub_values.py"]  # need torch


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """The folder of real data sets beside the repository."""
  return support.require("shared")


@pytest.fixture(scope="session")
def stories() -> pathlib.Path:
  """Hugging Face folder of stories260K, a real pretrained Llama small enough for fast tests."""
  return support.require("stories")


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
  """Hugging Face folder of all-MiniLM-L6-v2, a real pretrained BERT encoder."""
  return support.require("minilm")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
  """Hugging Face folder of SmolLM2-135M-Instruct, a real pretrained decoder; made on first use."""
  return support.require("smollm2")


def pytest_configure(config: pytest.Config) -> None:
  support.required()  # a misspelt name in PELT_JAX_REQUIRE must not weaken the run silently


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
  """A run in which every test was skipped did not test anything: it is not a success."""
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  is_worker = hasattr(session.config, "workerinput")
  if is_worker or reporter is None or exitstatus != pytest.ExitCode.OK:
    return
  if not session.config.option.collectonly and not reporter.stats.get("passed"):
    session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
