"""Prompt tuning: virtual tokens in front of the input (arXiv:2104.08691)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import table_rows
from pelt_jax._node import GENERATORS, Weight, strip
from pelt_jax._site import Site, Targets, find
from pelt_jax._transform import Transform, check_whole, like_box, over, require, site_key
from pelt_jax._tree import fold
from pelt_jax._walk import every_node, update_at
from pelt_jax.methods._lora import _numbers
from pelt_jax.nodes import BankWeight, ExtendedEmbedding

Init = str | jax.Array | np.ndarray
Tokens = Sequence[int] | Sequence[Sequence[int]]
INITS = ("uniform", "uniform_positive", "normal", "vocabulary", "text", "labels")


def prompt_tuning(
  length: int = 20,
  *,
  init: Init = "vocabulary",
  tokens: Tokens | None = None,
  vocabulary: int = 5000,
  targets: Targets = "embedding",
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains P virtual tokens, X' = [P_e; E(x)]: P d parameters, the model stays as it is.

  The virtual tokens are the ids V, ..., V + P - 1 past the vocabulary (`virtual_tokens`); the data
  puts them where they belong, in front of the text in the paper. Positions, masks, caches and tied
  heads treat them as tokens. The paper's prompts have 100 tokens and start from class labels; it
  finds little gain past 20, which is the default here.

  Args:
    length: P, how many virtual tokens.
    init: `"uniform"`: U(-0.5, 0.5), as in the paper; `"uniform_positive"`: U(0, 0.5), what its
      released code draws; `"normal"`: N(0, 1), as PEFT; `"vocabulary"`: rows of the table, drawn
      from the first `vocabulary`, without replacement unless those are fewer than P; `"text"`: the
      rows of `tokens`, from the start again where they are fewer than P; `"labels"`: one row per
      class, the mean over its tokens, the remaining ones as `"vocabulary"`; or an array (P, d),
      such as the prompt trained for another task (`prompt_of`).
    tokens: ids of a text (`"text"`), or per class its ids (`"labels"`).
    vocabulary: how many rows of the table, the most frequent in most vocabularies, to draw from.
    targets: the role or path of the token table.
    dtype: dtype of the prompt; by default the table's, float32 over a quantized one.
    group: label of the prompt; None freezes it.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if the target is not one table that looks up tokens, if
      it holds a prompt already, if `tokens` are more than P or not in the table, or an array `init`
      has another width.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, ids = nn.Embed(7, 4), jnp.array([[1, 2]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> method = pelt.prompt_tuning(3, targets="embedding")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, ids))
    >>> pelt.virtual_tokens(params)
    range(7, 10)
    >>> pelt.bypass(model.apply)({"params": params}, jnp.array([[7, 8, 9, 1]])).shape
    (1, 4, 4)
  """
  draw = start_of(length, init, tokens, vocabulary)

  def extended(table: Any, key: jax.Array) -> ExtendedEmbedding:
    prompt = draw(key, table, _numbers(table, dtype)[0])
    return ExtendedEmbedding(table, like_box(table, prompt, (None, None)), group=group)

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    site = token_table(sites, targets, "prompt_tuning")
    return place_prompt("prompt_tuning", key, params, site, extended)

  return Transform(initialize)


def virtual_tokens(params: dict) -> range:
  """The ids past the vocabulary that the prompt in params serves; empty without one.

  Raises:
    ValueError: if tables of several sizes hold prompts.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> pelt.virtual_tokens({"embedding": jnp.zeros((7, 4))})
    range(0, 0)
  """
  if GENERATORS in params:
    params = jax.eval_shape(fold, params)
  prompts = (
    (node.members if isinstance(node, BankWeight) else node, node.shape[-2])
    for node in every_node(params)
    if isinstance(node, BankWeight | ExtendedEmbedding) and node.base is not None
  )
  found = {
    range(size, size + prompt.array("prompt").shape[-2])
    for prompt, size in prompts
    if isinstance(prompt, ExtendedEmbedding) and prompt.prompt is not None
  }
  if len(found) > 1:
    raise ValueError(f"several tables hold prompts: {sorted(found, key=repr)}")
  return next(iter(found), range(0))


def prompt_of(params: dict) -> jax.Array:
  """The virtual tokens' embeddings (P, d), for `init`: where another task's prompt begins.

  Raises:
    ValueError: if params hold no prompt, several, or a bank of them.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> table = pelt.nodes.ExtendedEmbedding(jnp.zeros((7, 4)), jnp.ones((3, 4)))
    >>> pelt.prompt_of({"embedding": table}).shape
    (3, 4)
  """
  found = [n for n in every_node(fold(params)) if isinstance(n, ExtendedEmbedding)]
  if len(found) != 1 or found[0].base is None:
    what = f"{len(found)} prompts" if len(found) != 1 else "a bank of prompts"
    raise ValueError(f"params hold {what}; expected the one that prompt_tuning or p_tuning adds")
  return found[0].array("prompt")


