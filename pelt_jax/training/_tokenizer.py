"""Tokenizers: of a model folder, or of bytes."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pelt_jax.training._extras import need


class Pieces(NamedTuple):
  """A tokenized text: ids, and the half-open character span of each (empty for special tokens)."""

  ids: list[int]
  spans: list[tuple[int, int]]


@runtime_checkable  # so that annotations can be checked at run time
class Tokenizer(Protocol):
  """What the pipeline asks of a tokenizer."""

  vocab_size: int
  bos: int | None
  eos: int | None
  pad: int
  mask: int | None  # what stands for a token that is asked for
  adds_bos: bool  # whether text starts with `bos`, which `encode` then leaves to the caller
  folder: pathlib.Path | None  # where its files are

  def encode(self, text: str, special: bool = False) -> Pieces:
    """Pieces of `text`; with `special`, also what surrounds one sequence ([CLS], [SEP])."""
    ...

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of ids, special tokens left out."""
    ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """Bytes as tokens: `id = byte + 3`, after padding, begin and end of text.

  Example:
    >>> ByteTokenizer().encode("é").ids
    [198, 172]
  """

  vocab_size: int = 259
  pad: int = 0
  bos: int | None = 1
  eos: int | None = 2
  mask: int | None = None
  adds_bos: bool = True
  folder: pathlib.Path | None = None

  def encode(self, text: str, special: bool = False) -> Pieces:
    """One id per byte of the UTF-8 text; `special` changes nothing."""
    data = text.encode()
    if len(data) == len(text):
      return Pieces([b + 3 for b in data], [(i, i + 1) for i in range(len(data))])
    ids, spans = [], []
    for i, char in enumerate(text):
      for byte in char.encode():
        ids.append(byte + 3)
        spans.append((i, i + 1))
    return Pieces(ids, spans)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of the bytes; broken sequences become replacement characters."""
    return bytes(int(i) - 3 for i in ids if 3 <= int(i) < 259).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class FolderTokenizer:
  """The tokenizer of a Hugging Face folder."""

  folder: pathlib.Path | None
  backend: Any  # tokenizers.Tokenizer
  vocab_size: int
  bos: int | None
  eos: int | None
  pad: int
  mask: int | None
  adds_bos: bool
  template: str | None  # chat template (Jinja)
  names: dict[str, str]  # the special tokens a template may write

  def encode(self, text: str, special: bool = False) -> Pieces:
    """See `Tokenizer.encode`."""
    done = self.backend.encode(text, add_special_tokens=special)
    spans = [
      (0, 0) if special_token else span
      for span, special_token in zip(done.offsets, done.special_tokens_mask, strict=True)
    ]
    return Pieces(done.ids, spans)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer.decode`."""
    return self.backend.decode([int(i) for i in ids])

  def render(self, messages: Sequence[dict], prompt: bool = False) -> str:
    """A conversation as the model's template writes it.

    Args:
      messages: Dicts with `role` and `content`.
      prompt: Whether to end with the opening of an assistant's turn.

    Raises:
      ValueError: The folder has no chat template, or the template refuses the messages.
    """
    return self._compiled(messages, prompt)

  @functools.cached_property
  def _compiled(self) -> Callable[[Sequence[dict], bool], str]:
    if self.template is None:
      raise ValueError(
        f"{self.folder}: the tokenizer has no chat template (`chat_template` in "
        "tokenizer_config.json, or chat_template.jinja), so `messages` cannot be written as text"
      )
    jinja2, sandbox = need("jinja2"), need("jinja2.sandbox")

    def refuse(message: str) -> None:
      raise jinja2.TemplateError(message)

    # A template comes with the model: it may compute strings, and touch nothing else.
    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda x, **kwargs: json.dumps(x, ensure_ascii=False, **kwargs)
    try:
      compiled = environment.from_string(self.template)
    except jinja2.TemplateError as error:
      raise ValueError(f"{self.folder}: the chat template does not compile: {error}") from error

    def render(messages: Sequence[dict], prompt: bool) -> str:
      try:
        return compiled.render(messages=list(messages), add_generation_prompt=prompt, **self.names)
      except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error

    return render


def load_tokenizer(folder: str | pathlib.Path) -> FolderTokenizer:
  """Reads the tokenizer of a model folder: `tokenizer.json`, else BERT's `vocab.txt`.

  Args:
    folder: A Hugging Face folder.

  Raises:
    FileNotFoundError: It has neither file.
  """
  folder = pathlib.Path(folder)
  tokenizers = need("tokenizers")
  config = _json(folder / "tokenizer_config.json")
  if (folder / "tokenizer.json").is_file():
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  elif (folder / "vocab.txt").is_file():
    lower = bool(config.get("do_lower_case", True))
    backend = tokenizers.BertWordPieceTokenizer(
      str(folder / "vocab.txt"), lowercase=lower
    )._tokenizer
  else:
    raise FileNotFoundError(f"{folder}: no tokenizer.json and no vocab.txt")
  backend.no_truncation()  # some folders store both; lengths are the pipeline's business
  backend.no_padding()
  specials = _json(folder / "special_tokens_map.json") | config

  def name(kind: str) -> str | None:
    token = specials.get(f"{kind}_token")
    return token.get("content") if isinstance(token, dict) else token

  def id_of(kind: str) -> int | None:
    token = name(kind)
    return backend.token_to_id(token) if token else None

  template = config.get("chat_template")
  if isinstance(template, list):  # several, named
    template = {t["name"]: t["template"] for t in template}.get("default")
  if (folder / "chat_template.jinja").is_file():
    template = (folder / "chat_template.jinja").read_text()
  bos, eos, pad = id_of("bos"), id_of("eos"), id_of("pad")
  mask = id_of("mask")
  if mask is None and not (folder / "tokenizer.json").is_file():  # BERT's own name, by default
    mask = backend.token_to_id("[MASK]")
  probe = backend.encode("a", add_special_tokens=True).ids
  # Llama's own tokenizer class adds <s> in code where tokenizer.json does not.
  sentencepiece = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
  adds_bos = bos is not None and (
    bool(config.get("add_bos_token", sentencepiece)) or probe[:1] == [bos]
  )
  names = {f"{k}_token": name(k) or "" for k in ("bos", "eos", "pad", "unk")}
  return FolderTokenizer(
    folder,
    backend,
    vocab_size=backend.get_vocab_size(),
    bos=bos,
    eos=eos,
    pad=pad if pad is not None else (eos if eos is not None else 0),
    mask=mask,
    adds_bos=adds_bos,
    template=template,
    names=names,
  )


def _json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text()) if path.is_file() else {}
