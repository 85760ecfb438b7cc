"""The README's Python blocks run in order, as one session, in an empty folder."""

import re

import jax
import numpy as np
import pytest

from tests.support import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
  """The names defined by the blocks, and the folder they wrote into."""
  folder = tmp_path_factory.mktemp("readme")
  names = {"__name__": "readme"}
  # Readers run with JAX's defaults, and optax's Adam needs them (a float to an integer power).
  with (
    pytest.MonkeyPatch.context() as patch,
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    patch.chdir(folder)
    for block in BLOCK.finditer(README):
      # Blank lines before the block make tracebacks show line numbers of the README.
      source = "\n" * README[: block.start(1)].count("\n") + block[1]
      exec(compile(source, str(REPOSITORY / "README.md"), "exec"), names)
  return names, folder


def test_every_fence_is_a_python_block():
  assert README.count("```") == 2 * len(BLOCK.findall(README)) > 0


def test_quickstart_learns_and_writes_its_files(session):
  names, folder = session
  batch, key = names["batch"], jax.random.key(0)
  before = names["loss_fn"](names["method"].init(key, names["base"], names["sites"]), batch, key)
  assert names["loss_fn"](names["params"], batch, key) < before
  for file in (
    "adapter",
    "merged/config.json",
    "merged/model.safetensors",
    "peft/adapter_config.json",
  ):
    assert (folder / file).exists(), file


def test_merged_folder_computes_what_the_adapter_does(session):
  names, folder = session
  ids, mask = names["batch"]["input_ids"], names["batch"]["attention_mask"]
  model, merged = names["pelt"].models.from_pretrained(
    folder / "merged", task="classification", num_labels=6
  )
  adapted = names["apply"]({"params": names["params"]}, ids, mask)
  plain = model.apply({"params": merged}, ids, mask)
  # Logits of order 1 after two layers of width 32 and 64: a few dozen roundings of 6e-8.
  np.testing.assert_allclose(plain, adapted, rtol=0, atol=1e-5)
