"""Hugging Face folders in, tensor by tensor.

A parameter's path is the checkpoint's name with `/` for `.`; `kernel`, `scale` and `embedding` are
what torch calls `weight`, and a kernel is its transpose.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pelt_jax._walk import walk
from pelt_jax.models import _bert
from pelt_jax.models._config import Config, read_config
from pelt_jax.models._config_seq2seq import T5Config
from pelt_jax.models._families import from_config
from pelt_jax.models._layers import Remat, stack_layers, stacks, to_looped
from pelt_jax.models._names import (
  COPIES,
  FRESH,
  LEFT_OUT,
  SHARED,
  aliases,
  repeats,
  torch_name,
  transposed,
)
from pelt_jax.models._safetensors import Entry, read_header
from pelt_jax.models._shards import (
  Index,
  Read,
  check_function,
  checked,
  insert,
  looped_paths,
  put,
  read_shards,
  shards,
)
from pelt_jax.quantization import NF4Weight
from pelt_jax.quantization._bitsandbytes import STATE, SUFFIXES, from_tensors, shape_of

_log = logging.getLogger(__name__)

# Only copied: the library itself never reads them.
SIDE_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "generation_config.json",
)


def from_pretrained(
  source: str | Path,
  *,
  task: str = "lm",
  num_labels: int | None = None,
  dtype: Any = jnp.float32,
  scan: bool = False,
  remat: Remat = False,
  transform: Any = None,
  shardings: Callable[[nn.Module, Any], Any] | None = None,
  key: jax.Array | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
  """Loads a Hugging Face folder (config.json and safetensors, single or sharded).

  Args:
    source: the folder; or, if there is no such folder, a hub id such as "org/name", which needs
      `huggingface_hub`.
    task: "lm" (decoders), "mlm" (encoders), "cloze" (the one of both that the family has),
      "classification", "tagging", "encoder" or "seq2seq" (encoder-decoders).
    num_labels: for classification and tagging; by default what config.json says.
    dtype: of parameters and computation. The checkpoint is converted to it.
    scan: stack the layers' parameters and compile one layer.
    remat: keep only the layers' inputs for the backward pass, which computes the rest again;
      "offload" keeps them in the host's memory.
    transform: a `Transform` applied to one real tensor at a time, so that a quantized load never
      holds the model twice. Not for a checkpoint that bitsandbytes quantized to 4 bits, whose
      linear layers come as `pelt.quantization.NF4Weight`: apply it to what was loaded.
    shardings: where the parameters go, nodes of `transform` included: `shardings(model, shapes)`
      gives the tree of `jax.sharding.Sharding`s for the tree of shapes, as
      `training.model_shardings(mesh)` does. Each process then reads from the files only the bytes
      that its own devices hold (of a checkpoint that bitsandbytes quantized: all). By default
      everything goes to one device.
    key: for a head that the checkpoint lacks (and for `transform`); `jax.random.key(0)` if None.

  Returns:
    `(model, params)`: a Linen module and a nested dict of arrays.

  Raises:
    FileNotFoundError: no folder and no hub id, or no safetensors in it.
    TypeError: `shardings` is no function of a model and shapes.
    ValueError: a truncated file; missing, unexpected or wrongly shaped tensors, each named with
      the shape expected; an unsupported configuration.

      model, params = from_pretrained("MiniLM/", task="classification", num_labels=6)
      logits = model.apply({"params": params}, input_ids, attention_mask)
  """
  if shardings is not None:
    check_function(shardings)
  folder = _folder(source)
  config = read_config(_read_json(folder / "config.json"), source=str(folder))
  entries = _entries(folder)
  model = from_config(
    _with_own_head(config, entries),
    task=task,
    num_labels=num_labels,
    dtype=dtype,
    scan=scan,
    remat=remat,
  )
  key = jax.random.key(0) if key is None else key
  read = _reader(model, entries, key, folder)
  if transform is not None:
    if found := quantized(entries):
      raise ValueError(
        f"transform: {folder} is quantized already ({found[0]}). Load it as it is and apply the "
        "transform's init to what comes"
      )
    return model, _load_with_transform(model, read, transform, key, shardings)
  if shardings is not None and not quantized(entries):
    return model, read_shards(model, _present(model, read), read, shardings)
  place = lambda path, value: value if isinstance(value, NF4Weight) else jnp.asarray(value)
  params = _assemble(model, read, place)
  return model, params if shardings is None else put(params, model, shardings)


def abstract_params(model: nn.Module) -> dict[str, Any]:
  """Shapes and dtypes of the model's parameters, without computing any."""
  # Tracing one scanned layer is much faster than tracing all of them.
  scanned = model.clone(scan=True)
  if isinstance(model, _bert.BertModel):  # the pooler's tensors are carried along, not used
    scanned = scanned.clone(pooler=True)
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(scanned.init, jax.random.key(0), ids)["params"]
  return shapes if model.scan else to_looped(shapes, model)


