"""A file of AdapterHub's, read by the places of a model."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from pelt_jax._linen_sites import sites as sites_of
from pelt_jax._site import Site
from pelt_jax._walk import update_at, walk
from pelt_jax.interop._hub_files import Tensors
from pelt_jax.interop._hub_names import family, layers_of
from pelt_jax.nodes import FusedLora, Guard, LoraWeight, MeanGate

# How tensors were named before adapters of text had one name for all layers.
_OLD_NAMES = {
  "attention_text_task_adapters": "adapters",
  "attention_text_lang_adapters": "adapters",
  "layer_text_task_adapters": "adapters",
  "layer_text_lang_adapters": "adapters",
}


LORAS = (LoraWeight, FusedLora)


def check_base(raw: Mapping[str, Any], file: pathlib.Path, model: Any) -> None:
  """Raises if a file was made for another base."""
  kind, width = raw.get("model_type"), raw.get("hidden_size")
  if kind is not None and kind != model.config.model_type:
    raise ValueError(
      f"{file} was made for a base of model_type {kind!r}, this one is {model.config.model_type!r}"
    )
  if width is not None and width != model.config.hidden_size:
    raise ValueError(
      f"{file} was made for a base of width {width}, this one has {model.config.hidden_size}"
    )


def traced(model: Any, sites: tuple[Site, ...] | None) -> tuple[Site, ...]:
  """The sites given, or those of a call with token ids."""
  return sites_of(model, jax.ShapeDtypeStruct((1, 2), jnp.int32)) if sites is None else sites


class Reader:
  """The tensors of an adapter, and how they fill nodes."""

  def __init__(
    self, tensors: Tensors, model: Any, sites: tuple[Site, ...], name: str, file: pathlib.Path
  ):
    self.tensors, self.model, self.sites, self.name, self.file = tensors, model, sites, name, file
    self.family = family(model)
    for old, new in _OLD_NAMES.items():
      tensors.values = {k.replace(old, new): v for k, v in tensors.values.items()}
    tensors.left = set(tensors.values)
    trunk = f"{self.family.trunk}."
    self.trunk = trunk if any(k.startswith(trunk) for k in tensors.values) else ""
    self.dtype = tensors.dtype

  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor, its name counted from the trunk."""
    return self.tensors.read(self.trunk + name, shape)

  def stacked(self, path: str, one: Callable[[Any], np.ndarray]) -> jax.Array:
    """One array per layer, stacked if a scan does."""
    layers = layers_of(self.model, path)
    arrays = [one(layer) for layer in layers]
    if layers[0].index is None:
      return jnp.asarray(arrays[0])
    if len({a.shape for a in arrays}) > 1:
      raise ValueError(
        f"{self.file}: layers have other shapes, {sorted({a.shape for a in arrays})}, but a scan "
        f"stacks them at {path!r}; load the model with scan=False"
      )
    return jnp.asarray(np.stack(arrays))

  def gate(
    self, path: str, name: Callable[[Any], str], width: int, stacked: int, gates: int = 1
  ) -> MeanGate:
    """AdapterHub's gates are means over all tokens, padding too."""
    kernel = self.stacked(path, lambda at: self.read(f"{name(at)}.weight", (gates, width)).T)
    bias = self.stacked(path, lambda at: self.read(f"{name(at)}.bias", (gates,)))
    return MeanGate(kernel, bias, mask=None, pool="mean", group="trainable", stacked=stacked)

  def filled(self, params: dict, method: Any, sites: tuple[Site, ...], fill: Callable) -> dict:
    """The method's params, its nodes as `fill(path, node)` makes them."""
    old, new = dict(walk(params)), method.init(jax.random.key(0), params, sites)
    changes = {}
    for path, value in walk(new):
      inner = value.base if isinstance(value, Guard) else value
      if value is old.get(path) or (inner is not value and not isinstance(inner, LORAS)):
        continue
      changes[path] = fill(path, value)
    return update_at(new, changes)

  def drop_copies(self) -> None:
    """Ticks off tensors that torch holds twice: a prefix in every layer, a norm in its sequence."""
    values = self.tensors.values
    for key in sorted(self.tensors.left):
      _, pool, rest = key.partition(".pool.")
      twin = f"{self.trunk}prefix_tuning.{rest}" if pool else key
      if twin not in values and pool:
        found = [k for k in values if k.endswith(f".pool.{rest}") and k not in self.tensors.left]
        twin = next(iter(found), key)
      twin = twin.replace(".adapter_down.0.", ".adapter_norm_before.")
      if twin != key and twin in values:
        if not np.array_equal(values[key], values[twin]):
          raise ValueError(f"{self.tensors.file} is damaged: {key} and {twin}, one tensor, differ")
        self.tensors.left.discard(key)


def boxed(old: Any, value: jax.Array) -> Any:
  """The value in the box that the old one has, if any."""
  return old.replace(value=value) if meta.is_axis_metadata(old) else value
