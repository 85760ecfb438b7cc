"""Virtual tokens: ids past the vocabulary that read rows of a trained prompt."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pelt_jax._leaf import materialize, product, table_rows
from pelt_jax._node import Weight, base, own


class ExtendedEmbedding(Weight):
  """A table of V tokens whose id V + i reads row i of a prompt.

  Products with the table (a tied head) and its plain array know the V real tokens alone. Without
  `pelt.bypass` Flax reads NaN for virtual ids, and so does an id past the prompt.

  Attributes:
    base: (V, d).
    prompt: (P, d); None waits for a generator.
  """

  base: Any = base()
  prompt: Any = own()

  outermost = True

  def lookup(self, ids: jax.Array, call: Any = None) -> jax.Array:
    if self.prompt is None:
      raise ValueError("the prompt waits for its generator: run pelt.bypass or fold")
    size = self.shape[-2]
    rows = table_rows(self.base, jnp.where(ids < size, ids, 0), call)
    prompt = jnp.asarray(self.array("prompt"), rows.dtype)
    # An id below zero would count from the end of the prompt.
    own = jnp.take(
      prompt, jnp.where(ids < size, 0, ids - size), 0, mode="fill", fill_value=math.nan
    )
    return jnp.where((ids < size)[..., None], rows, own)

  def einsum(self, eq: str, x: jax.Array, call: Any = None, precision: Any = None) -> jax.Array:
    return product(eq, x, self.base, call, precision)

  def materialize(self) -> jax.Array:
    return materialize(self.base)

  def specs(self, spec: tuple, tensor: tuple) -> "ExtendedEmbedding":
    new = super().specs(spec, tensor)
    if self.prompt is None:
      return new
    *lead, _, features = tensor
    return new.replace(prompt=jax.sharding.PartitionSpec(*lead, None, features))

  def unmergeable(self) -> str | None:
    return "virtual tokens are no rows of the plain table; keep the adapter beside the base"

  def changed(self) -> int:
    return 0
