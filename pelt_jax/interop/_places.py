"""How the leaves of params and the tensors of a torch model name each other."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pelt_jax._node import Node, Weight, strip
from pelt_jax._site import matches
from pelt_jax._walk import walk
from pelt_jax.models import torch_name
from pelt_jax.models._layers import stacks
from pelt_jax.models._names import transposed

LINEAR, TABLE = "kernel", "embedding"


class Place(NamedTuple):
  """One torch tensor.

  Attributes:
    path: the leaf's path in params.
    layer: index on the leaf's layer axis, None if the leaf is not scanned.
    module: the torch module's name, dots between components.
    name: the tensor's name in that module (`weight`, `bias`, ...).
    shape: shape of our leaf for this layer: a kernel is (in, out).
    transposed: whether torch's tensor is the leaf's transpose: Linear keeps (out, in), but GPT-2's
      Conv1D (in, out).
  """

  path: str
  layer: int | None
  module: str
  name: str
  shape: tuple[int, ...]
  transposed: bool = False

  @property
  def leaf(self) -> str:
    """The leaf's own name, such as `kernel`."""
    return self.path.rpartition("/")[2]

  @property
  def tensor(self) -> str:
    """The torch tensor's full name."""
    return f"{self.module}.{self.name}" if self.module else self.name


def places(model: Any, params: Mapping) -> dict[str, Place]:
  """Every leaf of params by its torch tensor's name, layer by layer where layers are scanned.

  Bypass nodes and generators stand for no tensor and are left out.
  """
  found = {}
  for path, value in walk(params):
    if isinstance(value, Node) and not isinstance(value, Weight):
      continue
    shape = tuple(value.shape if isinstance(value, Weight) else strip(value).shape)
    stack = scanned(model, path)
    root, count = stack or ("", 0)
    for layer in range(count) if stack else [None]:
      looped = path if layer is None else f"{root}/{layer}{path[len(root) :]}"
      module, _, name = torch_name(looped).rpartition(".")
      own = shape if layer is None else shape[1:]
      place = Place(path, layer, module, name, own, transposed(path, model))
      found[place.tensor] = place
  return found


def scanned(model: Any, path: str) -> tuple[str, int] | None:
  """Path and length of the scanned stack that a leaf belongs to."""
  if not getattr(model, "scan", False):
    return None
  return next((s for s in stacks(model) if path.startswith(f"{s[0]}/")), None)


# Endings of Hugging Face's class names; the first that fits counts.
_TASKS = {
  "ForSequenceClassification": "SEQ_CLS",
  "ForTokenClassification": "TOKEN_CLS",
  "ForCausalLM": "CAUSAL_LM",
  "LMHeadModel": "CAUSAL_LM",
  "ForConditionalGeneration": "SEQ_2_SEQ_LM",
  "Model": "FEATURE_EXTRACTION",
}


def task_type(model: Any) -> str | None:
  """PEFT's name of the model's task, None for a model that does not tell."""
  architecture = getattr(model, "architecture", "")
  return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)


def is_tied(model: Any, params: Mapping) -> bool:
  """Whether the output head is the embedding table itself."""
  generates = task_type(model) in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
  return generates and "lm_head" not in params and bool(model.config.tie_word_embeddings)


def is_tokens(model: Any, place: Place) -> bool:
  """Whether a tensor is the table of the model's tokens."""
  parent = place.path.rpartition("/")[0]
  roles = getattr(model, "roles", {}).get("embedding", ())
  return place.leaf == TABLE and any(matches(role.pattern, parent) for role in roles)


def is_copied(model: Any, place: Place) -> bool:
  """Whether torch's encoder and decoder read this table under names of their own."""
  return hasattr(model, "stacks") and is_tokens(model, place)
