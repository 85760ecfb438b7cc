"""Ids that a model knows: what would else run as NaN, or as token 0."""

from collections.abc import Iterator
from typing import Any

from pelt_jax.methods._prompt_tuning import virtual_tokens


def models_of(apply: Any) -> Iterator[Any]:
  """The module whose method `apply` is, or wraps."""
  while apply is not None:
    if (model := getattr(apply, "__self__", None)) is not None:
      yield model
    apply = getattr(apply, "__wrapped__", None)


def check_ids(apply: Any, params: Any, highest: int) -> None:
  """Raises where the largest id is past the vocabulary and the prompt that params hold.

  Nothing is checked of a model that states no `config.vocab_size`.
  """
  configs = (getattr(model, "config", None) for model in models_of(apply))
  size = next((n for c in configs if (n := getattr(c, "vocab_size", None))), None)
  if size is None or highest < size:
    return
  virtual = virtual_tokens(params)
  if highest not in virtual:
    holds = f"a prompt of {len(virtual)} virtual tokens" if virtual else "no prompt"
    raise ValueError(
      f"input_ids hold {highest}, but the vocabulary ends at {size - 1} and params hold {holds}. "
      "Virtual tokens need the params of their prompt; other ids come from another tokenizer"
    )
