"""Attention over the outputs of several branches (AdapterFusion, arXiv:2005.00247)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._leaf import product
from pelt_jax._node import Branch, extra, own, static
from pelt_jax.nodes._branches import affine


class Fusion(Branch):
  """`sum_n s_n (z_n @ value)` with `s = softmax_n((x @ query + b_q) . (z_n @ key + b_k))`.

  z_n is what branch n gives for x, without the residual that the placement adds. The products are
  not scaled.

  Attributes:
    members: one branch whose arrays carry the member axis after stacked axes.
    query: (d, d).
    query_bias: (d,).
    key: (d, d).
    key_bias: (d,).
    value: (d, d), or None: the outputs as they are.
    dropout: None or a `Dropout` for the weights s.
    kept: None, or (k,): which of `names` the members are, once the others were pruned; floats, so
      that whole-tree gradients stay defined.
    names: of all adapters that were fused, in order.
    regularization: weight of |value - I|² in the loss.
  """

  members: Any = own()
  query: Any = own()
  query_bias: Any = own()
  key: Any = own()
  key_bias: Any = own()
  value: Any = own()
  dropout: Any = extra()
  kept: Any = extra(default=None)
  names: tuple[str, ...] = static(default=())
  regularization: float = static(default=0.0)

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    numbers = jnp.arange(jax.tree.leaves(self.members)[0].shape[0], dtype=jnp.int32)
    z = jax.vmap(lambda member, i: member(call.salt(i), x))(self.members, numbers)
    q = affine(x, self.array("query"), self.array("query_bias"))
    # Member by member: members and a batch that devices share would not be rows of one matrix.
    k = jax.vmap(affine, (0, None, None))(z, self.array("key"), self.array("key_bias"))
    wide = np.promote_types(x.dtype, jnp.float32)
    scores = jnp.einsum("...d,n...d->...n", q, k, preferred_element_type=wide)
    weights = jax.nn.softmax(scores, axis=-1)
    call.record("fusion", weights)
    if self.dropout is not None:
      weights = self.dropout(call.salt(len(self.names)), weights)
    if self.value is not None:
      z = jax.vmap(lambda z: product("...i,io->...o", z, self.array("value")))(z)
    return jnp.einsum("...n,n...d->...d", jnp.asarray(weights, x.dtype), z)

  @property
  def remaining(self) -> tuple:
    """The members' names, in order; of stacked layers that were pruned, a tuple per layer."""
    if self.kept is None:
      return self.names
    kept = np.asarray(self.array("kept"), int)
    pick = lambda row: tuple(self.names[i] for i in row)
    return pick(kept) if kept.ndim == 1 else tuple(map(pick, kept))

  def penalty(self) -> jax.Array:
    if self.value is None or not self.regularization:
      return jnp.zeros((), jnp.float32)
    value = self.array("value")
    apart = value - jnp.broadcast_to(jnp.eye(value.shape[-1], dtype=value.dtype), value.shape)
    return self.regularization * jnp.sum(apart**2)

  def unmergeable(self) -> str:
    return "its weights depend on the input"
