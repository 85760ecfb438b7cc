"""Evaluation: every row once, scored as its task is scored."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from pelt_jax.training._batch import Batch, batches
from pelt_jax.training._compile import Compiled
from pelt_jax.training._encoded import Encoded
from pelt_jax.training._ids import check_ids, check_rows
from pelt_jax.training._loss import LOSSES
from pelt_jax.training._metrics import classification_scores, entity_scores, language_scores

# The score that tells which of two models is better, and whether more is better.
MAIN_METRIC = {
  "classification": ("accuracy", True),
  "tagging": ("entity_f1", True),
  "lm": ("loss", False),
  "seq2seq": ("loss", False),
}


def _span(row: dict) -> int:
  """How many positions a row needs."""
  if "position_ids" in row:
    return int(row["position_ids"].max()) + 1
  return max(len(row["input_ids"]), row["labels"].size)


class Evaluator:
  """Scores params on data; compiles once however often it is called.

  Args:
    apply: `pelt.bypass(model.apply)`.
    data: The rows; their task decides loss and scores.
    size: Rows per batch.
    lengths: As for `collate`.
    place: What puts a batch on devices, for sharded runs.
    **options: Of `jax.jit`.
  """

  def __init__(
    self,
    apply: Callable,
    data: Encoded,
    size: int = 32,
    lengths: Sequence[int] | None = None,
    place: Callable[[Batch], Any] | None = None,
    **options: Any,
  ):
    self._data, self._size, self._lengths = data, size, lengths
    self._apply, self._highest = apply, max(int(row["input_ids"].max()) for row in data.rows)
    self._longest = max(map(_span, data.rows))
    self._place = place or (lambda batch: batch)
    loss = LOSSES[data.task]
    self.program = Compiled(lambda params, batch: loss(apply, params, batch, None), by=1, **options)

  def __call__(self, params: Any) -> dict[str, float]:
    """Scores of `params`: `loss` and, by task, accuracy and F1, entity F1, or bits per byte."""
    check_ids(self._apply, params, self._highest)
    check_rows(self._apply, params, self._longest)
    total = weights = 0.0
    data, predicted = self._data, {}
    for indices, batch in batches(data, self._size, self._lengths):
      loss, aux = jax.device_get(self.program(params, self._place(batch)))
      total += float(loss) * float(aux["weight"])
      weights += float(aux["weight"])
      if "predictions" in aux:
        predicted |= dict(zip(indices.tolist(), aux["predictions"], strict=False))
    if data.task in ("lm", "seq2seq"):
      return language_scores(total, weights, data.bytes)
    if data.task == "classification":
      truth = [int(row["labels"]) for row in data.rows]
      scores = classification_scores(truth, [int(predicted[i]) for i in range(len(data))])
    else:
      guesses = [
        [data.labels[predicted[i][p]] if p >= 0 else "O" for p in at]
        for i, (_, at) in enumerate(data.tags)
      ]
      scores = entity_scores([tags for tags, _ in data.tags], guesses)
    return {"loss": total / weights, **scores}


def evaluate(apply: Callable, params: Any, data: Encoded, size: int = 32) -> dict[str, float]:
  """Scores `params` on `data` once; see `Evaluator` for repeated use.

  Args:
    apply: `pelt.bypass(model.apply)`.
    params: Params with nodes.
    data: What `encode` returned.
    size: Rows per batch.
  """
  return Evaluator(apply, data, size)(params)
