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


def generation_scores(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """How near generated texts are to their references: corpus BLEU and mean ROUGE.

  BLEU (sacrebleu, its default "13a" tokens and exponential smoothing) counts n-grams over the
  whole corpus, 0 to 100. ROUGE-1, -2 and -L (rouge-score, F1, with stemming) are means over the
  texts, 0 to 1, each against the reference that it is nearest to.

  Args:
    predictions: One per item.
    references: Per item at least one; items may have unequal numbers of them.

  Raises:
    ValueError: There are none, unequal numbers of them, or an item without a reference.

  Example:
    >>> scores = generation_scores(["the cat sat on it"], [["a dog", "the cat sat on it"]])
    >>> scores["rouge_l"], round(scores["bleu"], 6)
    (1.0, 100.0)
  """
  if not predictions or len(predictions) != len(references):
    raise ValueError(
      f"{len(predictions)} predictions and {len(references)} lists of references: expected as "
      "many, at least one"
    )
  for i, found in enumerate(references):
    if isinstance(found, str) or not found:
      raise ValueError(f"references[{i}] must be a list of at least one text, got {found!r}")
  bleu, rouge = need("sacrebleu"), need("rouge_score.rouge_scorer")
  most = max(map(len, references))
  # One stream per reference; where an item has fewer, sacrebleu leaves it out.
  streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
  scorer = rouge.RougeScorer(list(_ROUGE), use_stemmer=True)
  found = [scorer.score_multi(list(r), p) for p, r in zip(predictions, references, strict=True)]
  means = {
    name: sum(score[kind].fmeasure for score in found) / len(found) for kind, name in _ROUGE.items()
  }
  return {"bleu": float(bleu.corpus_bleu(list(predictions), streams).score), **means}


_ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
