"""Losses: `loss(apply, params, batch, key) -> (mean over targets, aux)`.

`aux["weight"]` is the number of targets. `train_step` needs it: the loss of a batch is the sum of
its parts' sums over the sum of their counts, which the mean of means is not. `aux["by_row"]` has
the sum and the number of targets of each row of the batch, for `jobs_step`. A batch's `rows` go to
the model, whose params then hold a bank.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pelt_jax.training._encoded import IGNORE

Loss = Callable[[Callable, Any, dict, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]

_INPUTS = ("attention_mask", "segment_ids", "position_ids", "token_type_ids", "at", "rows")


def _run(apply: Callable, params: Any, batch: dict, key: jax.Array | None, **kwargs: Any) -> Any:
  kwargs |= {name: batch[name] for name in _INPUTS if name in batch}
  if key is not None:
    kwargs["rngs"] = {"dropout": key}
  return apply({"params": params}, batch["input_ids"], deterministic=key is None, **kwargs)


def cross_entropy(
  apply: Callable, params: Any, batch: dict, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """-mean log p(label), for classification (labels (B,)) and tagging (labels (B, T)).

  Args:
    apply: `pelt.bypass(model.apply)` of a model that returns logits.
    params: Params with nodes.
    batch: `input_ids`, `labels` (-100: no target) and the model's masks.
    key: For dropout; None evaluates.

  Returns:
    The mean, float32 at least, and `weight`, `by_row`, `correct` (counts) and `predictions`.
  """
  logits = _run(apply, params, batch, key)
  if logits.dtype != jnp.float64:
    logits = logits.astype(jnp.float32)
  labels = batch["labels"]
  valid = jnp.asarray(labels) != IGNORE
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
  predictions = jnp.argmax(logits, axis=-1)
  mean, aux = _mean(losses, valid)
  correct = jnp.sum(valid & (predictions == labels), dtype=mean.dtype)
  return mean, {**aux, "correct": correct, "predictions": predictions}


def next_token(
  apply: Callable, params: Any, batch: dict, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """-mean log p(token | before), for language models that take aligned `labels`.

  Of an encoder-decoder, whose decoder reads the targets shifted right: -mean log p(token | before,
  source).

  The model computes token losses chunk by chunk, so full logits never exist.

  Args:
    apply: `pelt.bypass(model.apply)`; called with `labels`, it returns losses (B, T).
    params: Params with nodes.
    batch: `input_ids`, `labels` (B, T) (-100: no target), and `attention_mask` or `segment_ids` and
      `position_ids`. An encoder-decoder's `input_ids` and mask are the source's, of another length.
    key: For dropout; None evaluates.

  Returns:
    The mean, float32 at least, `weight`, the number of targets, and `by_row`.
  """
  losses = _run(apply, params, batch, key, labels=batch["labels"])
  return _mean(losses, jnp.asarray(batch["labels"]) != IGNORE)


def recorded(loss: Loss, *names: str) -> Loss:
  """`loss` whose `aux["record"]` holds what the nodes tell, for a method's post-step.

  Args:
    loss: Calls `apply` once.
    *names: Of values, as `pelt.bypass(...)(record=...)` takes them.

  Returns:
    A loss for `train_step`.

  Raises:
    ValueError: No name.

  Example:
    >>> from pelt_jax import training
    >>> loss = training.recorded(training.cross_entropy, "mean_gate")
  """
  if not names:
    raise ValueError("recorded(loss) needs the names of the values to record")

  def told(apply: Callable, params: Any, batch: dict, key: jax.Array | None = None) -> Any:
    seen: dict[str, Any] = {}

    def listening(*args: Any, **kwargs: Any) -> Any:
      out, record = apply(*args, record=names, **kwargs)
      seen.update(record)
      return out

    result = loss(listening, params, batch, key)
    value, aux = result if isinstance(result, tuple) else (result, {})
    return value, {**aux, "record": seen}

  return told


def _mean(losses: jax.Array, valid: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
  weight = jnp.sum(valid, dtype=losses.dtype)
  kept = jnp.where(valid, losses, jnp.zeros_like(losses))
  within = tuple(range(1, losses.ndim))
  by_row = jnp.sum(kept, axis=within), jnp.sum(valid, axis=within, dtype=losses.dtype)
  mean = jnp.sum(kept) / jnp.maximum(weight, jnp.ones_like(weight))
  return mean, {"weight": weight, "by_row": by_row}


LOSSES: dict[str, Loss] = {
  "classification": cross_entropy,
  "tagging": cross_entropy,
  "lm": next_token,
  "seq2seq": next_token,
}
