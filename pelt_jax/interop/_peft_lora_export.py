"""Writing LoRA folders that `peft.PeftModel.from_pretrained` loads."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pelt_jax._node import Node, Weight
from pelt_jax._walk import walk
from pelt_jax.interop._factors import Factors, all_factors, combined, magnitude
from pelt_jax.interop._peft_saved import (
  heads,
  inside,
  modules_to_save,
  stored,
  torch_array,
  unguarded,
)
from pelt_jax.interop._places import (
  LINEAR,
  TABLE,
  Place,
  is_copied,
  is_tied,
  is_tokens,
  places,
  task_type,
)
from pelt_jax.nodes import DoraWeight, Tuned

PREFIX = "base_model.model."
ORDER = ("gate_up_proj", "down_proj")


def lora_files(
  params: Mapping, model: Any, base_model_name: str | None, parameter_order: Sequence[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Configuration and tensors of a LoRA folder; see `export`."""
  plan = _Plan(model, params, tuple(parameter_order))
  return plan.config(base_model_name), plan.tensors


class _Plan:
  """What goes into the folder; making it finds every problem."""

  def __init__(self, model: Any, params: Mapping, order: tuple[str, ...]):
    self.model, self.params = model, params
    self.places = places(model, params)
    self.problems: list[str] = []
    self.loras: dict[Place, Factors] = {}
    self.magnitudes: dict[Place, np.ndarray] = {}
    self.tuned: set[Place] = set()
    self.leaves: dict[str, Any] = {}
    self._collect()
    self.head = self._head()
    self.saved = self._saved_modules()
    self.bias = self._bias()
    tables = [p for p in (*self.loras, *self.tuned) if is_tokens(model, p)]
    self.tied = is_tied(model, params) and bool(tables)
    for place in tables:
      if is_copied(model, place):
        self.problems.append(f"{place.path}: torch holds this table under several names")
    self._check_magnitudes()
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
      if isinstance(value, Node) and not isinstance(value, Weight):
        self.problems.append(f"{path}: a {type(value).__name__} wraps a module's call")
        continue
      self.leaves[path] = stored(value)
      value = unguarded(value)
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
      if isinstance(value, DoraWeight):
        if place.leaf not in (LINEAR, TABLE):
          raise ValueError("PEFT allows no DoRA on target_parameters")
        if not one.rank:
          raise ValueError("its LoRA is zero on both sides, and PEFT keeps no magnitude alone")
        self.magnitudes[place] = magnitude(value, place.layer)
      if one.rank:  # all zero: a layer of a scan that is not adapted
        self.loras[place] = one

  def _check_magnitudes(self) -> None:
    if self.magnitudes and (plain := [p.path for p in self.loras if p not in self.magnitudes]):
      self.problems.append(f"{plain[0]}: a LoRA beside DoRA, and PEFT has one use_dora for all")
    for place in self.magnitudes:
      if self.tied and is_tokens(self.model, place):
        self.problems.append(f"{place.path}: to PEFT a tied head has magnitudes of its own")

  def _head(self) -> tuple[str, ...]:
    """The head's module if PEFT saves it by itself, nothing if a LoRA lives there."""
    found = heads(self.model, self.places.values())
    taken = any(inside(p.module, h) for p in self.loras for h in found)
    return () if taken else found

  def _saved_modules(self) -> list[str]:
    """Modules saved whole: the head, and those with a trained leaf other than a loose bias."""
    adapted = {p.module for p in self.loras}
    whole = {p.module for p in self.tuned if p.name != "bias"}
    found, problems = modules_to_save(self.places.values(), whole, adapted, self.head)
    self.problems += problems
    return found

  def _bias(self) -> str:
    loose = {p.module for p in self.tuned if p.name == "bias" and not self._is_saved(p)}
    if not loose:
      return "none"
    if not self.loras:
      names = ", ".join(sorted(loose)[:5])
      self.problems.append(f"biases alone ({names}): PEFT trains biases beside LoRAs only")
    return "lora_only" if loose <= {p.module for p in self.loras} else "all"

  def _is_saved(self, place: Place) -> bool:
    return any(inside(place.module, m) for m in self.saved)

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
        if self.tied and is_tokens(self.model, place):
          out[f"{PREFIX}lm_head.lora_A.weight"] = b.T
          out[f"{PREFIX}lm_head.lora_B.weight"] = a.T
      else:
        out[f"{at}lora_A.weight"], out[f"{at}lora_B.weight"] = a, b
      if place in self.magnitudes:
        out[f"{at}lora_magnitude_vector"] = self.magnitudes[place]
    adapted = {p.module for p in self.loras}
    for place in self.places.values():
      if self._is_saved(place):
        out[PREFIX + place.tensor] = value = self._leaf(place)
        if self.tied and is_tokens(self.model, place):
          out[f"{PREFIX}lm_head.weight"] = value
      elif place.name == "bias" and self.bias != "none":
        if place.module in adapted:
          out[f"{PREFIX}{place.module}.base_layer.bias"] = self._leaf(place)
        elif self.bias == "all":
          out[PREFIX + place.tensor] = self._leaf(place)
    return out

  def _leaf(self, place: Place) -> np.ndarray:
    return torch_array(self.leaves[place.path], place)

  def config(self, base_model_name: str | None) -> dict[str, Any]:
    modules = {p.module: p for p in self.loras if p.leaf in (LINEAR, TABLE)}
    parameters = {p.tensor: p for p in self.loras if p.leaf not in (LINEAR, TABLE)}
    everything = {p.module for p in self.places.values()}
    full = {**modules, **parameters}
    targets, saved = _names(set(modules), everything, self.saved), list(self.saved)
    tables = [p for p in modules.values() if self.tied and is_tokens(self.model, p)]
    if tables:
      full["lm_head"] = tables[0]
    ensure = self.tied and any(m.endswith("embed_tokens") for m in everything)
    if self.tied and not ensure:  # PEFT ties tables of no other name: the head is one module more
      (targets if tables else saved).append("lm_head")
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
      "target_modules": sorted(targets),
      "target_parameters": sorted(parameters) or None,
      "modules_to_save": sorted(saved) or None,
      "init_lora_weights": True,
      "use_rslora": False,
      "use_dora": bool(self.magnitudes),
      # GPT-2's Conv1D; PEFT sets it right again where a Linear is adapted beside one.
      "fan_in_fan_out": any(p.leaf == LINEAR and not p.transposed for p in modules.values()),
      **({"ensure_weight_tying": True} if ensure else {}),
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
    m for m in everything if m.rpartition(".")[2] in short and not any(inside(m, s) for s in saved)
  }
  # "dense" may also name modules that only torch's side has, such as an unused pooler.
  return sorted(short if hit == wanted and "dense" not in short else wanted)


def _alpha(f: Factors) -> float | int:
  alpha = _shortest(float(f.scaling) * f.rank, f.scaling, f.rank)
  return int(alpha) if alpha == int(alpha) else alpha


def _shortest(value: float, exact: Any, divisor: float = 1) -> float:
  """The shortest decimal near `value` that gives `exact` again when divided and cast."""
  exact = np.asarray(exact)
  for digits in range(1, 18):
    rounded = float(f"{value:.{digits}g}")
    if np.asarray(rounded / divisor, exact.dtype) == exact:
      return rounded
  return value
