"""AdaLoRA in PEFT's files: triplets, each matrix with its own rank of one first rank."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from pelt_jax.interop._peft_family_kind import Arrays, FamilyConfig, Kind, layer_of
from pelt_jax.interop._peft_lora_config import KNOWN, REFUSED
from pelt_jax.interop._peft_lora_export import _shortest
from pelt_jax.interop._places import Place
from pelt_jax.nodes import SvdWeight
from pelt_jax.nodes._svd import RANKNUM


class Adalora(Kind):
  peft_type = "ADALORA"
  title = "AdaLoRA"
  nodes = (SvdWeight,)
  fields: ClassVar[Mapping[str, str]] = {"lora_A": "a", "lora_E": "lam", "lora_B": "b"}
  rank = 12
  known = frozenset(
    {*KNOWN, *REFUSED, "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"}
    | {"orth_reg_weight", "total_step"}
  )
  rate = "lora_dropout"

  def problems(self, raw: Mapping[str, Any]) -> list[str]:
    odd = [f"{name}={raw[name]!r}: {why}" for name, why in REFUSED.items() if raw.get(name)]
    return super().problems(raw) + odd

  def tensors(self, node: Any, place: Place) -> Arrays:
    made = super().tensors(node, place)
    return made | {"lora_E": made["lora_E"].reshape(-1, 1)}

  def node(
    self, config: FamilyConfig, places: list[Place], leaf: Any, arrays: Arrays, more: dict
  ) -> Any:
    lead = () if places[0].layer is None else (len(places),)
    arrays = arrays | {"lam": arrays["lam"].reshape(*lead, -1)}
    first = int(config.raw.get("init_r", self.rank))
    alpha = float(config.raw.get("lora_alpha", 8))
    scaling = (alpha if alpha > 0 else first) / (first + RANKNUM)
    number = lambda x: jnp.full(lead, x, np.promote_types(arrays["lam"].dtype, np.float32))
    # The regulariser is training's: a file says its weight of a run, not of each matrix.
    return SvdWeight(
      leaf, **arrays, scaling=number(scaling), gamma=number(0.0), **{**more, "axes": "io:ir,ro"}
    )

  def options(self, at: Mapping[Place, Any]) -> dict[str, Any]:
    ranks = {p.module: node.array("lam").shape[-1] for p, node in at.items()}
    scalings = {float(x): x for x in (layer_of(node, "scaling", p) for p, node in at.items())}
    if len(scalings) > 1:
      raise ValueError(f"its scalings are {sorted(scalings)}, PEFT has one for all matrices")
    (value, exact), first = next(iter(scalings.items())), max(ranks.values())
    cut = {
      f"{module}.lora_E": [True] * rank + [False] * (first - rank) for module, rank in ranks.items()
    }
    return {
      "init_r": first,
      "target_r": round(sum(ranks.values()) / len(ranks)),
      "lora_alpha": _shortest(value * (first + RANKNUM), exact, first + RANKNUM),
      "rank_pattern": cut if len(set(ranks.values())) > 1 else None,
      "total_step": 1,  # PEFT asks for one, also of an adapter that is done
      "init_lora_weights": True,
      "bias": "none",
    }

  def shapes(self, config: FamilyConfig, place: Place) -> dict[str, tuple[int, ...]]:
    kept = (config.raw.get("rank_pattern") or {}).get(f"{place.module}.lora_E")
    rank = int(config.raw.get("init_r", self.rank)) if kept is None else sum(kept)
    (n_in, n_out) = place.shape
    return {"lora_A": (rank, n_in), "lora_E": (rank, 1), "lora_B": (n_out, rank)}
