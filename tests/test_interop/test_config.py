"""PEFT's rules for naming modules and ranks, as its own code has them."""

import pathlib

import pytest

from pelt_jax.interop._peft_lora_config import Config
from pelt_jax.interop._places import Place

Q1 = "model.layers.1.self_attn.q_proj"


def config(**fields):
  raw = {"peft_type": "LORA", "r": 8, "lora_alpha": 6, **fields}
  return Config(raw, pathlib.Path("adapter_config.json"), strict=True)


@pytest.mark.parametrize(
  ("pattern", "path", "hit"),
  [
    ("q_proj", Q1, True),
    (".*proj", Q1, True),
    (r"layers\.[01]\..*", Q1, True),
    ("^" + Q1, Q1, True),
    ("layers.1", Q1, False),  # not at the end
    ("proj", Q1, False),  # a dot must come before
    ("layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", False),
    ("layersX1.self_attn.q_proj", Q1, False),
    ("layers.1.self_attn.q_proj", "model.layersX1.self_attn.q_proj", True),  # a regex dot
  ],
)
def test_rank_patterns(pattern, path, hit):
  assert config(rank_pattern={pattern: 4}).rank(path) == (4 if hit else 8)


def test_the_first_pattern_in_order_counts_and_alpha_is_looked_up_apart():
  read = config(rank_pattern={".*proj": 4, "q_proj": 2}, alpha_pattern={"q_proj": 10})
  assert (read.rank(Q1), read.scaling(Q1)) == (4, 2.5)
  assert config(rank_pattern={"q_proj": 4}, use_rslora=True).scaling(Q1) == 3.0


@pytest.mark.parametrize(
  ("fields", "hit"),
  [
    (dict(target_modules=["q_proj"]), True),
    (dict(target_modules=["self_attn.q_proj"]), True),
    (dict(target_modules=["proj"]), False),
    (dict(target_modules=[r".*q_proj"]), False),  # a list holds names, no expressions
    (dict(target_modules=r".*q_proj"), True),
    (dict(target_modules=r".*q_pro"), False),  # all of the name
    (dict(target_modules="q_proj"), False),
    (dict(target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"]), False),
    (dict(target_modules=["q_proj"], modules_to_save=["self_attn"]), False),
    (dict(target_modules=["q_proj"], layers_to_transform=1), True),
    (dict(target_modules=["q_proj"], layers_to_transform=[0, 2]), False),
    (dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="blocks"), False),
    (dict(target_modules=[Q1], layers_to_transform=[0]), True),  # a whole name is always meant
    (dict(target_modules="all-linear"), True),
  ],
)
def test_targets(fields, hit):
  place = Place(Q1.replace(".", "/") + "/kernel", None, Q1, "weight", (4, 4))
  assert config(**fields).targets(place) == hit
