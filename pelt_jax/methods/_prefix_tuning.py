"""Prefix tuning (arXiv:2101.00190) and P-Tuning v2 (arXiv:2110.07602)."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pelt_jax._node import GENERATORS, Bypass, Chain
from pelt_jax._site import Site, Targets, find
from pelt_jax._transform import Transform, add_bypass, check_dropout, check_whole, site_key
from pelt_jax._tree import fold
from pelt_jax._walk import update_at, walk
from pelt_jax.nodes import Dropout, Prefix, PrefixMLP, Shift

Arrays = Mapping[str, tuple[Any, Any]]


def prefix_tuning(
  length: int = 10,
  *,
  reparametrize: bool = True,
  hidden: int = 512,
  embed_dim: int | None = None,
  init: Arrays | None = None,
  dropout: float = 0.0,
  targets: Targets = "attention",
  layers: Iterable[int] | None = None,
  shift_positions: bool | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains P keys and values in front of every attention layer's own.

  head = softmax(q [P_k; K]^T / sqrt(d_h)) [P_v; V]: every query sees the prefix, whatever the mask,
  and neither a projection nor a position acts on it. 2 P h d_h numbers a layer, where h counts
  key-value heads. In training they come from one MLP, tanh(E w1 + b1) w2 + b2 with E (P, d_e),
  which `fold` drops. Layers that play different parts (an encoder's, a decoder's own, its cross
  attention) have an MLP each. A prefix is not the identity at step 0, a zero one neither.

  Args:
    length: P, how many keys and values.
    reparametrize: make them by the MLP; False trains them as they are, N(0, 1) at first.
    hidden: the MLP's width.
    embed_dim: d_e; by default the width that attention reads, as in the released code.
    init: per path of an attention core its keys and values, those of words (`prefix_from`) or of
      another task (`prefix_of`); needs `reparametrize=False`.
    dropout: share of the keys and values dropped in training.
    targets: the role or paths of the attention cores.
    layers: layer numbers to keep; all by default.
    shift_positions: whether tokens stand P positions later, as in the released code for GPT-2 and
      in PEFT; by default wherever the model has positions. Learned ones leave P fewer for text.
    dtype: dtype of the prefix; by default that of the keys.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for a bad option; at init, if a target is no attention core that was called, if
      `init` has other paths or shapes, or positions cannot be shifted.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.prefix_tuning(10, hidden=64)
  """
  check_whole(length=length, hidden=hidden, embed_dim=1 if embed_dim is None else embed_dim)
  check_dropout(dropout)
  if init is not None and reparametrize:
    raise ValueError("init gives keys and values themselves: it needs reparametrize=False")

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    cores = _cores(find(sites, targets, kind="call", layers=layers), targets, sites)
    if init is not None and set(init) != {c.site.path for c in cores}:
      odd = sorted(set(init) ^ {c.site.path for c in cores})
      raise ValueError(f"init and the attention cores differ at {odd[:4]}; see prefix_from")
    if reparametrize:
      for group_of in _parts(cores):
        params = _generated(key, params, sites, group_of)
    else:
      for core in cores:
        drawn = _flat(site_key(key, core.site.path), core)
        params = add_bypass(params, sites, core.site.path, _prefix(core, *drawn))
    return _shifted(params, sites, length, shift_positions)

  def _prefix(core: Core, keys: Any = None, values: Any = None) -> Prefix:
    lead = core.site.stacked
    rate = jnp.full(lead, dropout, jnp.float32)
    layer = jnp.arange(lead[0], dtype=jnp.float32) if lead else None
    return Prefix(
      keys,
      values,
      length=jnp.full(lead, length, jnp.float32),
      dropout=Dropout(rate, layer, stacked=len(lead)) if dropout else None,
      group=group,
      stacked=len(lead),
    )

  def _flat(key: jax.Array, core: Core) -> tuple[Any, Any]:
    shape = (*core.site.stacked, length, *core.heads)
    kind = jnp.dtype(dtype or core.site.dtype)
    if init is None:
      first, second = jax.random.split(key)
      return jax.random.normal(first, shape, kind), jax.random.normal(second, shape, kind)
    keys, values = (jnp.asarray(x, kind) for x in init[core.site.path])
    if keys.shape != shape or values.shape != shape:
      raise ValueError(
        f"init[{core.site.path!r}] has shapes {keys.shape} and {values.shape}, expected {shape} "
        f"for length={length}"
      )
    return keys, values

  def _generated(key: jax.Array, params: dict, sites: tuple[Site, ...], part: list[Core]) -> dict:
    heads = {c.heads for c in part}
    if len(heads) > 1:
      raise ValueError(f"one MLP cannot serve layers of several (heads, width): {sorted(heads)}")
    (heads,) = heads
    layers_in = sum(c.site.stacked[0] if c.site.stacked else 1 for c in part)
    width = embed_dim or part[0].width
    out = 2 * layers_in * heads[0] * heads[1]
    kind = jnp.dtype(dtype or part[0].site.dtype)
    keys = jax.random.split(site_key(key, part[0].site.path), 5)
    uniform = lambda k, shape, n: jax.random.uniform(k, shape, kind, -(n**-0.5), n**-0.5)
    made = PrefixMLP(
      jax.random.normal(keys[0], (length, width), kind),
      uniform(keys[1], (width, hidden), width),
      uniform(keys[2], (hidden,), width),
      uniform(keys[3], (hidden, out), hidden),
      uniform(keys[4], (out,), hidden),
      sites=tuple(c.site.path for c in part),
      heads=heads,
      group=group,
    )
    for core in part:
      params = add_bypass(params, sites, core.site.path, _prefix(core))
    number = len(params.get(GENERATORS, {}))
    return update_at(params, {f"{GENERATORS}/{number:03d}_prefix": made})

  return Transform(initialize)


