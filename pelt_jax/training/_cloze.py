"""Cloze classification: the class whose word fills a blank best."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax.training._template import Template
from pelt_jax.training._tokenizer import Tokenizer

Words = tuple[tuple[int, ...], ...]


def verbalizer(
  words: Mapping[str, str | Sequence[str]],
  labels: Sequence[str],
  tokenizer: Tokenizer,
  template: Template,
) -> Words:
  """The tokens that stand for each class in a template's blank.

  Args:
    words: A word or several for every class.
    labels: The classes in order.
    tokenizer: The model's.
    template: With a blank; a word is read as it follows what stands there before it.

  Returns:
    Per class, the ids of its words.

  Raises:
    ValueError: A class has no word, a word is of no class or of two, a word is several tokens, or
      the template has no blank.

  Example:
    >>> from pelt_jax import training
    >>> template, words = training.Template("{text} Good?[MASK]"), {"no": "n", "yes": ["y", "Y"]}
    >>> training.verbalizer(words, ("no", "yes"), training.ByteTokenizer(), template)
    ((113,), (124, 92))
  """
  if not template.blank:
    raise ValueError(f"template {template.source!r} has no [MASK] for the verbalizer's words")
  if missing := [label for label in labels if label not in words]:
    raise ValueError(f"verbalizer: no word for the classes {missing}; it has {list(words)}")
  if unknown := [label for label in words if label not in labels]:
    raise ValueError(f"verbalizer: {unknown} are no classes; these are {list(labels)}")
  owners: dict[int, tuple[str, str]] = {}
  found = []
  for label in labels:
    given = words[label]
    given = [given] if isinstance(given, str) else list(given)
    if not given or not all(word.strip() for word in given):
      raise ValueError(f"verbalizer: no word, or an empty one, for the class {label!r}: {given}")
    ids = [template.token(word, tokenizer) for word in given]
    for word, i in zip(given, ids, strict=True):
      if i in owners:
        other = owners[i]
        raise ValueError(
          f"verbalizer: {word!r} of the class {label!r} is the same token as {other[1]!r} of the "
          f"class {other[0]!r}"
        )
      owners[i] = (label, word)
    found.append(tuple(ids))
  return tuple(found)


def cloze(apply: Callable, words: Words) -> Callable:
  """A classifier made of a language model: score(c) = mean of the logits of c's words.

  It is used in place of `apply` wherever logits of classes are: losses, `train_step`, `Evaluator`.

  Args:
    apply: `pelt.bypass(model.apply)` of a causal or masked language model, whose `at` says which
      position's logits to make.
    words: What `verbalizer` returned.

  Returns:
    `apply(variables, input_ids, attention_mask=None, *, at, ...) -> (B, C)`, with `at` (B,) from
    `encode(..., template=...)`.
  """
  if len(words) < 2 or not all(words):
    raise ValueError(f"words={words}: expected at least two classes, with at least one token each")
  width = max(map(len, words))
  ids = np.array([[*w, *w[:1] * (width - len(w))] for w in words], np.int32)
  shares = np.array([[1 / len(w)] * len(w) + [0.0] * (width - len(w)) for w in words])

  @functools.wraps(apply)
  def classify(variables: Any, input_ids: jax.Array, *args: Any, at: Any, **kwargs: Any):
    logits = apply(variables, input_ids, *args, at=at, **kwargs)
    wide = jnp.asarray(logits, np.promote_types(logits.dtype, jnp.float32))
    return jnp.einsum("bcw,cw->bc", wide[:, ids], jnp.asarray(shares, wide.dtype))

  return classify