def _with_own_head(config: Config, entries: Mapping[str, Entry]) -> Config:
  """T5's configuration says "tied" whatever the file holds: a head that differs is a head."""
  head = entries.get("lm_head.weight")
  if not isinstance(config, T5Config) or head is None or _equal(head, _shared(entries)):
    return config
  return config.replace(tie_word_embeddings=False)


def _shared(entries: Mapping[str, Entry]) -> Entry | None:
  """The tensor of the embedding that an encoder-decoder shares."""
  names = (*SHARED, *filter(COPIES.search, entries))
  return next((entries[n] for n in names if n in entries), None)


def _equal(a: Entry, b: Entry | None) -> bool:
  return b is None or (a.shape == b.shape and bool((a.read() == b.read()).all()))


def optional(model: nn.Module, path: str) -> bool:
  return isinstance(model, _bert.BertModel) and path.startswith("pooler/")


def _reader(
  model: nn.Module, entries: Mapping[str, Entry], key: jax.Array, folder: Path
) -> dict[str, Read]:
  """Looped path -> a function that reads that tensor, after all names and shapes were checked."""
  expected = dict(walk(abstract_params(model.clone(scan=False))))
  four_bits = set(quantized(entries))
  readers: dict[str, Read] = {}
  used, problems, fresh = set(), [], []
  for path, leaf in expected.items():
    name = torch_name(path)
    found = next((n for n in aliases(name, model) if n in entries), None)
    shape = leaf.shape[::-1] if transposed(path, model) else leaf.shape
    if found in four_bits:
      parts = {s: entries[found + s] for s in SUFFIXES if found + s in entries}
      used.update(found + s for s in parts)
      if not transposed(path, model):
        problems.append(f"{found} is quantized to 4 bits, which only linear layers can be")
      elif (given := shape_of({s: e.read() for s, e in parts.items()})) != shape:
        problems.append(f"{found} has shape {given} in 4 bits, expected {shape}")
      readers[path] = _four_bits(found, parts)
    elif found is not None:
      used.add(found)
      if entries[found].shape != shape:
        hint = " (see num_labels)" if FRESH.match(path) else ""
        problems.append(f"{found} has shape {entries[found].shape}, expected {shape}{hint}")
      readers[path] = _tensor(entries[found], leaf.dtype, transposed(path, model))
    elif FRESH.match(path):
      if not optional(model, path):
        fresh.append(name)
        readers[path] = _fresh(path, leaf, key, model.config.initializer_range)
    else:
      problems.append(f"{name} is missing, expected shape {shape}")
  for name in entries:
    if name in used:
      continue
    if originals := repeats(name, model):
      original = next((entries[n] for n in originals if n in entries), None)
      original = _shared(entries) if original is None else original
      if not _equal(entries[name], original):
        problems.append(f"{name} differs from {originals[0]}, which this model uses for both")
    elif not LEFT_OUT.search(name):
      problems.append(f"{name} {entries[name].shape} is unexpected")
  if problems:
    shown = "\n  ".join(problems[:20])
    more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
    hint = ""
    if model.architecture.endswith("MaskedLM") and problems[0].startswith(("cls.", "lm_head.")):
      hint = "\nIt was saved without its masked language model's head; no cloze can do without"
    raise ValueError(
      f"{folder} does not fit its config.json as {type(model).__name__}:\n  {shown}{more}{hint}"
    )
  if fresh:
    _log.warning("%s lacks %s: initialised afresh", folder, ", ".join(fresh))
  return readers


def _tensor(entry: Entry, dtype: Any, transpose: bool) -> Read:
  def read(index: Index | None = None) -> np.ndarray:
    if index is None:
      value = entry.read()
    else:
      value = entry.part(index[::-1] if transpose else index)
    return np.array(value.T if transpose else value, dtype, order="C")  # a copy, not the mapping

  return read


def quantized(entries: Mapping[str, Entry]) -> list[str]:
  """Names of the weights that bitsandbytes quantized to 4 bits."""
  return [name.partition(STATE)[0] for name in entries if STATE in name]


def _four_bits(name: str, parts: Mapping[str, Entry]) -> Read:
  def read(index: Index | None = None) -> NF4Weight:
    assert index is None
    try:
      return from_tensors({suffix: entry.read() for suffix, entry in parts.items()})
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error

  return read


