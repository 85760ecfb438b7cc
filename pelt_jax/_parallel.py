"""Every member of a bank on the same batch, in one forward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pelt_jax.nodes._bank import members_of
from pelt_jax.nodes._shared import repeat_batch


def parallel(apply: Callable) -> Callable:
  """An `apply` that gives each member of a bank its own copy of the batch.

  The B rows run as N B, the first B with member 0; the frozen model is there once. A batch in which
  each row has one task alone needs no copies: `rows=` of `apply` chooses its member.

  Args:
    apply: `pelt.bypass(model.apply)`.

  Returns:
    `apply(variables, inputs, ...) -> (N, B, ...)` for params that `pelt.bank` made, heads included
    where they train. Arguments whose first axis is the batch are repeated.

  Raises:
    TypeError: if `apply` is not callable.
    ValueError: when it runs, if params hold no bank, or `rows` is given.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, pelt_jax as pelt
    >>> model, x = nn.Dense(1, use_bias=False), jnp.ones((2, 1))
    >>> task = lambda number: {"kernel": pelt.nodes.Tuned(jnp.full((1, 1), number))}
    >>> both = pelt.bank({"a": task(3.0), "b": task(5.0)})
    >>> pelt.parallel(pelt.bypass(model.apply))({"params": both}, x)[..., 0].tolist()
    [[3.0, 3.0], [5.0, 5.0]]
  """
  if not callable(apply):
    raise TypeError(
      f"apply must be pelt.bypass(model.apply), got {type(apply).__name__}; the tasks go into "
      "pelt.bank, whose params the function takes"
    )

  @functools.wraps(apply)
  def run(variables: Any, inputs: jax.Array | np.ndarray, *args: Any, **kwargs: Any) -> Any:
    batch, members = inputs.shape[0], members_of(variables["params"])
    if members is None:
      raise ValueError("params hold no bank: pass those of pelt.bank(...)")
    if "rows" in kwargs:
      raise ValueError("rows: all members run on every row, so leave rows out")

    repeated = functools.partial(repeat_batch, times=members, batch=batch)
    rows = np.repeat(np.arange(members, dtype=np.int32), batch)
    others = {k: v if k == "rngs" else repeated(v) for k, v in kwargs.items()}
    out = apply(variables, repeated(inputs), *map(repeated, args), rows=rows, **others)
    return jax.tree.map(lambda x: x.reshape(members, batch, *x.shape[1:]), out)

  return run
