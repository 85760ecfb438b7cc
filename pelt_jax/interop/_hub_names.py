"""How AdapterHub names the places of a model, and which of ours serves each."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from pelt_jax._site import Role, Site, matches
from pelt_jax.interop._places import scanned
from pelt_jax.models._layers import stacks

# Where a bottleneck may stand: AdapterHub's option, our role.
LOCATIONS = {
  "mh_adapter": "attention_block",
  "output_adapter": "ffn",
  "cross_adapter": "cross_attention_block",
}


class Family(NamedTuple):
  """The names of one model family.

  Attributes:
    trunk: what AdapterHub's files put before a name of the trunk.
    model: AdapterHub's class with heads.
    bottlenecks: pattern of our module's path, their module's name, location.
    prefix: their module of prefixes, None for none.
    loras: option, or letter of `attn_matrices`: our role or pattern.
  """

  trunk: str
  model: str
  bottlenecks: tuple[tuple[str, str, str], ...]
  prefix: str | None
  loras: Mapping[str, str]


_QKV = {"q": "query", "k": "key", "v": "value"}
_BERT = Family(
  "bert",
  "BertAdapterModel",
  (
    (
      r"encoder/layer/(\d+)/attention/output/(?:dropout|LayerNorm)",
      "encoder.layer.{}.attention.output",
      "mh_adapter",
    ),
    (
      r"encoder/layer/(\d+)/output/(?:dropout|LayerNorm)",
      "encoder.layer.{}.output",
      "output_adapter",
    ),
  ),
  "encoder.layer.{}.attention.self.prefix_tuning",
  _QKV | {"intermediate_lora": "ffn_in", "output_lora": "ffn_out"},
)
_LLAMA = Family(
  "model",
  "LlamaAdapterModel",
  (
    (r"layers/(\d+)/self_attn", "layers.{}.attention_adapters", "mh_adapter"),
    (r"layers/(\d+)/mlp", "layers.{}.output_adapters", "output_adapter"),
  ),
  "layers.{}.self_attn.prefix_tuning",
  # Named so there: the product that ends a layer is its intermediate one.
  _QKV | {"intermediate_lora": "mlp/down_proj", "output_lora": "mlp/up_proj"},
)
FAMILIES = {
  "bert": _BERT,
  "roberta": _BERT._replace(trunk="roberta", model="RobertaAdapterModel"),
  "gpt2": Family(
    "transformer",
    "GPT2AdapterModel",
    (
      (r"h/(\d+)/attn", "h.{}.attention_adapters", "mh_adapter"),
      (r"h/(\d+)/mlp", "h.{}.output_adapters", "output_adapter"),
    ),
    "h.{}.attn.prefix_tuning",
    _QKV | {"intermediate_lora": "ffn_in", "output_lora": "ffn_out"},
  ),
  "llama": _LLAMA,
  "mistral": _LLAMA._replace(model="MistralAdapterModel"),
  "t5": Family(
    "transformer",
    "T5AdapterModel",
    (
      (r"encoder/block/(\d+)/layer/0/dropout", "encoder.block.{}.layer.0", "mh_adapter"),
      (r"encoder/block/(\d+)/layer/1/dropout", "encoder.block.{}.layer.1", "output_adapter"),
      (r"decoder/block/(\d+)/layer/0/dropout", "decoder.block.{}.layer.0", "mh_adapter"),
      (r"decoder/block/(\d+)/layer/1/dropout", "decoder.block.{}.layer.1", "cross_adapter"),
      (r"decoder/block/(\d+)/layer/2/dropout", "decoder.block.{}.layer.2", "output_adapter"),
    ),
    None,
    {},
  ),
}
NO_T5_PREFIX = (
  "AdapterHub's prefixes in T5 move the distances that its attention is biased by, which is not "
  "done here"
)


def family(model: Any) -> Family:
  """The names for a model.

  Raises:
    ValueError: if AdapterHub has none for its family.
  """
  kind = getattr(getattr(model, "config", None), "model_type", None)
  if kind not in FAMILIES:
    raise ValueError(
      f"a {type(model).__name__} of model_type {kind!r} cannot exchange files with AdapterHub; "
      f"those that can are {', '.join(FAMILIES)}"
    )
  return FAMILIES[kind]


class Layer(NamedTuple):
  """One layer of a site or leaf.

  Attributes:
    index: on the stacked axis, None if the layers are looped.
    number: of the layer as AdapterHub counts, an encoder's layers before the decoder's.
    path: the looped path in the trunk.
  """

  index: int | None
  number: int
  path: str


def layers_of(model: Any, path: str) -> list[Layer]:
  """The layers behind a path; none if it lies in no layer."""
  offset, prefix = 0, f"{model.prefix}/" if model.prefix else ""
  for root, count in stacks(model):
    if path.startswith(f"{root}/"):
      rest = path[len(root) + 1 :]
      inner = root.removeprefix(prefix)
      if scanned(model, path) is not None:
        return [Layer(i, offset + i, f"{inner}/{i}/{rest}") for i in range(count)]
      number, _, rest = rest.partition("/")
      if not number:  # what holds the layers
        return []
      return [Layer(None, offset + int(number), f"{inner}/{number}/{rest}")]
    offset += count
  return []


def count_layers(model: Any) -> int:
  """How many layers there are, an encoder's and the decoder's together."""
  return sum(count for _, count in stacks(model))


def layers_with(model: Any, location: str) -> list[int]:
  """The numbers of the layers that have a place for adapters."""
  found, offset, prefix = [], 0, f"{model.prefix}/" if model.prefix else ""
  for root, count in stacks(model):
    inner = f"{root.removeprefix(prefix)}/"
    if any(p.startswith(inner) and at == location for p, _, at in family(model).bottlenecks):
      found += range(offset, offset + count)
    offset += count
  return found


def bottleneck_name(kind: Family, path: str) -> tuple[str, str] | None:
  """Their module and its location for a looped path in the trunk."""
  for pattern, name, location in kind.bottlenecks:
    if found := re.fullmatch(pattern, path):
      return name.format(found[1]), location
  return None


def role_entry(model: Any, path: str, *roles: str) -> Role | None:
  """The entry of one of the roles that serves a module."""
  entries = (e for role in roles for e in model.roles.get(role, ()))
  return next((e for e in entries if matches(e.pattern, path)), None)


def without_layers(
  model: Any, sites: tuple[Site, ...], leave_out: Collection[int]
) -> tuple[Site, ...]:
  """Sites of which those in some layers play no role and are no leaves."""
  if not leave_out:
    return sites
  if getattr(model, "scan", False):
    raise ValueError(
      f"leave_out={sorted(leave_out)} chooses among layers that a scan stacks; load the model with "
      "scan=False"
    )
  kept = []
  for site in sites:
    left = any(layer.number in leave_out for layer in layers_of(model, f"{site.path}/"))
    if not left:
      kept.append(site)
    elif site.kind == "call":
      kept.append(dataclasses.replace(site, roles=()))
  return tuple(kept)
