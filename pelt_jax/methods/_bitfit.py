"""BitFit: only the biases train (arXiv:2106.10199, section 3)."""

from collections.abc import Iterable
from typing import Any

from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, over, require
from pelt_jax._walk import update_at
from pelt_jax.methods._train import _is_free, _tuned, claimed


def bitfit(targets: Targets = "*", *, layers: Iterable[int] | None = None) -> Transform:
  """Trains biases: of every affine map y = xW + b only b, of LayerNorm only its shift.

  With `targets=("query", "ffn_in")` it is the paper's half-size variant, which trains the query
  bias and the bias of the first feed-forward matrix (b_m2, of width d_m). A task head is trained by
  `pelt.train("head")` beside it. On BERT with four times wider feed-forward layers the count is
  11 d L + 2 d, the embeddings' LayerNorm and the pooler included. Where query, key and value are
  one projection (GPT-2), its whole bias trains.

  Args:
    targets: whose biases: `"*"` for all, roles or path patterns. A leaf that holds a node already
      (a trained head) is left to it.
    layers: layer numbers to keep; all by default.

  Returns:
    A `Transform`.

  Raises:
    ValueError: at init, if the model has no free bias there, so that nothing would train.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> pelt.count(pelt.bitfit().init(jax.random.key(1), params, pelt.sites(model, x))).trainable
    3
  """

  def init(key: Any, params: dict, sites: tuple[Site, ...]) -> dict:
    missing = ValueError(
      f"bitfit trains biases, and of {targets!r} this model has none that is free outside its head "
      "(models such as Llama and T5 have no biases): use another method"
    )
    if not any(s.kind == "leaf" and s.name == "bias" for s in sites):
      raise missing
    everywhere = targets in ("*", ("*",))
    leaves = claimed(sites, "bias" if everywhere else targets, layers)
    found = {s: require(params, s) for s in leaves if s.name == "bias"}
    changes = {
      s.path: over(leaf, lambda v, s=s: _tuned(v, s, "trainable"))
      for s, leaf in found.items()
      if _is_free(leaf)
    }
    head = {s.path for s in found if any(r.role == "head" for r in s.roles)}
    if not set(changes) - (head if everywhere else set()):
      raise missing
    return update_at(params, changes)

  return Transform(init)
