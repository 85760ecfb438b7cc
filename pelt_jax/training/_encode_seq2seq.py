"""Rows of encoder-decoders: a source, and the target that the decoder writes."""

from collections.abc import Sequence

import numpy as np

from pelt_jax.training._encoded import Encoded, closing_id, fit_in
from pelt_jax.training._place import place
from pelt_jax.training._readers import Example, Examples
from pelt_jax.training._tokenizer import Tokenizer


def sources_and_targets(
  examples: Examples,
  tokenizer: Tokenizer,
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> Encoded:
  rows, total_bytes, truncated = [], 0, 0
  for example in examples:
    source, cut = source_ids(examples, example, tokenizer, length, limit, prompt)
    completion = example.completion or ""
    pieces = tokenizer.encode(completion, special=True)
    target = pieces.ids
    if tokenizer.eos is not None and target[-1:] != [tokenizer.eos]:
      target = [*target, tokenizer.eos]
    kept = fit_in(examples, example, len(target), length, limit)
    # A target that was cut does not end there, so nothing says that it does.
    end = len(completion) if kept == len(target) else max(b for _, b in pieces.spans[:kept])
    total_bytes += len(completion[:end].encode())
    truncated += bool(cut or kept < len(target))
    rows.append(
      {"input_ids": np.array(source, np.int32), "labels": np.array(target[:kept], np.int32)}
    )
  return Encoded("seq2seq", tuple(rows), pad=tokenizer.pad, bytes=total_bytes, truncated=truncated)


def source_ids(
  examples: Examples,
  example: Example,
  tokenizer: Tokenizer,
  length: int | None,
  limit: int | None,
  prompt: tuple[Sequence[int], str],
) -> tuple[list[int], bool]:
  """What an encoder-decoder reads, virtual tokens in their place, and whether it was cut."""
  ids, closing = tokenizer.encode(example.prompt or "", special=True).ids, closing_id(tokenizer)
  room = [None if n is None else n - len(prompt[0]) for n in (length, limit)]
  kept = fit_in(examples, example, len(ids), *room)
  cut = kept < len(ids)
  if cut:
    ids = ids[:kept] if closing is None else [*ids[: kept - 1], closing]
  if not ids and not prompt[0]:
    raise examples.error(example.line, "the prompt is empty: the encoder has nothing to read")
  return place(ids, *prompt, closing=closing is not None).ids, cut
