"""Several branches in the place of one: one after the other, or their weighted sum."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Branch, extra, own, static


class Composed(Branch):
  """Branches that act as one at one place.

  Attributes:
    branches: a tuple of branches, which may be composed too.
  """

  branches: Any = own(())

  def unmergeable(self) -> str | None:
    return next((why for branch in self.branches if (why := branch.unmergeable())), None)


class Series(Composed):
  """Each branch reads what the place gives once the branches before it have added theirs.

  u_1(r(0)) + u_2(r(u_1)) + ..., where r(delta) is what the placement reads, moved by delta. A
  branch that reads a tap is beside the others and reads the same as they.
  """

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    raise ValueError(
      f"the stack at {call.path!r} lies inside a {'bank' if call.row is not None else 'branch'} "
      "that cannot tell it what its second adapter reads; put it into a placement, pelt.stack or "
      "pelt.average"
    )

  def along(self, call: Any, read: Callable[[Any], jax.Array]) -> jax.Array:
    moved: Any = None
    for i, branch in enumerate(self.branches):
      delta = branch.along(call.salt(i), lambda more, at=moved: read(_sum(at, more)))
      moved = _sum(moved, delta)
    return moved


class WeightedSum(Composed):
  """`sum_n weights[n] * branches[n](x)`, summed in float32 or wider.

  Attributes:
    weights: (N,), in a bank (members, N).
    banked: whether a member axis leads.
  """

  weights: Any = extra()
  banked: bool = static(default=False)

  def __call__(self, call: Any, x: jax.Array) -> jax.Array:
    return self._summed(call, [b(call.salt(i), x) for i, b in enumerate(self.branches)])

  def along(self, call: Any, read: Callable[[Any], jax.Array]) -> jax.Array:
    still = functools.cache(lambda: read(None))
    once = lambda delta: still() if delta is None else read(delta)
    return self._summed(call, [b.along(call.salt(i), once) for i, b in enumerate(self.branches)])

  def _summed(self, call: Any, outs: list[jax.Array]) -> jax.Array:
    wide = np.promote_types(outs[0].dtype, jnp.float32)
    weights = jnp.asarray(self.array("weights"), wide)
    if self.banked:
      weights = call.picked(weights, outs[0].shape[0], weights.shape[0])
    total = jnp.zeros((), wide)
    for i, out in enumerate(outs):
      weight = weights[..., i]
      weight = weight.reshape(weight.shape + (1,) * (out.ndim - weight.ndim))
      total = total + weight * jnp.asarray(out, wide)
    return jnp.asarray(total, outs[0].dtype)


def _sum(a: Any, b: Any) -> Any:
  return b if a is None else a if b is None else a + b
