"""P-Tuning: virtual tokens made by an LSTM and an MLP (arXiv:2103.10385)."""

from typing import Any, Literal

import jax

from pelt_jax._node import GENERATORS
from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, chain, check_whole, like_box
from pelt_jax._walk import update_at
from pelt_jax.methods._lora import _numbers
from pelt_jax.methods._prompt_tuning import Init, Tokens, place_prompt, start_of, token_table
from pelt_jax.methods._train import train
from pelt_jax.nodes import ExtendedEmbedding, PromptEncoder
from pelt_jax.nodes._prompt_encoder import affine, lstm_cell

BACKBONE = "backbone"


def p_tuning(
  length: int = 9,
  *,
  encoder: Literal["lstm", "mlp", "none"] = "lstm",
  variant: Literal["paper", "peft"] = "paper",
  hidden: int | None = None,
  lstm_layers: int = 2,
  init: Init = "normal",
  tokens: Tokens | None = None,
  vocabulary: int = 5000,
  tune_backbone: bool = False,
  targets: Targets = "embedding",
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains n virtual tokens h = MLP([LSTM ->; LSTM <-](e)) with e (n, d); the model stays as it is.

  They stand anywhere in the input, in place of tokens: the ids V, ..., V + n - 1 past the
  vocabulary (`virtual_tokens`) go where a template has its slots, and positions count them. `fold`
  drops the encoder: n d numbers are left, a prompt as `prompt_tuning` trains it. Fold before
  serving.

  With H = `hidden` per direction, two LSTM layers and an MLP 2 H -> d -> d with a ReLU, n d +
  2 (4 H (d + H) + 8 H) + 2 (4 H (2 H + H) + 8 H) + 2 H d + d + d d + d numbers train. All start as
  in torch: e from N(0, 1), the LSTM's from U(-1/sqrt(H), 1/sqrt(H)), those of a map from m numbers
  from U(-1/sqrt(m), 1/sqrt(m)). The paper's dropout in the LSTM, 0 by default, is left out.

  The paper keeps the model frozen for knowledge probing (LAMA) and trains it jointly, at a rate of
  its own, for SuperGLUE. `tune_backbone=True` puts all free leaves of the model in the group
  `"backbone"`, a head too unless another method claimed it before, as in
  `pelt.chain(pelt.train("head"), pelt.p_tuning(tune_backbone=True))`. Rates by group:

      rates = {"trainable": optax.adamw(1e-3), "backbone": optax.adamw(1e-5)}
      tx = optax.multi_transform(rates | {"frozen": optax.set_to_zero()}, pelt.labels)

  Args:
    length: n; the paper's template has three slots of three tokens.
    encoder: `"lstm"`: LSTM, then MLP; `"mlp"`: the MLP alone; `"none"`: e as it is.
    variant: `"paper"`: the MLP has one hidden layer of width d; `"peft"`: as in PEFT and NeMo, the
      MLP after the LSTM is 2 H -> 2 H -> d, and alone d -> H -> H -> d.
    hidden: H; by default d / 2 for the paper's LSTM, as its code for LAMA has it (d in that for few
      shots), else d. In the paper's MLP alone it is the hidden layer's width.
    lstm_layers: layers of the LSTM.
    init: what e starts from, as for `prompt_tuning`: a name, or an array (n, d). What the encoder
      makes of it is another prompt; only `encoder="none"` starts from those rows themselves.
    tokens: ids for `init="text"` and `init="labels"`.
    vocabulary: how many rows of the table `init="vocabulary"` draws from.
    tune_backbone: whether the model trains too.
    targets: the role or path of the token table.
    dtype: dtype of the arrays; by default the table's, float32 over a quantized one.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, as `prompt_tuning`.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, ids = nn.Embed(7, 4), jnp.array([[1, 2]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> params = pelt.p_tuning(3).init(jax.random.key(1), params, pelt.sites(model, ids))
    >>> pelt.count(params).trainable, pelt.count(params).stored
    (308, 12)
    >>> virtual = pelt.virtual_tokens(params)
    >>> pelt.bypass(model.apply)({"params": params}, jnp.array([[7, 1, 8, 9]])).shape
    (1, 4, 4)
  """
  draw = start_of(length, init, tokens, vocabulary)
  if encoder not in ("lstm", "mlp", "none"):
    raise ValueError(f"encoder must be 'lstm', 'mlp' or 'none', got {encoder!r}")
  if variant not in ("paper", "peft"):
    raise ValueError(f"variant must be 'paper' or 'peft', got {variant!r}")
  if encoder == "none" and hidden is not None:
    raise ValueError(f"hidden is the width of an encoder: {encoder=}, {hidden=}")
  check_whole(hidden=1 if hidden is None else hidden, lstm_layers=lstm_layers)

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    site = token_table(sites, targets, "p_tuning")
    made: list[PromptEncoder] = []

    def extended(table: Any, key: jax.Array) -> ExtendedEmbedding:
      first, second = jax.random.split(key)
      kind = _numbers(table, dtype)[0]
      embedding = draw(first, table, kind)
      if encoder == "none":
        return ExtendedEmbedding(table, like_box(table, embedding, (None, None)), group=group)
      made.append(_encoder(second, embedding, site.path))
      return ExtendedEmbedding(table, None, group=group)

    params = place_prompt("p_tuning", key, params, site, extended)
    for generator in made:
      number = len(params.get(GENERATORS, {}))
      params = update_at(params, {f"{GENERATORS}/{number:03d}_prompt": generator})
    return params

  def _encoder(key: jax.Array, embedding: jax.Array, site: str) -> PromptEncoder:
    d, kind = embedding.shape[1], embedding.dtype
    lstm, paper = encoder == "lstm", variant == "paper"
    width = hidden or (max(d // 2, 1) if lstm and paper else d)
    first, second, third = jax.random.split(key, 3)

    def cells(key: jax.Array) -> tuple:
      sizes = (d, *(2 * width,) * (lstm_layers - 1)) if lstm else ()
      keys = jax.random.split(key, lstm_layers)
      return tuple(lstm_cell(k, n, width, kind, group) for k, n in zip(keys, sizes, strict=False))

    if lstm:
      sizes = (2 * width, d if paper else 2 * width, d)
    else:
      sizes = (d, width, d) if paper else (d, width, width, d)
    keys = jax.random.split(third, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    mlp = tuple(affine(k, n_in, n_out, kind, group) for k, n_in, n_out in pairs)
    return PromptEncoder(embedding, cells(first), cells(second), mlp, site=site, group=group)

  method = Transform(initialize)
  return chain(method, train("*", group=BACKBONE)) if tune_backbone else method
