"""AdapterFusion with the most used adapters alone (AdapterDrop, arXiv:2010.11918)."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pelt_jax._node import Bypass, Chain, Node
from pelt_jax._transform import check_whole
from pelt_jax._walk import every_node, update_at, walk
from pelt_jax.nodes import Bank, Fusion


def fusion_usage(records: Iterable[tuple[Mapping[str, Any], Any]]) -> dict[str, np.ndarray]:
  """How much each place of an AdapterFusion uses each adapter: its mean weight over real tokens.

  Args:
    records: per batch what `record="fusion"` gave and the batch's mask (B, T), 1 for real tokens,
      or None where all are. A generator will do: one batch is held at a time.

  Returns:
    (N,) per place, which add up to 1; under a scan (layers, N).

  Raises:
    TypeError: if records are no pairs.
    ValueError: if there are no records, they hold no fusion weights, a mask has not the shape of
      the tokens, or no token is real.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> weights = jnp.array([[[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]])  # one row of three tokens
    >>> mask = jnp.array([[1, 1, 0]])
    >>> pelt.fusion_usage([({"ffn": {"fusion": weights}}, mask)])["ffn"].tolist()
    [0.375, 0.625]
  """
  totals: dict[str, Any] = {}
  for pair in records:
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Mapping):
      raise TypeError(
        "records must be (record, mask) per batch, such as [(record, batch['attention_mask'])], "
        f"with what apply(..., record='fusion')[1] gave; got a {type(pair).__name__}"
      )
    recorded, mask = pair
    found = {place: v["fusion"] for place, v in recorded.items() if "fusion" in v}
    if not found:
      raise ValueError('a record holds no fusion weights: call the bypass with record="fusion"')
    for place, value in found.items():
      for weights in value if isinstance(value, tuple) else (value,):
        used, tokens = totals.get(place, (0.0, 0.0))
        weights = np.asarray(weights, np.float64)
        real = np.ones(weights.shape[-3:-1]) if mask is None else np.asarray(mask, np.float64)
        if real.shape != weights.shape[-3:-1]:
          raise ValueError(
            f"a mask has shape {real.shape}, but the tokens at {place!r} are "
            f"{weights.shape[-3:-1]}: give (B, T) of 1 for real tokens"
          )
        totals[place] = used + np.einsum("...btn,bt->...n", weights, real), tokens + real.sum()
  if not totals:
    raise ValueError("records is empty: give at least one batch's")
  if empty := [place for place, (_, tokens) in totals.items() if not tokens]:
    raise ValueError(f"no token is real at {empty[:4]}: the masks are all 0")
  return {place: used / tokens for place, (used, tokens) in totals.items()}


def prune_fusion(params: dict, usage: Mapping[str, Any], *, keep: int) -> dict:
  """Params whose fusions have the `keep` most used of their adapters, chosen at each place.

  The others leave the tree and the program; queries, keys and values stay as they are, and the
  softmax goes over what is left. `Fusion.remaining` names it. Of equally used adapters the first
  stays. Under a scan each layer keeps its own.

  Args:
    params: what `adapter_fusion` made, trained.
    usage: mean weights by place, what `fusion_usage` gave: (N,), under a scan (layers, N). Places
      that it leaves out stay as they are.
    keep: k, from 1 to N; the paper has 2 of 8. N changes nothing.

  Returns:
    Params of the same form; their labels are the same, and they can be pruned again.

  Raises:
    ValueError: if `keep` is out of range, or `usage` has a place without a fusion, another shape or
      no numbers.

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> zeros = lambda *shape: jnp.zeros(shape)
    >>> members = pelt.nodes.Bottleneck(zeros(3, 4, 2), zeros(3, 2), zeros(3, 2, 4), zeros(3, 4))
    >>> fusion = pelt.nodes.Fusion(
    ...   members, zeros(4, 4), zeros(4), zeros(4, 4), zeros(4), names=("a", "b", "c")
    ... )
    >>> params = {"ffn": {"bypass": pelt.nodes.After(fusion)}}
    >>> params = pelt.prune_fusion(params, {"ffn": [0.3, 0.2, 0.5]}, keep=2)
    >>> params["ffn"]["bypass"].branch.remaining
    ('a', 'c')
  """
  check_whole(keep=keep)
  found = {}
  for path, value in walk(params):
    if isinstance(value, Bypass) and any(isinstance(n, Fusion) for n in every_node(value)):
      found[path.rpartition("/")[0]] = path, value
  if unknown := sorted(set(usage) - set(found)):
    raise ValueError(
      f"usage has places {unknown[:4]} where params hold no fusion; they do at "
      f"{sorted(found)[:4] or 'none'}"
    )
  if not usage:
    raise ValueError("usage is empty: give what pelt.fusion_usage returned")
  changes = {}
  for place, used in usage.items():
    path, node = found[place]
    changes[path] = _pruned(node, place, used, keep)
  return update_at(params, changes)


def _pruned(node: Any, place: str, used: Any, keep: int) -> Any:
  """A node whose fusion is pruned, wherever in it that is."""
  if isinstance(node, Fusion):
    return _smaller(node, place, used, keep)
  if isinstance(node, Bank):
    raise ValueError(f"the fusion at {place!r} is in a bank: prune its members before pelt.bank")
  if isinstance(node, Chain):
    return node.replace(nodes=tuple(_pruned(n, place, used, keep) for n in node.nodes))
  below = {n: _pruned(v, place, used, keep) for n, v in node.children() if isinstance(v, Node)}
  return node.replace(**below)


def _smaller(fusion: Fusion, place: str, used: Any, keep: int) -> Fusion:
  lead = fusion.stacked
  shape = jax.tree.leaves(fusion.members)[0].shape[: lead + 1]
  if isinstance(used, Mapping) or np.shape(used) != shape:
    raise ValueError(
      f"usage[{place!r}] must have shape {shape}, one mean weight per adapter, got "
      f"{'a mapping' if isinstance(used, Mapping) else np.shape(used)}; pelt.fusion_usage makes "
      "it of what record='fusion' gave"
    )
  if not isinstance(used, Tracer) and not np.isfinite(np.asarray(used, np.float64)).all():
    raise ValueError(f"usage[{place!r}] holds values that are no numbers: {np.asarray(used)}")
  if keep > shape[-1]:
    raise ValueError(f"keep={keep}, but {place!r} has {shape[-1]} adapters, {fusion.remaining}")
  if keep == shape[-1]:
    return fusion
  order = jnp.argsort(-jnp.asarray(used), axis=-1, stable=True)
  kept = jnp.sort(order[..., :keep], axis=-1)

  def of_kept(x: jax.Array) -> jax.Array:
    index = kept.reshape(*kept.shape, *(1,) * (x.ndim - kept.ndim))
    return jnp.take_along_axis(x, index, axis=lead)

  numbers = jnp.asarray(kept, jnp.float32)
  return fusion.replace(
    members=jax.tree.map(of_kept, fusion.members),
    kept=numbers if fusion.kept is None else of_kept(fusion.kept),
  )
