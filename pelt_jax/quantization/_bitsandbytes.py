"""The tensors in which bitsandbytes stores a 4-bit weight, in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._save import fingerprint
from pelt_jax.quantization._blocks import NESTED_BLOCK, pack_bytes, unpack_bytes
from pelt_jax.quantization._code_books import CODE_BOOKS, dynamic_map
from pelt_jax.quantization._layout import Plan, fitting, packed, unpacked
from pelt_jax.quantization._weight import NF4Weight, check_options

BOOKS = ("nf4", "fp4")
STATE = ".quant_state.bitsandbytes__"  # before the code book's name
_PLAIN = ("", ".absmax", ".quant_map")
_NESTED = (".nested_absmax", ".nested_quant_map")
SUFFIXES = (*_PLAIN, *_NESTED, *(STATE + book for book in BOOKS))  # after a weight's name


def to_tensors(weight: NF4Weight) -> dict[str, np.ndarray]:
  """What bitsandbytes stores for a weight, by what comes after its name.

  Args:
    weight: of one layer, (inputs, outputs).

  Raises:
    ValueError: if bitsandbytes has no such weight.
  """
  if weight.book not in BOOKS or weight.order != (1, 0) or weight.stacked:
    raise ValueError(
      f"bitsandbytes stores matrices of one layer in {' or '.join(BOOKS)}; this one is "
      f"{weight.shape} in {weight.book}"
    )
  outputs, inputs = weight.plan.matrix
  codes, scales = unpacked(
    weight.plan, {"codes": weight.array("codes"), "scales": weight.array("scales")}
  )
  book = CODE_BOOKS[weight.book]
  state: dict[str, Any] = {
    "quant_type": weight.book,
    "blocksize": weight.block,
    "dtype": weight.kind,
    "shape": [outputs, inputs],
  }
  found = {
    "": np.asarray(pack_bytes(codes, book.zero)).reshape(-1, 1),
    ".absmax": np.asarray(scales),
    ".quant_map": np.asarray(book.values, np.float32),
  }
  if weight.double:
    found[".nested_absmax"] = np.asarray(weight.array("nested"))
    found[".nested_quant_map"] = np.asarray(dynamic_map())
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    state["nested_offset"] = float(weight.array("offset"))
  found[STATE + weight.book] = np.frombuffer(json.dumps(state).encode(), np.uint8)
  return found


def shape_of(tensors: Mapping[str, Any]) -> tuple[int, ...]:
  """(outputs, inputs) of what `to_tensors` gives."""
  return tuple(_state(tensors)["shape"])


def from_tensors(tensors: Mapping[str, np.ndarray], layout: str | None = None) -> NF4Weight:
  """The weight that `to_tensors` gave, or bitsandbytes.

  Its values are those of bitsandbytes to the bit, in the dtype of the weight that was quantized;
  its fingerprint is that of these values, since nobody knows the weight's any more.

  Args:
    tensors: by what comes after the weight's name.
    layout: as of `quantize`.

  Raises:
    ValueError: if something is missing, or of a kind that bitsandbytes does not write.
  """
  state = _state(tensors)
  double = "nested_offset" in state
  names = (*_PLAIN, *_NESTED) if double else _PLAIN
  if missing := [name for name in names if name not in tensors]:
    raise ValueError(f"a 4-bit weight lacks the tensors {missing}")
  book, block = state["quant_type"], state["blocksize"]
  check_options(book, block, layout)
  _same(tensors[".quant_map"], CODE_BOOKS[book].values, f"quant_map of {book}")
  if double:
    _same(tensors[".nested_quant_map"], dynamic_map(), "nested_quant_map")
    if state["nested_blocksize"] != NESTED_BLOCK:
      raise ValueError(
        f"nested_blocksize {state['nested_blocksize']}: only {NESTED_BLOCK} is known"
      )
  outputs, inputs = state["shape"]
  plan = Plan(
    sizes=(inputs, outputs),
    kind=state["dtype"],
    order=(1, 0),
    inputs=1,
    book=book,
    block=block,
    double=double,
    layout=fitting(layout, inputs, block),
  )
  codes = unpack_bytes(jnp.asarray(np.asarray(tensors[""]).view(np.uint8).reshape(-1))).reshape(-1)
  made = packed(plan, codes[: outputs * inputs], jnp.asarray(tensors[".absmax"]))
  if double:
    made["nested"] = jnp.asarray(tensors[".nested_absmax"])
    made["offset"] = jnp.asarray(state["nested_offset"], jnp.float32)
  weight = NF4Weight(**made, **plan._asdict(), group=None)
  return weight.replace(source=jax.jit(fingerprint)(weight.materialize()))


def _state(tensors: Mapping[str, Any]) -> dict[str, Any]:
  found = [book for book in BOOKS if STATE + book in tensors]
  if not found:
    raise ValueError(f"a 4-bit weight lacks {STATE}nf4 (or fp4), which says its shape")
  return json.loads(bytes(np.asarray(tensors[STATE + found[0]], np.uint8)))


def _same(given: Any, known: Any, name: str) -> None:
  if not np.array_equal(np.asarray(given, np.float32), np.asarray(known, np.float32)):
    raise ValueError(f"{name} holds other values than those of bitsandbytes: {np.asarray(given)}")
