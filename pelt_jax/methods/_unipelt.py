"""UniPELT: gated LoRA, prefixes and adapters together (arXiv:2110.07577)."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._site import Site
from pelt_jax._transform import Transform
from pelt_jax.methods._adapter import adapter
from pelt_jax.methods._gates import drawn_gate, rewrapped
from pelt_jax.methods._lora import lora
from pelt_jax.methods._prefix_tuning import prefix_tuning
from pelt_jax.nodes import (
  FusedLora,
  Gated,
  LoraWeight,
)

POOLS = ("mean", "mean_all", "token")
PARTS = ("lora", "prefix", "adapter")


def unipelt(
  length: int = 10,
  *,
  rank: int = 8,
  bottleneck: int | Mapping[int, int] | None = None,
  reduction: int | None = None,
  hidden: int = 512,
  reparametrize: bool = True,
  parts: Iterable[str] = PARTS,
  gate_pool: str = "mean",
  fused: tuple[tuple[int, ...], int] | None = None,
  dropout: float = 0.0,
  layers: Iterable[int] | None = None,
  shift_positions: bool = False,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains three methods and, layer by layer, gates that say how much each of them acts.

  With one gate sigmoid(x w + b), averaged over the row's tokens, per layer and part:

  - LoRA on query and value, each with its own gate on its input, in place of alpha / rank:
    x W + G x A B.
  - A prefix whose keys and values are scaled by a gate on the attention's input. At G = 0 it still
    takes its share of the softmax.
  - A Pfeiffer adapter, h + G u(z) with a gate on what it reads.

  On BERT-base 894,528 + 184,320 (294,912 for LoRA) and 36,912 numbers of gates are stored. Gates
  come out by `record="gates"`, one per row and layer.

  The released code averages over padding too: `gate_pool="mean_all"`, for parity. A mean over the
  row shows a causal model what comes later. There `"mean"` is an error, `"mean_all"` one in
  generation, and `gate_pool="token"` gives every token its own gates and the prefix, which belongs
  to no token, a number per layer that trains from 0.5.

  Args:
    length: keys and values of each prefix.
    rank: of the LoRAs.
    bottleneck: as for `adapter`.
    reduction: as for `adapter`, 16 by default.
    hidden: width of the prefix's MLP.
    reparametrize: whether an MLP makes the prefix in training.
    parts: which of `"lora"`, `"prefix"` and `"adapter"`; the paper's AP leaves LoRA out.
    gate_pool: `"mean"` over real tokens, `"mean_all"` over all, or `"token"`.
    fused: as for `lora`, where query and value are parts of one projection (GPT-2: `((0, 2), 3)`).
    dropout: of LoRA's inputs and the adapter's activations.
    layers: layer numbers to keep; all by default.
    shift_positions: as for `prefix_tuning`; the released code does not shift.
    dtype: dtype of the arrays.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, as the three methods.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.unipelt(), pelt.train("head"))
  """
  parts = tuple(parts)
  if not parts or any(p not in PARTS for p in parts) or len(set(parts)) < len(parts):
    raise ValueError(f"parts must be some of {PARTS}, each once; got {parts}")
  if gate_pool not in POOLS:
    raise ValueError(f"gate_pool must be one of {POOLS}, got {gate_pool!r}")
  common = {"layers": layers, "dtype": dtype, "group": group}
  made = {
    "lora": lora(rank, rank, targets=("query", "value"), dropout=dropout, fused=fused, **common),
    "prefix": prefix_tuning(
      length, reparametrize=reparametrize, hidden=hidden, shift_positions=shift_positions, **common
    ),
    "adapter": adapter(
      "pfeiffer", bottleneck=bottleneck, reduction=reduction, dropout=dropout, **common
    ),
  }

  def gate(key: jax.Array, path: str, like: jax.Array, stacked: int, width: int, gates: int = 1):
    return drawn_gate(
      key,
      path,
      like,
      width,
      gates,
      mask="attention_mask" if gate_pool == "mean" else None,
      pool="token" if gate_pool == "token" else "mean",
      group=group,
      stacked=stacked,
    )

  def gated_lora(key: jax.Array, path: str, node: Any, sites: Mapping[str, Site]) -> Any:
    a = node.array("a")
    if isinstance(node, LoraWeight) and node.axes != "io:ir,ro":
      raise ValueError(f"unipelt: {path!r} is no plain (in, out) matrix, which its gate would need")
    gates = len(node.chosen) if isinstance(node, FusedLora) else 1
    return node.replace(scaling=gate(key, path, a, node.stacked, a.shape[-2], gates))

  def gated_prefix(key: jax.Array, path: str, node: Any, sites: Mapping[str, Site]) -> Any:
    core = sites[path]
    kind = jnp.dtype(dtype or core.dtype)
    if gate_pool == "token":
      return node.replace(gate=jnp.full(core.stacked, 0.5, kind))
    around = sites.get(core.parent)
    if around is None or not around.shape:
      raise ValueError(f"unipelt: the prefix's gate at {path!r} has no attention module to read")
    like = jnp.zeros(core.stacked, kind)
    return node.replace(gate=gate(key, path, like, node.stacked, around.shape[-1]))

  def gated_adapter(key: jax.Array, path: str, node: Any, sites: Mapping[str, Site]) -> Any:
    down = node.branch.array("down")
    new = gate(key, path, down, node.stacked, down.shape[-2])
    inside = Gated(new, node.branch, group=group, stacked=node.stacked)
    return node.replace(branch=inside)

  gated = {"lora": gated_lora, "prefix": gated_prefix, "adapter": gated_adapter}

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    for part in parts:
      before, params = params, made[part].init(key, params, sites)
      kind = "leaf" if part == "lora" else "call"
      known = {s.path: s for s in sites if s.kind == kind}
      wrap = lambda path, node, f=gated[part], known=known: f(key, path, node, known)
      params = rewrapped(before, params, wrap)
    return params

  return Transform(initialize)
