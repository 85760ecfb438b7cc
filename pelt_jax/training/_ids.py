"""Ids and positions that a model knows: what would else run as NaN, or as token 0."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.core import Tracer

from pelt_jax._walk import every_node, walk
from pelt_jax.methods._prompt_tuning import virtual_tokens
from pelt_jax.nodes import Shift


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


def learned_positions(apply: Any) -> int | None:
  """How many positions the model has learned; None where that is no limit, or not known."""
  limits = (getattr(model, "learned_positions", None) for model in models_of(apply))
  return next((n for n in limits if n is not None), None)


def positions_taken(params: Any, rows: Any = None) -> int:
  """How many positions later than usual the tokens stand, because of prefixes.

  Args:
    params: With or without prefixes.
    rows: Which members of a bank are asked; all by default.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> positions_taken({"positions": {"bypass": pelt.nodes.Shift(jnp.float32(20))}})
    20
  """

  def most(node: Shift) -> int:
    by = node.array("by")
    if isinstance(by, Tracer):  # inside a program of the caller's: not known here
      return 0
    by = np.asarray(by)
    return int((by[..., np.asarray(rows)] if node.banked and rows is not None else by).max())

  shifts = ([most(n) for n in every_node(v) if isinstance(n, Shift)] for _, v in walk(params))
  return max(map(sum, shifts), default=0)


def check_rows(apply: Any, params: Any, longest: int) -> None:
  """Raises where rows of `longest` tokens run past the learned positions."""
  limit, taken = learned_positions(apply), positions_taken(params)
  if limit is not None and longest > limit - taken:
    prefix = f", of which a prefix takes {taken}" if taken else ""
    raise ValueError(
      f"rows of {longest} tokens, but the model has learned {limit} positions{prefix}: encode with "
      f"length={max(limit - taken, 0)}, or shorten the prefix"
    )
