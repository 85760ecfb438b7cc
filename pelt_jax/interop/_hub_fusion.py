"""AdapterFusion in AdapterHub's folders: what fuses, beside the folders of what is fused."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import BYPASS
from pelt_jax._site import Site
from pelt_jax._walk import update_at, walk
from pelt_jax.interop._hub_config import BottleneckConfig, read_configs
from pelt_jax.interop._hub_export import adapter_part
from pelt_jax.interop._hub_files import ADAPTER, FUSION, Part, Tensors, read_json
from pelt_jax.interop._hub_head import common_fields
from pelt_jax.interop._hub_load import load_adapter
from pelt_jax.interop._hub_names import bottleneck_name, family, layers_of
from pelt_jax.interop._hub_reader import check_base, traced
from pelt_jax.interop._hub_write import Notes, at_layer
from pelt_jax.interop._peft_files import complain
from pelt_jax.methods._adapter_fusion import adapter_fusion
from pelt_jax.nodes import Fusion

REGULARIZATION = 0.01  # of |V - I|² there, where there is any
# Options: the only value that can be read, and what another one means.
_PLAIN = {
  "query": (True, "the weights need a query"),
  "key": (True, "the weights need keys"),
  "query_before_ln": (False, "the query is read before the norm, here what the adapters read"),
  "residual_before": (False, "the residual is added to what is fused"),
  "temperature": (False, "a temperature that falls with every call"),
}
_KNOWN = {*_PLAIN, "value", "value_before_softmax", "value_initialized", "regularization"}


def load_fusion(
  folder: pathlib.Path,
  folders: Mapping[str, pathlib.Path] | None,
  model: Any,
  base: Mapping,
  sites: tuple[Site, ...] | None,
  strict: bool,
) -> dict:
  """Params with the adapters of several folders, fused as `folder` says."""
  file = folder / FUSION.config
  raw = read_json(file, "name", "config")
  check_base(raw, file, model)
  name, config = str(raw["name"]), dict(raw["config"])
  names = raw.get("adapter_names") or name
  names = names.split(",") if isinstance(names, str) else list(names)
  value = _checked(config, file, strict)
  folders = {n: folder.parent / n for n in names} if folders is None else folders
  if set(folders) != set(names):
    raise ValueError(f"{file} fuses the adapters {names}; adapters names {sorted(folders)}")
  members, sites = {}, traced(model, sites)
  for member in names:
    if not folders[member].is_dir():
      raise FileNotFoundError(
        f"{file} fuses the adapter {member!r}, but there is no folder {folders[member]}; pass "
        f"adapters={{{member!r}: its folder, ...}}"
      )
    _check_member(folders[member], strict)
    members[member] = load_adapter(folders[member], model, base, sites, strict)
  tensors = Tensors(folder, FUSION)
  regularization = REGULARIZATION if value and config.get("regularization") else 0.0
  method = adapter_fusion(
    members, static=not value, regularization=regularization, dtype=tensors.dtype
  )
  params = method.init(jax.random.key(0), dict(base), sites)
  # A file may also hold fusions whose names go on after this one's.
  tensors.left = {k for k in tensors.left if f".adapter_fusion_layer.{name}." in k}
  changes = {
    path: node.replace(branch=_filled(node.branch, path, model, tensors, name))
    for path, node in _fusions(params)
  }
  complain(sorted(tensors.left), f"{tensors.file} has unexpected tensors", strict)
  return update_at(params, changes)


def _checked(config: Mapping[str, Any], file: pathlib.Path, strict: bool) -> bool:
  """Whether there are values; raises for what cannot be read."""
  problems = [
    f"{k}={config[k]!r}: {why}"
    for k, (plain, why) in _PLAIN.items()
    if config.get(k, plain) != plain
  ]
  if problems:
    raise ValueError(f"{file} sets what cannot be read:\n  " + "\n  ".join(problems))
  unknown = sorted(set(config) - _KNOWN - {"dropout_prob"})
  complain(unknown, f"{file} has unknown fields that may change the function", strict)
  if rate := config.get("dropout_prob"):
    what = f"{file} sets what acts in training alone, and would act otherwise here"
    complain([f"dropout_prob={rate}: it drops scores, not weights"], what, strict)
  return bool(config.get("value", True))


def _check_member(folder: pathlib.Path, strict: bool) -> None:
  file = folder / ADAPTER.config
  configs = read_configs(read_json(file, "name", "config"), file, strict)
  if why := _unfit(configs):
    raise ValueError(f"{file}: {why}, which cannot be fused")


def _unfit(configs: list) -> str | None:
  if len(configs) > 1 or not isinstance(configs[0], BottleneckConfig):
    return "no bottleneck adapter alone"
  if configs[0].style == "parallel":
    return "a parallel adapter, whose residual AdapterHub's fusion counts twice"
  return "a gated adapter, whose gate AdapterHub's fusion leaves out" if configs[0].gated else None


def _fusions(params: Mapping) -> list[tuple[str, Any]]:
  """Paths and nodes of the places that fuse."""
  return [(p, n) for p, n in walk(params) if isinstance(getattr(n, "branch", None), Fusion)]


def _places(path: str, model: Any, fusion: str) -> list[tuple[int | None, str]]:
  """Layer's index and their module, for every layer behind a path."""
  found = []
  for layer in layers_of(model, path.removesuffix(BYPASS).rstrip("/")):
    name = bottleneck_name(family(model), layer.path)
    if name is not None:
      found.append((layer.index, f"{name[0]}.adapter_fusion_layer.{fusion}"))
  return found


