"""Several tasks' answers to one batch, what they have in common computed once (2010.11918)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Bypass, static


class EachTask(Bypass):
  """Round a whole model: every row of a batch of B is asked for by each of N tasks.

  The model runs on N B rows, the first B with member 0 of every bank in it; `rows` is set here.
  Arguments whose first axis is the batch, as the first argument's, are repeated.

  Attributes:
    names: of the tasks; what comes out is a dict of them, B rows each.
    widths: how many entries of the last axis a task's output has, where tasks differ in that.
  """

  names: tuple[str, ...] = static(())
  widths: tuple[int, ...] | None = static(None)

  def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
    if call.rows is not None:
      raise ValueError("rows: every task answers every row of the batch, so leave rows out")
    if kwargs.get("cache_length") is not None:
      raise ValueError(
        "params of share_trunk answer whole forward passes, not generation: generate with one "
        "task's params, or with pelt.bank and rows="
      )
    times, batch = len(self.names), call.frame.input.shape[0]
    args, kwargs = jax.tree.map(lambda x: repeat_batch(x, times, batch), (args, kwargs))
    call.context.rows = np.repeat(np.arange(times, dtype=np.int32), batch)
    try:
      out = call.next(*args, **kwargs)
    finally:
      call.context.rows = None

    def of_task(x: jax.Array, number: int) -> jax.Array:
      if jnp.shape(x)[:1] != (times * batch,):
        raise ValueError(f"an output of shape {jnp.shape(x)} has not the batch as its first axis")
      x = x[number * batch : (number + 1) * batch]
      return x if self.widths is None else x[..., : self.widths[number]]

    each = lambda number: jax.tree.map(lambda x: of_task(x, number), out)
    return {name: each(number) for number, name in enumerate(self.names)}


class Shared(Bypass):
  """Round a module inside `EachTask`: it runs on B rows, which are the same for all N tasks.

  Attributes:
    times: N.
    apart: paths of the modules whose weights or nodes differ by task: none may have run before.
  """

  times: int = static(1)
  apart: tuple[str, ...] = static(())

  def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
    if call.rows is None:
      raise ValueError(f"{call.path!r} is shared by tasks, which only a call of the model asks for")
    if early := sorted(call.context.called.intersection(self.apart)):
      raise ValueError(
        f"the tasks have weights or nodes of their own at {early[:4]}, which run before "
        f"{call.path!r}: then its rows differ by task and cannot be computed once"
      )
    rows = len(call.rows)
    batch = rows // self.times
    whole = lambda x: getattr(x, "shape", ())[:1] == (rows,)
    args, kwargs = jax.tree.map(lambda x: x[:batch] if whole(x) else x, (args, kwargs))
    out = call.next(*args, **kwargs)
    return jax.tree.map(lambda x: repeat_batch(x, self.times, batch), out)


def repeat_batch(x: Any, times: int, batch: int) -> Any:
  """An array whose first axis is the batch, `times` times one after the other; else as it is."""
  if getattr(x, "shape", ())[:1] != (batch,):
    return x
  return jnp.concatenate([jnp.asarray(x)] * times)
