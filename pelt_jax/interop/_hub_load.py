"""Reading adapters that AdapterHub wrote."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pelt_jax._node import BYPASS, GENERATORS, Weight
from pelt_jax._site import Site, find
from pelt_jax._transform import over
from pelt_jax.interop._hub_config import (
  BottleneckConfig,
  Config,
  LoraConfig,
  PrefixConfig,
  read_configs,
)
from pelt_jax.interop._hub_files import ADAPTER, Tensors, read_json
from pelt_jax.interop._hub_names import (
  LOCATIONS,
  NO_T5_PREFIX,
  bottleneck_name,
  count_layers,
  without_layers,
)
from pelt_jax.interop._hub_reader import LORAS, Reader, boxed, check_base, traced
from pelt_jax.interop._peft_files import complain
from pelt_jax.methods._adapter import adapter
from pelt_jax.methods._lora import lora
from pelt_jax.methods._prefix_tuning import prefix_tuning
from pelt_jax.models import torch_name
from pelt_jax.nodes import FusedLora, Gated, Normalized, Tuned


def load_adapter(
  folder: pathlib.Path, model: Any, base: Mapping, sites: tuple[Site, ...] | None, strict: bool
) -> dict:
  """Params with the nodes of one adapter's folder."""
  file = folder / ADAPTER.config
  raw = read_json(file, "name", "config")
  check_base(raw, file, model)
  configs = read_configs(raw, file, strict)
  reader = _Adapter(Tensors(folder, ADAPTER), model, traced(model, sites), str(raw["name"]), file)
  params = dict(base)
  for config in configs:
    params = reader.add(params, config)
  reader.drop_copies()
  complain(sorted(reader.tensors.left), f"{reader.tensors.file} has unexpected tensors", strict)
  return params


