import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax.models import _load
from tests.test_models.helpers import built, close, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llama")
  models.save_pretrained(folder, *built("llama", "lm"))
  return folder


METHOD = pelt.chain(pelt.lora(rank=2, targets=("query", "value")), pelt.train("head"))


def test_equals_init_on_the_loaded_tree(folder):
  model, base = models.from_pretrained(folder)
  want = METHOD.init(jax.random.key(5), base, pelt.sites(model, tokens(1, 2)))
  _, got = models.from_pretrained(folder, transform=METHOD, key=jax.random.key(5))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_scanned_layers_are_the_looped_ones_stacked(folder):
  key = jax.random.key(5)
  _, looped = models.from_pretrained(folder, transform=METHOD, key=key)
  model, got = models.from_pretrained(folder, transform=METHOD, key=key, scan=True)
  want = models.to_scanned(looped)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  node = got["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
  assert node.stacked == 1 and (node.a[0] != node.a[1]).any()  # a key per layer
  plain = models.from_pretrained(folder, scan=True)[1]
  ids = tokens(1, 5)
  out = pelt.bypass(model.apply)({"params": got}, ids)
  close(out, model.apply({"params": plain}, ids), 1e-6)


def test_one_tensor_at_a_time(folder, monkeypatch):
  """A path's value reads its own tensor only, once, and nothing is kept."""
  reads = []
  reader = _load._tensor

  def counting(entry, *args):
    read = reader(entry, *args)
    return lambda: reads.append(entry.offset) or read()

  monkeypatch.setattr(_load, "_tensor", counting)
  half = pelt.Transform(
    lambda key, params, sites: jax.tree.map(lambda x: (x * 0.5).astype(jnp.bfloat16), params)
  )
  _, got = models.from_pretrained(folder, transform=half)
  assert len(reads) == len(set(reads)) == len(jax.tree.leaves(got))
  assert {str(x.dtype) for x in jax.tree.leaves(got)} == {"bfloat16"}


def test_a_transform_of_some_layers_needs_loops(folder):
  some = pelt.lora(rank=2, targets="query", layers=(0,))
  models.from_pretrained(folder, transform=some)
  with pytest.raises(ValueError, match="cannot be scanned"):
    models.from_pretrained(folder, transform=some, scan=True)
