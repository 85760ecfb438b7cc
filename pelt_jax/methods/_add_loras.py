"""Arithmetic of LoRAs: several on one base as one, their changes weighted, pruned or elected."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pelt_jax._leaf import lowest
from pelt_jax._node import Bypass, Weight
from pelt_jax._transform import site_key
from pelt_jax._tree import fold
from pelt_jax._walk import update_at, walk
from pelt_jax.methods._low_rank import (
  check_rank,
  joined,
  lora_over,
  numbers,
  scaled,
  svd_of,
  svd_of_product,
  truncated,
  wide_dtype,
)
from pelt_jax.methods._named import check_base, check_tasks, one_owner, weights_of
from pelt_jax.nodes._bank import owns
from pelt_jax.nodes._pairs import Pair, pairs_of
from pelt_jax.nodes._residual import Residual

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
HOWS = ("cat", "svd", "linear", *PRUNING, *(f"{how}_svd" for how in PRUNING))
MAJORITIES = ("total", "frequency")


class _Rule(NamedTuple):
  """The options that say how changes are mixed."""

  how: str
  rank: int | float | None
  density: float | None
  majority: str
  key: jax.Array | None


def add_loras(
  adapters: Mapping[str, dict],
  weights: Mapping[str, Any],
  *,
  how: str = "cat",
  rank: int | float | None = None,
  density: float | None = None,
  majority: str = "total",
  key: jax.Array | None = None,
  head: str | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
) -> dict:
  """One LoRA on the base that several share: at each weight sum_n w_n D_n, or what stands for it.

  D_n = scaling_n a_n b_n is the change that adapter n makes; the weights are taken as they are. One
  adapter at -1 is its negation, t and 1 - t lead from one to another, 1 and -1 are a difference.

  | how | a and b |
  |---|---|
  | `"cat"` | side by side, w_n scaling_n a_n and b_n: the sum exactly; ranks add up |
  | `"svd"` | the nearest pair of rank `rank` to the sum (Eckart and Young) |
  | `"linear"` | sums of factors, sgn(c_n) sqrt(abs c_n) a_n and sqrt(abs c_n) b_n |
  | `"magnitude_prune"` | the same of the `density` largest entries of each factor |
  | `"dare_linear"` | the same of entries drawn at `density` and divided by it |
  | `"ties"` | of the largest entries, at each place the mean of those with the elected sign |
  | `"dare_ties"` | the same of entries drawn at `density` and divided by it |
  | `"ties_svd"`, ... | these four of the changes D_n in place of factors, then as `"svd"` |

  with c_n = w_n scaling_n. A product of summed factors is no sum of products: "linear" and what
  prunes factors have cross terms a_m b_n of all pairs of adapters. Ties elects, at each place, the
  sign of the sum of entries before they are weighted, so that an adapter votes at weight 0 too
  (arXiv:2306.01708; DARE: arXiv:2311.03099).

  These are PEFT's combinations. Here the scaling is 1 whatever the adapters' (PEFT passes
  `use_rslora` on, and is off by a factor then); one adapter is pruned as several are.

  `average` runs all adapters and takes the mean of what they give, of any kind. `soup` is the mean
  of parameters: of LoRAs it mixes factors, as "linear" does with weights not under a root, which
  suits seeds from one start. `add_loras` mixes what LoRAs do to the weights, which suits adapters
  that were trained apart. `to_lora` makes a LoRA of what is none.

  Args:
    adapters: by name, params with LoRAs on one base, looped or scanned alike. Where an adapter has
      none, its change is zero. Several LoRAs on a weight count as one of their ranks together, and
      so do those on the parts of a fused one.
    weights: by name, for every adapter.
    how: as above.
    rank: for svd alone: at most so many; or, outside of `jax.jit`, a share of the sum of squared
      singular values (see `to_lora`). By default the largest of the adapters' ranks at each weight.
    density: share of the entries that pruning leaves, in (0, 1]: of a matrix with n entries the
      int(density * n) largest.
    majority: which sign ties elects: that of the sum of entries ("total") or of the sum of their
      signs ("frequency"); plus for zero.
    key: for dare alone: each matrix of each adapter draws from its own.
    head: name of the adapter whose head the result has, with all else that it trained of the
      model's own leaves. Needed where several trained any.
    dtype: dtype of a and b; by default the adapters', at least float32.
    group: label of a and b.

  Returns:
    Params with one `LoraWeight` without dropout at each weight where an adapter has any.

  Raises:
    TypeError: if adapters or weights are no mappings.
    ValueError: for a bad option, or one that `how` has no use for or lacks; if bases or models
      differ, ranks do and factors are to be added, several have heads and none is chosen, or nodes
      are no LoRAs, naming them.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> base, b = jnp.zeros((2, 2)), jnp.array([[1.0, 0.0]])
    >>> lora = lambda *a: {"w": pelt.nodes.LoraWeight(base, jnp.array(a)[:, None], b, jnp.ones(()))}
    >>> two = {"first": lora(1.0, 0.0), "second": lora(0.0, 4.0)}
    >>> half = pelt.add_loras(two, {"first": 0.5, "second": 0.5})
    >>> half["w"].b.shape, pelt.merge(half)["w"].tolist()
    ((2, 2), [[0.5, 0.0], [2.0, 0.0]])
    >>> without = pelt.add_loras(two, {"first": 1, "second": -1}, how="svd", rank=1)
    >>> pelt.merge(without)["w"].round(4).tolist()
    [[1.0, 0.0], [-4.0, 0.0]]
  """
  check_tasks("adapters", adapters)
  rule = _Rule(how, rank, density, majority, key)
  _check_rule(rule)
  shares = dict(zip(adapters, weights_of(adapters, weights, normalize=False), strict=True))
  tables = {name: dict(walk(fold(params))) for name, params in adapters.items()}
  pairs = {name: _pairs(name, table) for name, table in tables.items()}
  check_base(tables)
  started = (p for t in tables.values() for p, v in t.items() if isinstance(lowest(v), Residual))
  if path := next(started, None):
    raise ValueError(
      f"{path!r} starts from a part of the weight (PiSSA, OLoRA), and its factors are no change "
      "of it: make LoRAs of changes first, pelt.to_lora(params, rank, sites=sites, base=plain)"
    )
  changed = {n: own for n, table in tables.items() if (own := {p for p in table if owns(table[p])})}
  owner = one_owner(adapters, changed, head)
  out = {path: v if owns(v) else lowest(v) for path, v in tables[owner].items()}
  places = dict.fromkeys(path for found in pairs.values() for path in found)
  if not places:
    raise ValueError("the adapters hold no LoRA, such as pelt.lora adds")
  for path in places:
    terms = {name: found[path] for name, found in pairs.items() if path in found}
    _check_place(path, terms, out, how, {n for n in changed if path in changed[n]})
    a, b = _sum(path, terms, shares, rule)
    pair = next(iter(terms.values()))[0]
    stacked = jnp.ndim(pair.scaling)
    out[path] = lora_over(out[path], a, b, pair.axes, stacked=stacked, dtype=dtype, group=group)
  return update_at({}, out)


def _check_rule(rule: _Rule) -> None:
  how, rank, density, majority, key = rule
  if how not in HOWS:
    raise ValueError(f"how must be one of {HOWS}, got {how!r}")
  if rank is not None:
    check_rank(rank)
  if density is not None and not 0.0 < density <= 1.0:
    raise ValueError(f"density must be a share in (0, 1], got {density!r}")
  if majority not in MAJORITIES:
    raise ValueError(f"majority must be one of {MAJORITIES}, got {majority!r}")
  prunes, draws = how.removesuffix("_svd") in PRUNING, how.startswith("dare")
  for name, value, wanted in (("density", density, prunes), ("key", key, draws)):
    if (value is not None) != wanted:
      remedy = f"needs {name}=" if wanted else f"has no use for {name}="
      raise ValueError(f"how={how!r} {remedy}")
  if rank is not None and not how.endswith("svd"):
    raise ValueError(f"how={how!r} has no use for rank=: only those that end in svd cut the rank")


def _pairs(name: str, table: Mapping[str, Any]) -> dict[str, list[Pair]]:
  """By path, the LoRAs of one adapter."""
  found, odd = {}, []
  for path, value in table.items():
    kind = type(value).__name__
    if isinstance(value, Bypass):
      odd.append(f"{path}: a {kind} wraps a module's call")
    elif isinstance(value, Weight) and (why := value.unmergeable()):
      odd.append(f"{path}: {why}")
    elif isinstance(value, Weight) and value is not lowest(value) and owns(value):
      odd.append(f"{path}: a {kind} over a leaf that trains as it is")
    else:
      try:
        found[path] = pairs_of(value)
      except ValueError as error:
        odd.append(f"{path}: {error}")
  if odd:
    raise ValueError(
      f"adapters[{name!r}] holds what cannot be added; pelt.to_lora makes LoRAs of changes that "
      "can be merged:\n  " + "\n  ".join(odd)
    )
  return {path: pairs for path, pairs in found.items() if pairs}


def _check_place(
  path: str, terms: Mapping[str, list[Pair]], out: dict[str, Any], how: str, trained: set[str]
) -> None:
  if path not in out:
    raise ValueError(f"the adapters are of different models: not all have {path!r}")
  if trained:
    raise ValueError(
      f"{path!r} has a LoRA of {list(terms)}, but {sorted(trained)} trained it as it is: make that "
      "a LoRA too, pelt.to_lora(params, rank, sites=..., base=...)"
    )
  axes = {name: sorted({p.axes for p in pairs}) for name, pairs in terms.items()}
  if len({a for some in axes.values() for a in some}) > 1:
    raise ValueError(f"the LoRAs at {path!r} read its axes in different ways: {axes}")
  ranks = {name: sum(p.rank for p in pairs) for name, pairs in terms.items()}
  if how in ("linear", *PRUNING) and len(set(ranks.values())) > 1:
    raise ValueError(
      f"how={how!r} adds factors, whose ranks at {path!r} differ: {ranks}. Take 'cat', 'svd' or "
      "one that ends in _svd"
    )


def _sum(
  path: str, terms: Mapping[str, list[Pair]], shares: Mapping[str, Any], rule: _Rule
) -> tuple[jax.Array, jax.Array]:
  """The factors at one weight, as matrices."""
  how, rank = rule.how, rule.rank
  if rank is None:
    rank = max(sum(p.rank for p in pairs) for pairs in terms.values())
  if how in ("cat", "svd"):
    every = [(p, shares[name]) for name, pairs in terms.items() for p in pairs]
    a, b = joined(*zip(*every, strict=True))
    return (a, b) if how == "cat" else truncated(svd_of_product(a, b), rank)[:2]
  pairs = {name: _one(some) for name, some in terms.items()}
  dtype = wide_dtype(pairs.values())
  if how.endswith("_svd"):
    ones = [jnp.asarray(shares[name], dtype) for name in pairs]
    changes = {name: _product(p, dtype) for name, p in pairs.items()}
    return truncated(svd_of(_mixed(path, changes, ones, rule)), rank)[:2]
  c = [numbers(p, shares[name], dtype) for name, p in pairs.items()]
  roots = [jnp.sqrt(jnp.abs(x)) for x in c]
  # The sign goes to one side alone, or it would cancel.
  signed = [jnp.where(x >= 0, r, -r) for x, r in zip(c, roots, strict=True)]
  a, b = ({name: jnp.asarray(getattr(p, n), dtype) for name, p in pairs.items()} for n in "ab")
  return _mixed(f"{path}:a", a, signed, rule), _mixed(f"{path}:b", b, roots, rule)


def _mixed(
  where: str, matrices: Mapping[str, jax.Array], weights: list[jax.Array], rule: _Rule
) -> jax.Array:
  """Matrices thinned, weighted and added up, or the mean of those that agree with the majority."""
  kept = [_thinned(x, f"{where}:{name}", rule) for name, x in matrices.items()]
  terms = [scaled(x, w, x.dtype) for x, w in zip(kept, weights, strict=True)]
  if "ties" in rule.how:
    return _elected(jnp.stack(kept), jnp.stack(terms), rule.majority)
  return sum(terms[1:], terms[0])


def _thinned(x: jax.Array, where: str, rule: _Rule) -> jax.Array:
  if rule.density is None:
    return x
  if rule.key is not None:
    drawn = jax.random.bernoulli(site_key(rule.key, where), rule.density, x.shape)
    return jnp.where(drawn, x / rule.density, 0)
  return _largest(x, rule.density)


def _one(pairs: list[Pair]) -> Pair:
  """Several LoRAs on one weight as one."""
  if len(pairs) == 1:
    return pairs[0]
  a, b = joined(pairs)
  return Pair(a, b, jnp.ones_like(pairs[0].scaling), pairs[0].axes)


def _product(pair: Pair, dtype: Any) -> jax.Array:
  """The change itself."""
  a, b = scaled(pair.a, numbers(pair, 1.0, dtype), dtype), jnp.asarray(pair.b, dtype)
  return jnp.matmul(a, b, precision="highest")


def _largest(x: jax.Array, density: float) -> jax.Array:
  """Of each matrix its int(density * n) entries of largest size; of equal ones the first."""
  flat = x.reshape(*x.shape[:-2], -1)
  order = jnp.argsort(-jnp.abs(flat), axis=-1, stable=True)
  count = int(density * flat.shape[-1])
  mask = jnp.zeros(flat.shape, bool)
  mask = jnp.put_along_axis(mask, order[..., :count], True, axis=-1, inplace=False)
  return jnp.where(mask, flat, 0).reshape(x.shape)


def _elected(kept: jax.Array, terms: jax.Array, majority: str) -> jax.Array:
  """The mean of those terms whose entries before weighting have the sign of the majority."""
  votes = kept if majority == "total" else jnp.sign(kept)
  elected = jnp.where(jnp.sum(votes, 0) >= 0, 1, -1)
  agree = jnp.sign(kept) == elected[None]
  count = jnp.maximum(jnp.sum(agree, 0), 1)
  return jnp.sum(jnp.where(agree, terms, 0), 0) / jnp.asarray(count, terms.dtype)