def p_tuning_v2(
  length: int = 20,
  *,
  reparametrize: bool = False,
  hidden: int = 512,
  init: Arrays | None = None,
  dropout: float = 0.1,
  targets: Targets = "attention",
  layers: Iterable[int] | None = None,
  shift_positions: bool | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
) -> Transform:
  """Trains deep prompts: keys and values in front of every attention layer's own.

  `prefix_tuning` as P-Tuning v2 uses it for understanding: no MLP, dropout 0.1, and a linear head
  that trains beside it (`pelt.chain(pelt.p_tuning_v2(), pelt.train("head"))`). Easy classification
  wants fewer than 20 rows, sequence labelling about 100; search the length for a task.

  Args:
    length: P.
    reparametrize: make them by an MLP.
    hidden: the MLP's width.
    init: keys and values to start from, such as another task's (`prefix_of`).
    dropout: share of the keys and values dropped in training.
    targets: the role or paths of the attention cores.
    layers: layer numbers to keep; all by default.
    shift_positions: as for `prefix_tuning`.
    dtype: dtype of the prefix; by default that of the keys.
    group: label of the arrays; None freezes them.

  Returns:
    A `Transform`.

  Raises:
    ValueError: as `prefix_tuning`.

  Example:
    >>> import pelt_jax as pelt
    >>> method = pelt.chain(pelt.p_tuning_v2(8), pelt.train("head"))
  """
  return prefix_tuning(
    length,
    reparametrize=reparametrize,
    hidden=hidden,
    init=init,
    dropout=dropout,
    targets=targets,
    layers=layers,
    shift_positions=shift_positions,
    dtype=dtype,
    group=group,
  )


