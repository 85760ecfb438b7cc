"""Properties of the package and the suite as a whole."""

import inspect
import subprocess
import sys

import pytest

import pelt_jax
from tests.support import REPOSITORY


def test_import_starts_no_backend():
  # Starting one reserves the accelerator and freezes the number of devices.
  code = """
import jax._src.xla_bridge as bridge
import pelt_jax
assert not bridge.backends_are_initialized()
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(n for n in dir(pelt_jax) if not n.startswith("_")))
def test_public_names_are_documented(name):
  value = getattr(pelt_jax, name)
  if inspect.ismodule(value) and not value.__name__.startswith("pelt_jax"):
    return  # put there by the import hook that checks annotations
  assert inspect.getdoc(value), f"pelt_jax.{name} has no docstring"


def test_tests_skip_only_through_require():
  # Any other skip could not be turned into a failure by PELT_JAX_REQUIRE.
  here = {REPOSITORY / "tests" / name for name in ("support.py", "test_hygiene.py")}
  forbidden = ("importorskip", "pytest.skip(", "mark.skip")
  for path in sorted((REPOSITORY / "tests").rglob("*.py")):
    if path not in here:
      found = [word for word in forbidden if word in path.read_text(encoding="utf-8")]
      assert not found, f"{path.relative_to(REPOSITORY)} has {found}: use require()"