def _filled(branch: Fusion, path: str, model: Any, tensors: Tensors, fusion: str) -> Fusion:
  width, trunk = model.config.hidden_size, f"{family(model).trunk}."
  trunk = trunk if any(k.startswith(trunk) for k in tensors.values) else ""
  places = _places(path, model, fusion)

  def take(name: str, shape: tuple[int, ...]) -> jax.Array:
    arrays = [tensors.read(f"{trunk}{at}.{name}", shape) for _, at in places]
    arrays = [a.T for a in arrays]
    return jnp.asarray(arrays[0] if places[0][0] is None else np.stack(arrays))

  fields = {n: take(f"{n}.weight", (width, width)) for n in ("query", "key")}
  fields |= {f"{n}_bias": take(f"{n}.bias", (width,)) for n in ("query", "key")}
  if branch.value is not None:
    fields["value"] = take("value.weight", (width, width))
  return branch.replace(**fields)


class FusionParts(NamedTuple):
  """The folders of a fusion: of its adapters by name, and its own."""

  members: dict[str, Part]
  name: str
  fusion: Part


def fusion_parts(
  params: Mapping, model: Any, base_model: str | None, strict: bool
) -> FusionParts | None:
  """What to write for a fusion, None where nothing is fused."""
  fusions = _fusions(params)
  if not fusions:
    return None
  notes, first = Notes(model), fusions[0][1].branch
  name = ",".join(first.names)
  members: dict[str, dict] = {n: {} for n in first.names}
  for path, node in fusions:
    branch = node.branch
    same = branch.names == first.names and (branch.value is None) == (first.value is None)
    if not same or branch.regularization != first.regularization:
      notes.problem(path, "other adapters are fused, or otherwise, than elsewhere")
      continue
    if branch.kept is not None:
      notes.problem(path, "some of its adapters were pruned, and there every layer fuses the same")
      continue
    if branch.regularization not in (0.0, REGULARIZATION):
      notes.otherwise.append(
        f"{path}: regularization={branch.regularization}, AdapterHub has {REGULARIZATION} or none"
      )
    notes.drops(path, branch.dropout, "AdapterHub drops scores, not weights")
    for i, member in enumerate(first.names):
      one = jax.tree.map(lambda x, i=i, s=node.stacked: jnp.take(x, i, axis=s), branch.members)
      members[member][path] = node.replace(branch=one)
    for index, at in _places(path, model, name):
      for field in ("query", "key", "value") if branch.value is not None else ("query", "key"):
        notes.put(f"{at}.{field}.weight", at_layer(branch.array(field), index).T)
        if field != "value":
          notes.put(f"{at}.{field}.bias", at_layer(branch.array(f"{field}_bias"), index))
  plain = [p for p, n in walk(params) if hasattr(n, "branch") and not isinstance(n.branch, Fusion)]
  for path in plain:
    notes.problem(path, "an adapter beside fused ones")
  if notes.problems:
    raise ValueError("AdapterHub's files cannot hold:\n  " + "\n  ".join(notes.problems))
  complain(notes.otherwise, "AdapterHub would compute something else here", strict)
  parts = {}
  for member, changes in members.items():
    part = parts[member] = adapter_part(
      update_at(params, changes), model, member, base_model, strict
    )
    if why := _unfit(read_configs(part.config, pathlib.Path(member), strict)):
      raise ValueError(f"AdapterHub's files cannot hold {member!r}: {why}")
  value = first.value is not None
  config = {
    "query": True,
    "key": True,
    "value": value,
    "query_before_ln": False,
    "regularization": value and first.regularization > 0,
    "residual_before": False,
    "temperature": False,
    "value_before_softmax": True,
    "value_initialized": value,
    "dropout_prob": None,
  }
  fields = {**common_fields(model, name, base_model), "adapter_names": list(first.names)}
  tensors = {f"{family(model).trunk}.{k}": v for k, v in notes.tensors.items()}
  return FusionParts(parts, name, Part({**fields, "config": config}, tensors))