def prefix_from(
  apply: Callable,
  params: dict,
  ids: Any,
  sites: tuple[Site, ...],
  *,
  targets: Targets = "attention",
  **kwargs: Any,
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """The keys and values that real tokens have in every attention layer, for `init`.

  In a causal model the prefix of tokens w, with positions shifted, is the model reading w first.

  Args:
    apply: `pelt.bypass(model.apply)`.
    params: the model's params.
    ids: (P,) or (1, P) token ids.
    sites: what `pelt.sites` returned.
    targets: the role or paths of the attention cores.
    **kwargs: more arguments of the model.

  Returns:
    Per path of a core: keys and values, each (P, heads, width), stacked layers first.

  Raises:
    ValueError: if ids are several rows, or targets no attention cores.
  """
  ids = jnp.asarray(ids)
  ids = ids[None] if ids.ndim == 1 else ids
  if ids.ndim != 2 or ids.shape[0] != 1:
    raise ValueError(f"ids must be one row of tokens, (P,) or (1, P); got shape {ids.shape}")
  cores = _cores(find(sites, targets, kind="call"), targets, sites)
  for core in cores:
    params = add_bypass(params, sites, core.site.path, _Tell(stacked=len(core.site.stacked)))
  _, seen = apply({"params": params}, ids, record=("keys", "values"), **kwargs)
  row = lambda core, x: x[:, 0] if core.site.stacked else x[0]
  return {
    c.site.path: tuple(row(c, seen[c.site.path][n]) for n in ("keys", "values")) for c in cores
  }


def prefix_of(params: dict) -> dict[str, tuple[jax.Array, jax.Array]]:
  """The keys and values that the prefixes in params hold, for `init`: where another task begins.

  Args:
    params: with prefixes, looped or scanned as the model that will start from them is.

  Returns:
    As `prefix_from`.

  Raises:
    ValueError: if params hold no prefix, a bank of them, or several at one place.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> prefix = pelt.nodes.Prefix(jnp.zeros((3, 2, 4)), jnp.ones((3, 2, 4)))
    >>> {path: k.shape for path, (k, v) in pelt.prefix_of({"core": {"bypass": prefix}}).items()}
    {'core': (3, 2, 4)}
  """
  found = {}
  for path, value in walk(fold(params)):
    for node in value.nodes if isinstance(value, Chain) else (value,):
      if isinstance(node, Prefix) and node.banked:
        raise ValueError(f"{path!r} holds a bank of prefixes; give the params of one member")
      if isinstance(node, Prefix):
        site = path.rpartition("/")[0]
        if site in found:
          raise ValueError(f"{path!r} holds several prefixes; init takes one")
        found[site] = (node.array("keys"), node.array("values"))
  if not found:
    raise ValueError("params hold no prefix, such as prefix_tuning or p_tuning_v2 add")
  return found


class _Tell(Bypass):
  """Records what an attention core is given."""

  def __call__(self, call: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    call.record("keys", k)
    call.record("values", v)
    return call.next(q, k, v, *args, **kwargs)


class Core(NamedTuple):
  """An attention core: its site, (key-value heads, head width), and the width that it reads."""

  site: Site
  heads: tuple[int, int]
  width: int


def _cores(found: list, targets: Targets, sites: tuple[Site, ...]) -> list[Core]:
  cores, calls = [], {s.path: s for s in sites if s.kind == "call"}
  for target in found:
    site = target.site
    if len(site.inputs) < 3 or any(len(s) != 4 for s in site.inputs[:3]):
      raise ValueError(
        f"a prefix needs modules called with (q, k, v), each (B, T, heads, width); {site.path!r} "
        f"of {targets!r} takes {site.inputs or 'no arrays'}"
      )
    if len(site.stacked) > 1:
      raise ValueError(f"{site.path!r} is stacked {site.stacked}; a prefix serves one scan")
    queries, keys, _ = site.inputs[:3]
    around = calls.get(site.parent)
    reads = around.shape[-1] if around and len(around.shape) == 3 else queries[2] * queries[3]
    cores.append(Core(site, keys[2:], reads))
  return cores


def _parts(cores: list[Core]) -> list[list[Core]]:
  """Cores by the part they play: their paths without layer numbers."""
  parts: dict[str, list[Core]] = {}
  for core in cores:
    parts.setdefault(re.sub(r"\d+", "*", core.site.path), []).append(core)
  return [sorted(part, key=lambda c: c.site.layer or 0) for part in parts.values()]


def _shifted(params: dict, sites: tuple[Site, ...], length: int, shift: bool | None) -> dict:
  places = [s for s in sites if s.kind == "call" and any(r.role == "positions" for r in s.roles)]
  if shift and not places:
    raise ValueError(
      "shift_positions=True: the model states no role 'positions' (a module that is called with "
      "the position ids). Pass position_ids yourself, or shift_positions=False"
    )
  if shift is False:
    return params
  for place in places:
    by = jnp.full(place.stacked, length, jnp.float32)
    params = add_bypass(params, sites, place.path, Shift(by, stacked=len(place.stacked)))
  return params