def _fresh(path: str, leaf: Any, key: jax.Array, scale: float) -> Read:
  def read(index: Index | None = None) -> np.ndarray:
    if path.endswith("bias"):
      return np.zeros(leaf.shape, leaf.dtype)[index or ()]
    # Keyed by path, so that the order of loading never matters.
    folded = jax.random.fold_in(key, zlib.crc32(path.encode()))
    value = jax.random.normal(folded, leaf.shape, leaf.dtype)
    return np.asarray(value * jnp.asarray(scale, leaf.dtype))[index or ()]

  return read


def _present(model: nn.Module, read: Mapping[str, Read]) -> dict[str, Any]:
  """Shapes of what can be read."""
  found: dict[str, Any] = {}
  for path, leaf in walk(abstract_params(model)):
    if looped_paths(model, path)[0] in read:
      insert(found, path, leaf)
  return found


def _assemble(
  model: nn.Module,
  read: Mapping[str, Read],
  place: Callable[[str, np.ndarray], Any],
) -> dict[str, Any]:
  """Reads leaf after leaf; a scanned leaf is stacked before the next one is read."""
  out: dict[str, Any] = {}
  for path, _ in walk(abstract_params(model)):
    names = looped_paths(model, path)
    if names[0] not in read:
      continue
    if names == [path]:
      value = place(path, read[path]())
    else:
      value = stack_layers([place(n, read[n]()) for n in names], path)
    insert(out, path, value)
  return out


def _load_with_transform(
  model: nn.Module,
  read: Mapping[str, Read],
  transform: Any,
  key: jax.Array,
  shardings: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, Any]:
  from pelt_jax.models._transformed import transformed

  looped = model.clone(scan=False)
  shapes = _present(looped, read)
  whole = shardings is None
  values = transformed(
    looped, shapes, read if whole else shards(looped, shapes, read, shardings), transform, key
  )
  paths = set(values.paths)
  layers: dict[str, list[str]] = {}  # path in the result -> paths in the looped tree
  for path in sorted(paths):
    inside, stack, length = _layer(model, path)
    if inside is None:
      layers[path] = [path]
      continue
    alike = [f"{stack}/{i}/{inside}" for i in range(length)]
    if missing := [p for p in alike if p not in paths]:
      raise ValueError(
        f"the transform makes {path!r} but not {missing[0]!r}; scanned layers must be alike. "
        "Load with scan=False, or adapt all layers."
      )
    layers[f"{stack}/{inside}"] = alike

  def joined(path: str, get: Callable[[str], Any]) -> Any:
    parts = layers[path]
    return get(path) if parts == [path] else stack_layers([get(p) for p in parts], path)

  place: Callable[[str, Any], Any] = lambda path, value: value
  if shardings is not None:
    found: dict[str, Any] = {}
    for path in layers:
      insert(found, path, jax.eval_shape(lambda path=path: joined(path, values.zeros)))
    where = checked(found, shardings(model, found))
    place = lambda path, value: jax.device_put(value, where[path])
  out: dict[str, Any] = {}
  for path in layers:  # one tensor in memory at a time
    value = joined(path, lambda p: jax.block_until_ready(values.get(p)))
    insert(out, path, place(path, value))
  return out


def _layer(model: nn.Module, path: str) -> tuple[str | None, str, int]:
  """A looped path's part below its layer, its stack and the stack's length; None outside of all."""
  for stack, length in stacks(model) if model.scan else ():
    if inside := re.fullmatch(re.escape(stack) + r"/\d+/(.*)", path):
      return inside[1], stack, length
  return None, "", 0


def _folder(source: str | Path) -> Path:
  folder = Path(source)
  if folder.is_dir():
    return folder
  if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
    raise FileNotFoundError(f"there is no folder {str(source)!r}")
  try:
    import huggingface_hub
  except ImportError:
    raise FileNotFoundError(
      f"there is no folder {str(source)!r}; to fetch it from the hub, install huggingface_hub"
    ) from None
  try:
    return Path(
      huggingface_hub.snapshot_download(
        str(source), allow_patterns=["config.json", "*.safetensors*", *SIDE_FILES]
      )
    )
  except Exception as error:
    raise FileNotFoundError(
      f"there is no folder {str(source)!r}, and fetching it from the hub failed: {error}"
    ) from error


def _entries(folder: Path) -> dict[str, Entry]:
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    weights = _read_json(index)["weight_map"]
    files: Sequence[Path] = [folder / name for name in sorted(set(weights.values()))]
  else:
    files = [folder / "model.safetensors"]
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(f"{file} is missing (only safetensors checkpoints are read)")
  return {name: entry for file in files for name, entry in read_header(file).items()}


def _read_json(file: Path) -> dict[str, Any]:
  if not file.is_file():
    raise FileNotFoundError(f"{file} is missing: {file.parent} is no Hugging Face model folder")
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not valid JSON: {error}") from error
