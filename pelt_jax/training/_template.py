"""Templates: virtual tokens and a blank among a text's words (P-Tuning, arXiv:2103.10385)."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from pelt_jax.training._encoded import closing_id
from pelt_jax.training._tokenizer import Tokenizer

_PARTS = re.compile(r"(\{[^{}]*\}|\[MASK\])")
_SLOT = re.compile(r"\{p(?::(\d+))?\}")


class Filled(NamedTuple):
  """A template with a text in it.

  Attributes:
    ids: What the model reads.
    at: The position whose logits say what stands in the blank; None without one.
    cut: Whether the text lost its end.
  """

  ids: list[int]
  at: int | None
  cut: bool


@dataclasses.dataclass(frozen=True)
class Template:
  """What surrounds a text, such as `"{p:3} {text} It was {p:3} [MASK]."`.

  `{text}` is the example's text, `{p:N}` N virtual tokens (`{p}` one), `[MASK]` the blank of a
  cloze, and everything else is read as it stands. Slots take the virtual tokens in their order.
  White space counts where words stand on both of its sides, so that a template without its slots
  reads as a sentence does; the tokenizer's own first and last tokens stay outermost.

  A masked language model reads its mask in the blank and is asked there. A decoder's blank has to
  be the end: it is asked for the next token.

  Attributes:
    source: The template.

  Raises:
    ValueError: `{text}` is missing or comes twice, `[MASK]` comes twice, a slot is empty, or braces
      hold something else.

  Example:
    >>> from pelt_jax import training
    >>> template = training.Template("{p:2} {text} It was [MASK]")
    >>> template.virtual, template.blank
    (2, True)
    >>> filled = template.fill("ok", training.ByteTokenizer(), virtual=range(259, 261))
    >>> filled.ids[:5], filled.at == len(filled.ids) - 1
    ([1, 259, 260, 114, 110], True)
  """

  source: str

  def __post_init__(self) -> None:
    for part in _PARTS.findall(self.source):
      slot = _SLOT.fullmatch(part)
      if part not in ("{text}", "[MASK]") and not (slot and slot[1] != "0"):
        raise ValueError(
          f"template {self.source!r}: {part} means nothing; known are {{text}}, {{p:3}} (three "
          "virtual tokens) and [MASK]"
        )
    rest = _PARTS.sub("", self.source)
    if "{" in rest or "}" in rest or "[mask]" in rest.lower():
      raise ValueError(
        f"template {self.source!r}: braces hold text or p:N alone, and the blank is written [MASK]"
      )
    for part in ("{text}", "[MASK]"):
      if self.source.count(part) > 1:
        raise ValueError(f"template {self.source!r}: {part} comes more than once")
    if "{text}" not in self.source:
      raise ValueError(f"template {self.source!r}: {{text}} is missing, the place of the text")

  @property
  def virtual(self) -> int:
    """How many virtual tokens it has."""
    slots = (_SLOT.fullmatch(part) for part in _PARTS.findall(self.source))
    return sum(int(slot[1] or 1) for slot in slots if slot)

  @property
  def blank(self) -> bool:
    """Whether it has a blank."""
    return "[MASK]" in self.source

  @functools.cached_property
  def plain(self) -> "Template":
    """The same without virtual tokens: what a model without a prompt can read."""
    return Template(_SLOT.sub("", self.source))

  def fill(
    self,
    text: str,
    tokenizer: Tokenizer,
    virtual: Sequence[int] = (),
    mask: int | bool | None = None,
    room: int | None = None,
  ) -> Filled:
    """Puts a text in its place.

    Args:
      text: The text.
      tokenizer: The model's.
      virtual: Ids of the virtual tokens, as many as the template has.
      mask: What the model reads in the blank; None for a decoder, which reads up to there, or
        False where its tokenizer has a mask all the same.
      room: Most tokens in all; the text is cut at its end. None: any.

    Raises:
      ValueError: Another number of virtual tokens, a decoder's blank that is not the end, or no
        room for four tokens of text.
    """
    if len(virtual) != self.virtual:
      raise ValueError(
        f"template {self.source!r} has slots for {self.virtual} virtual tokens, and the prompt has "
        f"{len(virtual)}: make them as many"
      )
    if self.blank and mask is None and getattr(tokenizer, "mask", None) is not None:
      raise ValueError(
        f"template {self.source!r}: pass mask=tokenizer.mask for a masked language model, or "
        "mask=False for a decoder"
      )
    mask = None if mask is False else mask
    asks_next = self.blank and mask is None
    if asks_next and not self.source.rstrip().endswith("[MASK]"):
      raise ValueError(
        f"template {self.source!r}: a decoder is asked for the next token, so [MASK] has to be its "
        "end"
      )
    opening, closing = _surroundings(tokenizer)
    parts: dict[str, list[int]] = {"before": opening, "text": [], "after": []}
    slots, words, at = iter(virtual), False, None
    side = "before"
    for kind, piece, space in self._items:
      gap = " " if space and words else ""
      if kind == "slot":
        parts[side] += [next(slots) for _ in range(int(piece))]
      elif kind == "blank":
        at = (side, len(parts[side]))
        parts[side] += [] if mask is None else [mask]
      elif kind == "text":
        parts["text"], side = continued(tokenizer, gap + text, words), "after"
      else:
        parts[side] += continued(tokenizer, gap + piece, words)
      words = words or kind != "slot"
    before, own, after = parts.values()
    after += [] if asks_next else closing
    left = max(len(own), 4) if room is None else room - len(before) - len(after)
    if left < 4:
      raise ValueError(
        f"template {self.source!r} takes {len(before) + len(after)} tokens besides the text, which "
        f"leaves {max(left, 0)} of {room} for it, and at least 4 are needed: shorten the template, "
        "or raise length"
      )
    ids = [*before, *own[:left], *after]
    if not ids:
      raise ValueError(f"template {self.source!r}: without a text nothing is left to read")
    if asks_next:
      position = len(ids) - 1
    elif at is not None:
      position = at[1] + (len(ids) - len(after) if at[0] == "after" else 0)
    else:
      position = None
    return Filled(ids, position, left < len(own))

  def token(self, word: str, tokenizer: Tokenizer) -> int:
    """The one token that `word` is in the blank.

    Raises:
      ValueError: It is several, or none.
    """
    spaced = any(kind == "blank" and space for kind, _, space in self._items)
    ids = continued(tokenizer, (" " if spaced else "") + word.strip())
    if len(ids) != 1:
      pieces = [tokenizer.decode([i]) for i in ids]
      raise ValueError(
        f"{word!r} is {len(ids)} tokens in the blank of {self.source!r}, {pieces}: a blank holds "
        "one, so choose another word"
      )
    return ids[0]

  @functools.cached_property
  def _items(self) -> tuple[tuple[str, str, bool], ...]:
    """Kind, content, and whether white space parts it from the words before it."""
    items, space = [], False
    for part in filter(None, _PARTS.split(self.source)):
      if slot := _SLOT.fullmatch(part):
        items.append(("slot", slot[1] or "1", False))
      elif part in ("{text}", "[MASK]"):
        items.append(("text" if part == "{text}" else "blank", part, space))
        space = False
      else:
        space |= part[0].isspace()
        if part.strip():
          items.append(("words", part.strip(), space))
          space = False
        space |= part[-1].isspace()
    return tuple(items)


def _surroundings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
  """What a tokenizer writes before a sequence and after it."""
  around, closing = tokenizer.encode("", special=True).ids, closing_id(tokenizer)
  opening = around if closing is None else around[:-1]
  if not opening and tokenizer.adds_bos and tokenizer.bos is not None:
    opening = [tokenizer.bos]
  return opening, [] if closing is None else [closing]


def continued(tokenizer: Tokenizer, text: str, words: bool = True) -> list[int]:
  """Ids of a text that follows other words, or stands alone."""
  if words:  # tokenizers of the sentencepiece kind mark where a text begins
    first = tokenizer.encode("a").ids
    both = tokenizer.encode("a" + text).ids
    if both[: len(first)] == first:
      return both[len(first) :]
  return tokenizer.encode(text).ids
