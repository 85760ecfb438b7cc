"""The Python blocks of docs/ run, on four devices and again on two, where the first stopped."""

import re
import textwrap

import pytest

from tests.support import REPOSITORY, on_devices
from tests.test_training import tiny

PAGE = (REPOSITORY / "docs" / "distributed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BEFORE = """
import os, jax
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")
os.chdir({here!r})
folder = {folder!r}
rows = lambda i: {{"input_ids": jax.random.randint(jax.random.key(0), (8, 16), 0, 259)}}
"""
AFTER = """
# float32 keeps a loss of 5.5 to 5e-7
assert start == {start} and len(losses) == 20 - start
assert start or losses[-1] < losses[0] - 0.1, losses
assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(frozen))
print(losses[-1])
"""


@pytest.mark.parity
def test_a_script_of_ones_own(tmp_path):
  folder = tmp_path / "llama"
  folder.mkdir()
  tiny.save_llama(folder, hidden_size=32)
  code = BEFORE.format(here=str(tmp_path), folder=str(folder)) + "\n".join(BLOCKS)
  first = on_devices(code + AFTER.format(start=0), devices=4)
  (tmp_path / "checkpoints" / "20").rename(tmp_path / "lost")
  again = on_devices(code + AFTER.format(start=10), devices=2)
  assert float(again) == pytest.approx(float(first), rel=1e-5)
  assert (tmp_path / "adapter" / "adapter.json").exists()


def test_blocks_are_found():
  assert len(BLOCKS) == 1 and textwrap.dedent(BLOCKS[0]) == BLOCKS[0]
