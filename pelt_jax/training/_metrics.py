"""Scores, from the packages that define them."""

import math
from collections.abc import Sequence

from pelt_jax.training._extras import need


def classification_scores(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
  """Accuracy and macro-averaged F1 (scikit-learn).

  Args:
    truth: Class ids.
    predicted: As many.
  """
  metrics = need("sklearn.metrics")
  return {
    "accuracy": float(metrics.accuracy_score(truth, predicted)),
    "f1": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
  }


def entity_scores(
  truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Micro-averaged F1, precision and recall of whole entities (seqeval).

  An entity counts as found if both its span and its type are right.

  Args:
    truth: Per sentence the BIO tags.
    predicted: As many, of the same lengths.
  """
  metrics = need("seqeval.metrics")
  truth, predicted = [list(t) for t in truth], [list(p) for p in predicted]
  return {
    "entity_f1": float(metrics.f1_score(truth, predicted, zero_division=0)),
    "precision": float(metrics.precision_score(truth, predicted, zero_division=0)),
    "recall": float(metrics.recall_score(truth, predicted, zero_division=0)),
  }


def language_scores(nats: float, tokens: float, n_bytes: int) -> dict[str, float]:
  """Loss in nats per token, perplexity, and bits per byte of the text predicted.

  Bits per byte compare models with different tokenizers.

  Args:
    nats: Summed over tokens.
    tokens: How many.
    n_bytes: UTF-8 bytes of the text.

  Example:
    >>> language_scores(math.log(2) * 16, 4, 2)["bits_per_byte"]
    8.0
  """
  loss = nats / tokens
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": float(nats / math.log(2) / n_bytes) if n_bytes else float("nan"),
  }
