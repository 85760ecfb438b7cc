"""Optimizer state in the host's memory."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import optax

from pelt_jax._program import Program

Space = jax.memory.Space


def paged(
  tx: optax.GradientTransformation, min_size: int = 100_000
) -> optax.GradientTransformationExtraArgs:
  """Keeps the large arrays of an optimizer's state in the host's memory (`pinned_host`).

  A step brings each of them to the device, computes what needs it, and takes the new one back
  before it brings the next: of the state, the device holds the arrays of one parameter at a time.
  Updates are those of `tx`, to the bit.

  This is offloading, not paging on demand as CUDA's unified memory does: every large array travels
  both ways at every step, whether memory is short or not. With AdamW that is 16 bytes over the bus
  per trained number and step, against 8 bytes of device memory saved.

  Args:
    tx: Any optax transformation. What it computes from several parameters at once (a global norm
      of moments, say) needs all of their arrays on the device together.
    min_size: State arrays of fewer elements stay on the device. The default is that of
      bitsandbytes' paged optimizers.

  Returns:
    A transformation whose state has the structure of `tx`'s: a checkpoint of either goes on with
    the other. Call `update` under `jax.jit` with the state donated, and give results the shardings
    of what they replace, as `pelt_jax.training.fit` does.

  Raises:
    TypeError: `tx` is not an optax transformation.
    ValueError: `min_size` is negative.

  Source: Dettmers et al. 2023, QLoRA, section 3 (arXiv:2305.14314).

  Example:
    >>> import jax.numpy as jnp, pelt_jax as pelt
    >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
    >>> tx = pelt.paged(optax.sgd(0.1, momentum=0.9), min_size=32)
    >>> state = tx.init(params)
    >>> {name: m.sharding.memory_kind for name, m in sorted(state[0].trace.items())}
    {'b': 'device', 'w': 'pinned_host'}
    >>> updates, state = jax.jit(tx.update)(params, state)
    >>> state[0].trace["w"].sharding.memory_kind, round(float(updates["w"][0, 0]), 4)
    ('pinned_host', -0.1)
  """
  if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
    raise TypeError(
      f"tx must be an optax transformation, got {type(tx).__name__}; give it as in "
      "paged(optax.adamw(1e-4))"
    )
  if min_size < 0:
    raise ValueError(f"min_size={min_size}: expected a number of elements, 0 for every array")
  whole = optax.with_extra_args_support(tx)

  def large(x: Any) -> bool:
    return math.prod(x.shape) >= min_size

  def init(params: Any) -> Any:
    away = lambda x: jax.device_put(x, Space.Host) if large(x) else x
    return jax.tree.map(away, whole.init(params))

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    kept, structure = jax.tree.flatten(state)
    given, others = jax.tree.flatten((updates, params, extra))
    traced = [n for n, x in enumerate(given) if isinstance(x, jax.Array | np.ndarray)]

    def run(state: list[Any], arrays: list[Any]) -> Any:
      filled = list(given)
      for n, x in zip(traced, arrays, strict=True):
        filled[n] = x
      updates, params, extra = jax.tree.unflatten(others, filled)
      return whole.update(updates, jax.tree.unflatten(structure, state), params, **extra)

    inputs = [*kept, *(given[n] for n in traced)]
    shapes = [_shape(x) for x in inputs]
    closed, out = jax.make_jaxpr(run, return_shape=True)(shapes[: len(kept)], shapes[len(kept) :])
    program, known, stored = Program(closed), {}, {}
    last: list[Any] = []  # what was taken back last: the next array waits for it

    def read(n: int) -> Any:
      x = inputs[n]
      if n >= len(kept) or not large(x):
        return x
      if last:
        x, *_ = jax.lax.optimization_barrier((x, *last))
      return jax.device_put(x, Space.Device)

    def store(numbers: list[int], values: list[Any]) -> None:
      nonlocal last
      pairs = zip(numbers, values, strict=True)
      away = {n: jax.device_put(x, Space.Host) if large(x) else x for n, x in pairs}
      stored.update(away)
      last = [x for x in away.values() if large(x)] or last

    new_updates, new_state = out
    count = len(jax.tree.leaves(new_updates))
    remaining = dict(enumerate(program.results[count:]))
    made = []
    for result in program.results[:count]:
      made += program.compute([result], known, read)
      ready = [n for n, v in remaining.items() if v in known]
      store(ready, [known[remaining.pop(n)] for n in ready])
    for n, result in remaining.items():  # what no update needs, or what stays as it is
      same = program.inputs.get(result)
      store([n], program.compute([result], known, read) if same is None else [inputs[same]])
    ordered = [stored[n] for n in range(len(stored))]
    return (
      jax.tree.unflatten(jax.tree.structure(new_updates), made),
      jax.tree.unflatten(jax.tree.structure(new_state), ordered),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
