"""LoRA+: b learns faster than a (arXiv:2402.12354)."""

import functools
import inspect
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax
from jax.core import Tracer

from pelt_jax._node import Node
from pelt_jax._walk import map_nodes, update_at, walk
from pelt_jax.methods._lora import B_GROUP, EMBEDDING_GROUP
from pelt_jax.nodes import Tuned

_REST, _VECTORS, _FROZEN = "trainable", "vectors", "frozen"


def lora_plus(
  optimizer: Any,
  learning_rate: Any,
  *,
  ratio: float,
  embedding_rate: float = 1e-6,
  weight_decay: float = 0.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer of params made with `plus=True` in which b learns at `ratio` times a's rate.

  Four groups, as PEFT makes them, each with an optimizer of its own:

  | what | rate | weight decay |
  |---|---|---|
  | a, and other leaves of two axes or more (a head's kernel) | `learning_rate` | `weight_decay` |
  | both factors of a table | `embedding_rate` | `weight_decay` |
  | b, and DoRA's magnitudes | ratio * `learning_rate` | `weight_decay` |
  | biases, norms, all else that is a vector | ratio * `learning_rate` | none |

  PEFT decays scales of RMS norms, which are none of its "layer norms"; here no vector decays but
  magnitudes. For groups of one's own, `optax.multi_transform` with `pelt.labels`: there b is
  `"lora_b"`, a table's factors are `"lora_embedding"`.

  Args:
    optimizer: such as `optax.adamw`, called with `learning_rate` and the options.
    learning_rate: a's, a number or a schedule.
    ratio: at least 1; the paper suggests about 16, with a rate a little lower than LoRA's.
    embedding_rate: of tables.
    weight_decay: for an optimizer that has this option.
    **options: of the optimizer.

  Returns:
    A transformation of params, or of what `pelt.partition` says trains.

  Raises:
    TypeError: if the optimizer is already made.
    ValueError: for a bad rate or ratio, or a decay that the optimizer does not know; at init, if
      nothing is labelled `"lora_b"`.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, pelt_jax as pelt
    >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((1, 2))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lora(rank=1, targets="kernel", plus=True)
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> trainable, frozen = pelt.partition(params)
    >>> tx = pelt.lora_plus(optax.sgd, 0.5, ratio=16)
    >>> grads = jax.tree.map(jnp.ones_like, trainable)
    >>> updates, _ = tx.update(grads, tx.init(trainable), trainable)
    >>> updates["kernel"].a.tolist(), updates["kernel"].b.tolist()
    ([[-0.5], [-0.5]], [[-8.0, -8.0]])
  """
  if not callable(optimizer):
    raise TypeError(
      f"optimizer must be what makes one, such as optax.adamw, got {type(optimizer).__name__}: "
      "lora_plus makes one for each group"
    )
  for name, value, least in (
    ("ratio", ratio, 1.0),
    ("embedding_rate", embedding_rate, 0.0),
    ("weight_decay", weight_decay, 0.0),
    *([] if callable(learning_rate) else [("learning_rate", learning_rate, 0.0)]),
  ):
    if not isinstance(value, Tracer) and not (math.isfinite(value) and value >= least):
      raise ValueError(f"{name} must be a number of at least {least:g}, got {value!r}")
  decays = "weight_decay" in inspect.signature(optimizer).parameters
  bound = getattr(optimizer, "keywords", {})
  if odd := sorted({"weight_decay", "learning_rate"} & set(bound)):
    raise ValueError(f"{odd[0]} is bound in optimizer already: give it to lora_plus, which sets it")
  if not decays and not isinstance(weight_decay, Tracer) and weight_decay:
    raise ValueError(
      f"weight_decay={weight_decay}: {getattr(optimizer, '__name__', optimizer)} has no such "
      "option; use optax.adamw, or leave it out"
    )

  def made(rate: Any, decay: float) -> Any:
    return optimizer(rate, **options, **({"weight_decay": decay} if decays else {}))

  fast: Any = ratio * learning_rate if not callable(learning_rate) else _times(ratio, learning_rate)
  groups: dict[Hashable, Any] = {
    _REST: made(learning_rate, weight_decay),
    EMBEDDING_GROUP: made(embedding_rate, weight_decay),
    B_GROUP: made(fast, weight_decay),
    _VECTORS: made(fast, 0.0),
    _FROZEN: optax.set_to_zero(),
  }
  return optax.multi_transform(groups, _labels)


def _times(ratio: float, schedule: Callable) -> Callable:
  return lambda count: ratio * schedule(count)


def _labels(tree: Any) -> Any:
  """The group of every array."""
  found = update_at({}, {path: _labelled(path, value) for path, value in walk(tree)})
  if B_GROUP not in jax.tree.leaves(found):
    raise ValueError(
      f"lora_plus: nothing is labelled {B_GROUP!r}: make the params with plus=True, such as "
      "pelt.lora(rank=8, plus=True)"
    )
  return found


def _labelled(path: str, value: Any) -> Any:
  bias = path.endswith("bias")  # of several heads, it has two axes

  def label(node: Node, name: str, x: Any) -> str:
    if isinstance(x, str):  # of a node within this one
      return x
    group = node.group_of(name)
    if node.kinds[name] != "own" or group is None:
      return _FROZEN
    if group in (B_GROUP, EMBEDDING_GROUP):
      return group
    vector = x.ndim - node.stacked < 2 or (bias and isinstance(node, Tuned))
    return _VECTORS if vector else _REST

  def visit(node: Node) -> Node:
    of = lambda n, v: jax.tree.map(functools.partial(label, node, n), v)
    return node.replace(**{n: of(n, v) for n, v in node.children()})

  return jax.tree.map(lambda x: x if isinstance(x, str) else _FROZEN, map_nodes(visit, value))
