"""Layers whose adapters are left out, chosen while the program runs (AdapterDrop, 2010.11918)."""

from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._node import Bypass, extra, static


class DropBelow(Bypass):
  """The layer as it is, or, if its number is below n, without the bypass nodes inside it.

  In training n is drawn once per call of the model from 0, ..., `most`, in evaluation it is `drop`.
  One program serves every n: only the arm that is chosen runs. Nothing that trains may lie below a
  dropped layer, since no gradient passes it.

  Attributes:
    layer: (), the layer's number, a float so that whole-tree gradients stay defined.
    drop: (), n in evaluation, a float too.
    most: the largest n drawn.
  """

  layer: Any = extra()
  drop: Any = extra()
  most: int = static(0)

  def __call__(self, call: Any, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
    if call.train:
      n = jax.random.randint(jax.random.fold_in(call.common_rng(), 0xD20B), (), 0, self.most + 1)
    else:
      n = self.drop

    def kept(x: jax.Array) -> Any:
      with call.arm():
        return call.next(x, *args, **kwargs)

    def dropped(x: jax.Array) -> Any:
      with call.arm(plain=True):
        return jax.lax.stop_gradient(call.next(x, *args, **kwargs))

    below = jnp.asarray(self.layer, jnp.float32) < jnp.asarray(n, jnp.float32)
    return jax.lax.cond(below, dropped, kept, x)