def token_table(sites: tuple[Site, ...], targets: Targets, method: str) -> Site:
  """The one table that looks up tokens.

  Raises:
    ValueError: if there is none, or several.
  """
  found = [t.site for t in find(sites, targets, kind="leaf") if "lookup" in t.site.equations]
  if len(found) != 1:
    raise ValueError(
      f"{method} needs the one table that looks up tokens; {targets!r} names "
      f"{[s.path for s in found] or 'none'}. Give its path as targets"
    )
  return found[0]


def place_prompt(
  method: str,
  key: jax.Array,
  params: dict,
  site: Site,
  make: Callable[[Any, jax.Array], ExtendedEmbedding],
) -> dict:
  """Params with `make(table, key)` in place of the table.

  Raises:
    ValueError: if the table holds a prompt already.
  """
  leaf = require(params, site)
  if any(isinstance(n, ExtendedEmbedding) for n in every_node(leaf)):
    raise ValueError(f"{method}: {site.path!r} holds a prompt already; use pelt.bank")
  drawn = site_key(key, site.path, leaf)
  return update_at(params, {site.path: over(leaf, lambda table: make(table, drawn))})


def start_of(
  length: int, init: Init, tokens: Tokens | None, vocabulary: int
) -> Callable[[jax.Array, Any, Any], jax.Array]:
  """`draw(key, table, dtype)`, the rows (P, d) that a prompt starts from.

  Raises:
    ValueError: for a bad option, and in `draw` if the table has no such rows or another width.
  """
  check_whole(length=length)
  if not isinstance(init, str):
    return _given(length, init, tokens)
  if init not in INITS:
    raise ValueError(f"init must be one of {INITS}, or an array (P, d); got {init!r}")
  if (tokens is not None) != (init in ("text", "labels")):
    raise ValueError(f"tokens go with init='text' or init='labels': init={init!r}, {tokens=}")
  if vocabulary < 1:
    raise ValueError(f"vocabulary must be at least 1, got {vocabulary!r}")
  groups = None if tokens is None else _groups(tokens, init)
  if groups is not None and len(groups) > length:
    raise ValueError(
      f"tokens: {len(groups)} {'classes' if init == 'labels' else 'tokens'} do not fit a prompt of "
      f"length={length}; raise length to {len(groups)}"
    )

  def draw(key: jax.Array, table: Any, dtype: Any) -> jax.Array:
    rows, width = _table_shape(table)
    outside = [i for g in groups or () for i in g if not 0 <= i < rows]
    if outside:
      raise ValueError(f"tokens: {outside[:5]} are no ids of a table with {rows} rows")
    return _drawn(key, table, groups, length, width, init, min(vocabulary, rows), dtype)

  return draw


def _given(
  length: int, init: Any, tokens: Tokens | None
) -> Callable[[jax.Array, Any, Any], jax.Array]:
  shape = tuple(init.shape)
  if len(shape) != 2 or shape[0] != length:
    raise ValueError(f"init has shape {shape}, expected (P, d) with P = {length=}")
  if tokens is not None:
    raise ValueError(f"tokens go with init='text' or init='labels': init is an array, {tokens=}")

  def draw(key: jax.Array, table: Any, dtype: Any) -> jax.Array:
    width = _table_shape(table)[1]
    if shape[1] != width:
      raise ValueError(f"init has rows of {shape[1]} numbers, the table has rows of {width}")
    return jnp.asarray(init, dtype)

  return draw


def _table_shape(table: Any) -> tuple[int, ...]:
  return tuple(table.shape if isinstance(table, Weight) else strip(table).shape)


def _groups(tokens: Sequence, init: str) -> list[list[int]]:
  nested = [isinstance(t, Sequence) for t in tokens]
  whole = lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool)
  groups = [list(t) if isinstance(t, Sequence) else [t] for t in tokens]
  if not groups or any(nested) != (init == "labels") or (any(nested) and not all(nested)):
    shape = "a list of ids per class" if init == "labels" else "a list of ids"
    raise ValueError(f"tokens must be {shape} for init={init!r}, got {tokens!r}")
  if not all(g and all(map(whole, g)) for g in groups):
    raise ValueError(f"tokens must be whole numbers, at least one each, got {tokens!r}")
  return [[int(i) for i in g] for g in groups]


def _drawn(key, table, groups, length, width, init, pool, dtype) -> jax.Array:
  if init in ("uniform", "uniform_positive"):
    return jax.random.uniform(key, (length, width), dtype, -0.5 if init == "uniform" else 0.0, 0.5)
  if init == "normal":
    return jax.random.normal(key, (length, width), dtype)
  if init == "text":
    ids = np.resize([g[0] for g in groups], length)
    return jnp.asarray(table_rows(table, jnp.asarray(ids, jnp.int32)), dtype)
  wide = np.promote_types(dtype, jnp.float32)
  means = [
    jnp.mean(jnp.asarray(table_rows(table, jnp.asarray(g, jnp.int32)), wide), axis=0)
    for g in groups or ()
  ]
  left = length - len(means)
  ids = jax.random.choice(key, pool, (left,), replace=left > pool)
  rows = table_rows(table, jnp.asarray(ids, jnp.int32))
  return jnp.concatenate([*(jnp.asarray(m, dtype)[None] for m in means), jnp.asarray(rows, dtype)])
