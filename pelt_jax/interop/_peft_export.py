"""Writing LoRA folders that `peft.PeftModel.from_pretrained` loads."""

import collections
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pelt_jax._node import GENERATORS, Node, Weight, materialize, walk
from pelt_jax.interop._factors import Factors, all_factors, combined, plain
from pelt_jax.interop._places import LINEAR, TABLE, Place, is_tied, places, task_type
from pelt_jax.models._safetensors import write
from pelt_jax.nodes import Guard, Tuned

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEADS = ("classifier", "score")  # PEFT saves these by itself for SEQ_CLS and TOKEN_CLS
ORDER = ("gate_up_proj", "down_proj")


def export(
  folder: str | os.PathLike,
  params: Mapping,
  model: Any,
  *,
  base_model_name: str | None = None,
  parameter_order: Sequence[str] = ORDER,
) -> None:
  """Writes the low-rank changes and trained leaves in params as a PEFT LoRA adapter.

  The file computes what params compute. Scaling is what a node stores, so `lora_alpha` is
  scaling * rank with `use_rslora` false, also for what was made with rsLoRA. Unequal ranks and
  alphas go to `rank_pattern` and `alpha_pattern`, under the full path of the module. Dtypes are
  kept. In particular:

  - Scanned layers are written one by one, without components that are zero on both sides.
  - Two LoRAs on one leaf become one of the sum of their ranks.
  - LoRAs on parts of a fused projection become one of rank g * r, in block form. PEFT trains
    the zeros too.
  - `Tuned` modules become `modules_to_save`; so does the head of a classifier, trained or not,
    since its base may lack it. `Tuned` biases elsewhere become `bias="lora_only"` or `"all"`.
  - Adapted or trained tables with tied heads are marked `ensure_weight_tying`.
  - Leaves that are neither kernels nor tables become `target_parameters`. A torch module that
    contracts the first axis of its experts (E, in, out) has `is_transposed = True`.

  Both files are written under temporary names, then renamed.

  Args:
    folder: made if absent.
    params: params with nodes, looped or scanned.
    model: the module they belong to.
    base_model_name: folder or hub id of the base model, for `base_model_name_or_path`.
    parameter_order: names of raw parameters in the order in which a torch module that has several
      registers them; the first one lies innermost in the file.

  Raises:
    ValueError: listing every path that a LoRA folder cannot hold and why, before anything is
      written.

  Example:
    >>> import json, tempfile, pathlib, flax.linen as nn, jax, jax.numpy as jnp
    >>> import pelt_jax as pelt
    >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = pelt.lora(rank=2, alpha=6, targets="kernel")
    >>> params = method.init(jax.random.key(1), params, pelt.sites(model, x))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   pelt.interop.peft.export(folder, params, model)
    ...   config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
    >>> config["target_modules"], config["r"], config["lora_alpha"]
    (['layers_0'], 2, 6)
  """
  plan = _Plan(model, params, tuple(parameter_order))
  config, tensors = plan.config(base_model_name), plan.tensors
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  temporary = {name: folder / f".{name}.{os.getpid()}.new" for name in (TENSORS, CONFIG)}
  try:
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    write(temporary[TENSORS], shapes, tensors.__getitem__, {"format": "pt"})
    temporary[CONFIG].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name, path in temporary.items():
      os.replace(path, folder / name)
  finally:
    for path in temporary.values():
      path.unlink(missing_ok=True)