class _Adapter(Reader):
  """Adds methods to params and fills them with a file's tensors."""

  def add(self, params: dict, config: Config) -> dict:
    """Params with one more method."""
    odd = [i for i in config.leave_out if not 0 <= i < count_layers(self.model)]
    if odd:
      raise ValueError(
        f"{self.file}: leave_out={list(config.leave_out)}, but the base has layers 0 to "
        f"{count_layers(self.model) - 1}"
      )
    sites = without_layers(self.model, self.sites, config.leave_out)
    if isinstance(config, BottleneckConfig):
      return self._add_bottlenecks(params, config, sites)
    if isinstance(config, PrefixConfig):
      return self._add_prefixes(params, config, sites)
    return self._add_loras(params, config, sites)

  def _add_bottlenecks(
    self, params: dict, config: BottleneckConfig, sites: tuple[Site, ...]
  ) -> dict:
    parallel = config.style == "parallel"
    known = {s.role for site in sites for s in site.roles}
    # A decoder-only model or encoder has no cross attention, whatever the file says of it.
    targets = tuple(r for n in config.locations if (r := LOCATIONS[n]) in known)
    if not targets:
      raise ValueError(f"{self.file}: {config.locations} name no place in {type(self.model)}")
    scaled = config.scaling != 1.0
    method = adapter(
      "houlsby" if config.style == "houlsby" else "parallel" if parallel else "pfeiffer",
      bottleneck=1,
      activation=config.activation,
      scaling=config.scaling if scaled else None,
      tap="residual" if parallel else None,
      norm=config.norm,
      train_norms=False,
      targets=targets,
      dtype=self.dtype,
    )
    return self.filled(params, method, sites, lambda p, n: self._bottleneck(p, n, config))

  def _bottleneck(self, path: str, node: Any, config: BottleneckConfig) -> Any:
    path = path.removesuffix(BYPASS).rstrip("/")
    width, stacked = self.model.config.hidden_size, node.stacked

    def at(layer: Any) -> str:
      found = bottleneck_name(self.family, layer.path)
      assert found is not None, layer.path
      return f"{found[0]}.adapters.{self.name}"

    def take(name: str, shape: Callable[[int], tuple[int, ...]], transpose: bool = False) -> Any:
      def one(layer: Any) -> np.ndarray:
        m = config.bottleneck(width, layer.number)
        value = self.read(f"{at(layer)}.{name}", shape(m))
        return value.T if transpose else value

      return self.stacked(path, one)

    branch = node.branch
    inner = branch.branch if isinstance(branch, Normalized) else branch
    scaling = inner.scaling
    if isinstance(scaling, Tuned):
      value = take("scaling", lambda m: (width if config.scaling == "channel" else 1,))
      scaling = scaling.replace(value=value if config.scaling == "channel" else value[..., 0])
    down = "adapter_down.1" if config.norm else "adapter_down.0"
    made: Any = inner.replace(
      down=take(f"{down}.weight", lambda m: (m, width), True),
      down_bias=take(f"{down}.bias", lambda m: (m,)),
      up=take("adapter_up.weight", lambda m: (width, m), True),
      up_bias=take("adapter_up.bias", lambda m: (width,)),
      scaling=scaling,
    )
    if config.norm:
      made = branch.replace(
        scale=take("adapter_norm_before.weight", lambda m: (width,)),
        bias=take("adapter_norm_before.bias", lambda m: (width,)),
        branch=made,
      )
    if config.gated:
      gate = self.gate(path, lambda layer: f"{at(layer)}.gate", width, stacked)
      made = Gated(gate, made, group=node.group, stacked=stacked)
    return node.replace(branch=made)

  def _add_prefixes(self, params: dict, config: PrefixConfig, sites: tuple[Site, ...]) -> dict:
    name = self.family.prefix
    if name is None:
      raise ValueError(f"{self.file}: {NO_T5_PREFIX}")
    cores = [t.site for t in find(sites, "attention", kind="call")]
    cores.sort(key=lambda core: core.layer or 0)
    layers = sum(core.stacked[0] if core.stacked else 1 for core in cores)
    heads, size = cores[0].inputs[1][2:]
    width, out = self.model.config.hidden_size, 2 * layers * heads * size
    at = f"prefix_tuning.prefix_tunings.{self.name}.self_prefix"
    if not any(k.startswith(f"{self.trunk}{at}") for k in self.tensors.values):
      at = f"{name.format(0)}.pool.prefix_tunings.{self.name}.self_prefix"
    common: dict[str, Any] = dict(dropout=config.dropout, shift_positions=False, dtype=self.dtype)
    if config.hidden is None:
      table = self.read(f"{at}.control_trans", (config.length * out,))
      table = table.reshape(config.length, layers, 2, heads, size)
      init = {}
      for i, core in enumerate(cores):
        both = table.transpose(2, 1, 0, 3, 4) if core.stacked else table[:, i].swapaxes(0, 1)
        init[core.path] = (both[0], both[1])
      method = prefix_tuning(config.length, reparametrize=False, init=init, **common)
    else:
      method = prefix_tuning(config.length, hidden=config.hidden, embed_dim=width, **common)
    first, second = f"{at}.control_trans.0", f"{at}.control_trans.2"

    def fill(path: str, node: Any) -> Any:
      if path.startswith(f"{GENERATORS}/"):
        h = config.hidden or 0
        arrays = {
          "embedding": self.read(f"{at}.wte.weight", (config.length, width)),
          "w1": self.read(f"{first}.weight", (h, width)).T,
          "b1": self.read(f"{first}.bias", (h,)),
          "w2": self.read(f"{second}.weight", (out, h)).T,
          "b2": self.read(f"{second}.bias", (out,)),
        }
        return node.replace(**{n: jnp.asarray(x) for n, x in arrays.items()})
      if not config.gated:
        return node
      place = path.removesuffix(f"/{BYPASS}")
      gate = lambda layer: f"{name.format(_number(layer.path))}.prefix_gates.{self.name}"
      return node.replace(gate=self.gate(place, gate, width, node.stacked))

    return self.filled(params, method, sites, fill)

  def _add_loras(self, params: dict, config: LoraConfig, sites: tuple[Site, ...]) -> dict:
    table = self.family.loras
    if missing := [t for t in config.targets if t not in table]:
      raise ValueError(
        f"{self.file}: LoRA on {missing} of a {self.model.config.model_type} cannot be read"
      )
    fused = self.model.config.model_type == "gpt2"
    letters = [t for t in config.targets if t in "qkv"]
    common: dict[str, Any] = dict(dropout=config.dropout, dtype=self.dtype)
    fill = lambda path, value: over(value, lambda n: self._lora(path, n, config))
    alone = tuple(table[t] for t in config.targets if not fused or t not in letters)
    if fused and letters:
      chosen = tuple(i for i, letter in enumerate("qkv") if letter in letters)
      method = lora(config.rank, config.alpha, targets="query", fused=(chosen, 3), **common)
      params = self.filled(params, method, sites, fill)
    if alone:
      method = lora(config.rank, config.alpha, targets=alone, **common)
      params = self.filled(params, method, sites, fill)
    return params

  def _lora(self, path: str, node: Any, config: LoraConfig) -> Weight:
    assert isinstance(node, LORAS)
    at = lambda layer: f"{torch_name(layer.path).removesuffix('.weight')}.loras.{self.name}"
    r, g = config.rank, len(node.chosen) if isinstance(node, FusedLora) else 1
    n_in, n_out = node.array("a").shape[-2], node.array("b").shape[-1]

    def a(layer: Any) -> np.ndarray:
      value = self.read(f"{at(layer)}.lora_A", (g * r, n_in))
      return value.reshape(g, r, n_in).swapaxes(1, 2) if isinstance(node, FusedLora) else value.T

    def b(layer: Any) -> np.ndarray:
      value = self.read(f"{at(layer)}.lora_B", (g * n_out, r))
      return value.reshape(g, n_out, r).swapaxes(1, 2) if isinstance(node, FusedLora) else value.T

    node = node.replace(
      a=boxed(node.a, self.stacked(path, a)), b=boxed(node.b, self.stacked(path, b))
    )
    if not config.gated:
      return node
    gate = self.gate(path, lambda layer: f"{at(layer)}.gate", n_in, node.stacked, g)
    return node.replace(scaling=gate)


def _number(path: str) -> str:
  """A layer's number in its own stack."""
  return next(part for part in path.split("/") if part.isdigit())
