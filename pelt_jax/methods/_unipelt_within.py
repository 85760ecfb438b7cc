"""UniPELT within a budget of stored numbers: an extension, not in the paper."""

from typing import Any

import jax

from pelt_jax._site import Site
from pelt_jax._transform import Transform, check_whole
from pelt_jax._tree import count
from pelt_jax._walk import every_node
from pelt_jax.methods._unipelt import PARTS, unipelt
from pelt_jax.nodes import Bottleneck

SIZES = {"lora": "rank", "prefix": "length", "adapter": "bottleneck"}


def unipelt_within(
  budget: int,
  *,
  length: int = 10,
  rank: int = 8,
  bottleneck: int | None = None,
  reduction: int | None = None,
  **options: Any,
) -> Transform:
  """`unipelt` whose sizes are chosen so that it stores at most `budget` numbers.

  The sizes given are the largest, and their ratio is kept: from 1 each, the one that is the
  smallest share of its largest grows by one as long as the budget allows any to grow. What is
  counted is what a task's file holds, gates included, the MLP of the prefixes and heads not.
  `pelt.summary` shows what was chosen.

  Args:
    budget: stored numbers.
    length: largest prefix.
    rank: largest rank.
    bottleneck: largest bottleneck.
    reduction: instead: it is d // reduction, by default d // 16.
    **options: as for `unipelt`.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if the smallest sizes store more than `budget`, which
      tells how many; as `unipelt`.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.unipelt_within(500_000), pelt.train("head"))
  """
  check_whole(budget=budget)
  options["parts"] = parts = tuple(options.get("parts", PARTS))
  widest = {"length": length, "rank": rank, "bottleneck": bottleneck, "reduction": reduction}
  unipelt(**widest, **options)  # checks the options before there is a model

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    before = count(params, sites).stored

    def tried(sizes: dict) -> dict:
      return jax.eval_shape(lambda p: unipelt(**sizes, **options).init(key, p, sites), params)

    def stored(sizes: dict) -> int:
      return count(tried(sizes), sites).stored - before

    most = {SIZES[part]: widest[SIZES[part]] for part in parts}
    if "bottleneck" in most and bottleneck is None:
      added = (n for n in every_node(tried(widest)) if isinstance(n, Bottleneck))
      most["bottleneck"] = max(n.down.shape[-1] for n in added)
    sizes = dict.fromkeys(most, 1)
    least = stored(sizes)
    if least > budget:
      raise ValueError(
        f"budget={budget}: the smallest unipelt here, {_told(sizes)}, stores {least} numbers; give "
        "it at least those, or fewer parts or layers"
      )
    # Every size adds the same number each time it grows.
    price = {name: stored(sizes | {name: 2}) - least if most[name] > 1 else 0 for name in most}
    left = budget - least
    while grows := [n for n in most if sizes[n] < most[n] and price[n] <= left]:
      name = min(grows, key=lambda n: sizes[n] / most[n])
      sizes[name], left = sizes[name] + 1, left - price[name]
    return unipelt(**sizes, **options).init(key, params, sites)

  return Transform(initialize)


def _told(sizes: dict[str, int]) -> str:
  return ", ".join(f"{name}={size}" for name, size in sizes.items())