class _Plan:
  """What goes into the folder; making it finds every problem."""

  def __init__(self, model: Any, params: Mapping, order: tuple[str, ...]):
    self.model, self.params = model, params
    self.places = places(model, params)
    self.problems: list[str] = []
    self.loras: dict[Place, Factors] = {}
    self.tuned: set[Place] = set()
    self.leaves: dict[str, Any] = {}
    self._collect()
    self.head = self._head()
    self.saved = self._saved_modules()
    self.bias = self._bias()
    self.tied = is_tied(model, params) and (
      any(p.leaf == TABLE for p in self.loras) or any(p.leaf == TABLE for p in self.tuned)
    )
    self.dropout = self._dropout()
    self.nesting = self._nesting(order)
    if not self.loras and not self.problems:
      self.problems.append(
        "there is no low-rank pair, and PEFT has no file for trained leaves alone; use pelt.save"
      )
    if self.problems:
      raise ValueError("PEFT's LoRA files cannot hold:\n  " + "\n  ".join(self.problems))
    self.tensors = self._tensors()

  def _collect(self) -> None:
    by_path: dict[str, list[Place]] = collections.defaultdict(list)
    for place in self.places.values():
      by_path[place.path].append(place)
    for path, value in walk(self.params):
      if path.split("/")[0] == GENERATORS:
        self.problems.append(f"{path}: a generator; run pelt.fold first")
        continue
      if isinstance(value, Node) and not isinstance(value, Weight):
        self.problems.append(f"{path}: a {type(value).__name__} wraps a module's call")
        continue
      while isinstance(value, Guard):
        value = value.base
      self.leaves[path] = plain(value.value) if isinstance(value, Tuned) else plain(value)
      if isinstance(value, Tuned):
        self.tuned.update(by_path[path])
      elif isinstance(value, Weight):
        try:
          self._lora(value, by_path[path])
        except ValueError as error:
          self.problems.append(f"{path}: {error}")

  def _lora(self, value: Weight, at: list[Place]) -> None:
    terms = all_factors(value)
    for place in at if terms else []:
      stacked = value.stacked - (place.layer is not None)
      if stacked:
        raise ValueError(f"it is stacked {stacked} times by scans or maps other than the layers'")
      if not place.module:
        raise ValueError("it belongs to the root module, which PEFT cannot wrap")
      one = combined([t.layer(place.layer) for t in terms])
      if one.experts and place.leaf in (LINEAR, TABLE):
        raise ValueError("a kernel with a batch axis has no counterpart among torch's modules")
      if one.rate is not None and place.leaf not in (LINEAR, TABLE) and float(one.rate):
        raise ValueError("PEFT allows no dropout on target_parameters")
      if one.rank:  # all zero: a layer of a scan that is not adapted
        self.loras[place] = one

  def _head(self) -> tuple[str, ...]:
    """The head's module if PEFT saves it by itself, nothing if a LoRA lives there."""
    if task_type(self.model) not in ("SEQ_CLS", "TOKEN_CLS"):
      return ()
    heads = tuple(h for h in HEADS if any(_inside(p.module, h) for p in self.places.values()))
    taken = any(_inside(p.module, h) for p in self.loras for h in heads)
    return () if taken else heads

  def _saved_modules(self) -> list[str]:
    """Modules saved whole: the head, and those with a trained leaf other than a loose bias."""
    adapted = {p.module for p in self.loras}
    whole = {p.module for p in self.tuned if p.name != "bias"}
    found = set(self.head)
    for module in sorted(whole):
      if any(_inside(module, h) for h in self.head):
        continue
      below = [m for m in (p.module for p in self.places.values()) if _inside(m, module)]
      if module in adapted or any(m != module for m in below) or not module:
        self.problems.append(
          f"{module or 'the root'}: trained leaves beside adapted or other modules inside it"
        )
      else:
        found.add(module)
    names = {p.module for p in self.places.values()}
    for module in sorted(found):  # PEFT looks for any module whose name ends so
      if clash := [n for n in names if n.endswith(module) and not _inside(n, module)]:
        self.problems.append(f"{module}: as a module to save PEFT would also take {clash[0]}")
    return sorted(found)

  def _bias(self) -> str:
    loose = {p.module for p in self.tuned if p.name == "bias" and not self._is_saved(p)}
    if not loose:
      return "none"
    if not self.loras:
      names = ", ".join(sorted(loose)[:5])
      self.problems.append(f"biases alone ({names}): PEFT trains biases beside LoRAs only")
    return "lora_only" if loose <= {p.module for p in self.loras} else "all"

  def _is_saved(self, place: Place) -> bool:
    return any(_inside(place.module, m) for m in self.saved)

  def _dropout(self) -> float:
    # PEFT applies none on tables, and neither do we: they say nothing about the rate.
    rates: dict[float, str] = {}
    for place, f in self.loras.items():
      if place.leaf == LINEAR:
        rates.setdefault(0.0 if f.rate is None else _shortest(float(f.rate), f.rate), place.path)
    if len(rates) > 1:
      self.problems.append(f"{rates}: PEFT has one dropout for all modules")
    return next(iter(rates), 0.0)

  def _nesting(self, order: tuple[str, ...]) -> dict[Place, str]:
    """Where each raw parameter's pair lies: the last registered one outermost."""
    beside = collections.defaultdict(list)
    for place in self.loras:
      if place.leaf not in (LINEAR, TABLE):
        beside[place.module].append(place)
    nesting = {}
    for module, at in beside.items():
      unknown = [p.name for p in at if p.name not in order]
      if len(at) > 1 and unknown:
        self.problems.append(
          f"{module}: several parameters are adapted, and parameter_order={order} lacks {unknown}"
        )
        continue
      at.sort(key=lambda p: order.index(p.name) if p.name in order else 0)
      nesting |= {p: ".base_layer" * (len(at) - 1 - i) for i, p in enumerate(at)}
    return nesting

  def _tensors(self) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for place, f in self.loras.items():
      at = f"{PREFIX}{place.module}{self.nesting.get(place, '')}."
      a, b = _torch_pair(place, f)
      if place.leaf == TABLE:
        out[f"{at}lora_embedding_A"], out[f"{at}lora_embedding_B"] = a, b
        if self.tied:
          out[f"{PREFIX}lm_head.lora_A.weight"] = b.T
          out[f"{PREFIX}lm_head.lora_B.weight"] = a.T
      else:
        out[f"{at}lora_A.weight"], out[f"{at}lora_B.weight"] = a, b
    adapted = {p.module for p in self.loras}
    for place in self.places.values():
      if self._is_saved(place):
        out[PREFIX + place.tensor] = value = self._leaf(place)
        if self.tied and place.leaf == TABLE:
          out[f"{PREFIX}lm_head.weight"] = value
      elif place.name == "bias" and self.bias != "none":
        if place.module in adapted:
          out[f"{PREFIX}{place.module}.base_layer.bias"] = self._leaf(place)
        elif self.bias == "all":
          out[PREFIX + place.tensor] = self._leaf(place)
    return out

  def _leaf(self, place: Place) -> np.ndarray:
    value = materialize(self.leaves[place.path])
    value = np.asarray(value if place.layer is None else value[place.layer])
    return value.T if place.leaf == LINEAR else value

  def config(self, base_model_name: str | None) -> dict[str, Any]:
    modules = {p.module: p for p in self.loras if p.leaf in (LINEAR, TABLE)}
    parameters = {p.tensor: p for p in self.loras if p.leaf not in (LINEAR, TABLE)}
    everything = {p.module for p in self.places.values()}
    full = {**modules, **parameters}
    ranks = {name: self.loras[p].rank for name, p in full.items()}
    alphas = {name: _alpha(self.loras[p]) for name, p in full.items()}
    rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    key = lambda name: "^" + re.escape(name)
    task = task_type(self.model)
    if task in ("SEQ_CLS", "TOKEN_CLS") and not self.head:
      task = None  # with it PEFT would claim the head, where a LoRA lives
    return {
      "peft_type": "LORA",
      "task_type": task,
      "base_model_name_or_path": base_model_name,
      "inference_mode": True,
      "r": rank,
      "lora_alpha": alpha,
      "rank_pattern": {key(n): r for n, r in sorted(ranks.items()) if r != rank},
      "alpha_pattern": {key(n): a for n, a in sorted(alphas.items()) if a != alpha},
      "lora_dropout": self.dropout,
      "bias": self.bias,
      "target_modules": _names(set(modules), everything, self.saved),
      "target_parameters": sorted(parameters) or None,
      "modules_to_save": self.saved or None,
      "init_lora_weights": True,
      "use_rslora": False,
      "use_dora": False,
      "fan_in_fan_out": False,
      **({"ensure_weight_tying": True} if self.tied else {}),
    }


