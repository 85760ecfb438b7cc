"""A model of Flax's examples, unmodified, whose params come in boxes with logical names."""

import pytest

from tests.support import on_devices, require

pytestmark = pytest.mark.parity
FOLDER = require("lm1b")


def test_lora_on_a_mesh_with_the_models_own_axes_and_rules():
  on_devices(f"from tests.test_foreign import lm1b\nlm1b.check({str(FOLDER)!r})")