def _torch_pair(place: Place, f: Factors) -> tuple[np.ndarray, np.ndarray]:
  """A and B as PEFT stores them."""
  if f.experts:  # rows of A by expert first, columns of B by rank first
    a = np.swapaxes(f.a, -1, -2).reshape(-1, f.a.shape[-2])
    return a, f.b.transpose(2, 1, 0).reshape(f.b.shape[-1], -1)
  if place.leaf not in (LINEAR, TABLE) and not f.out_first:
    return f.b, f.a  # to PEFT the first axis of a raw matrix is out
  return f.a.T, f.b.T


def _names(wanted: set[str], everything: set[str], saved: list[str]) -> list[str]:
  """Last components if they name exactly these modules, else full paths."""
  short = {m.rpartition(".")[2] for m in wanted}
  hit = {
    m for m in everything if m.rpartition(".")[2] in short and not any(_inside(m, s) for s in saved)
  }
  # "dense" may also name modules that only torch's side has, such as an unused pooler.
  return sorted(short if hit == wanted and "dense" not in short else wanted)


def _inside(module: str, parent: str) -> bool:
  return module == parent or module.startswith(f"{parent}.")


def _alpha(f: Factors) -> float | int:
  alpha = _shortest(float(f.scaling) * f.rank, f.scaling, f.rank)
  return int(alpha) if alpha == int(alpha) else alpha


def _shortest(value: float, exact: Any, divisor: int = 1) -> float:
  """The shortest decimal near `value` that gives `exact` again when divided and cast."""
  exact = np.asarray(exact)
  for digits in range(1, 18):
    rounded = float(f"{value:.{digits}g}")
    if np.asarray(rounded / divisor, exact.dtype) == exact:
      return rounded
  return value
