"""Rules: how a Linen method multiplies with weight nodes instead of plain arrays.

A rule is keyed by the function that runs, never by class: a subclass that overrides `__call__` and
calls `super().__call__` is served there, and one that does not falls back to materialized arrays.
"""

import functools
import inspect
import string
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes, normalization

RULES: dict[Callable, Callable] = {}


def rule(method: Callable) -> Callable[[Callable], Callable]:
  """Registers how a module method uses its leaves when one of them is a weight node.

  The rule receives `(module, leaves, *args, **kwargs)`: the bound module (attributes only), a dict
  from leaf name to an object with `einsum(eq, x, precision=None)`, `lookup(ids)`, `spread(like)`,
  `materialize()`, `shape` and `dtype`, and the method's own arguments. It returns what the method
  returns, or NotImplemented for an option it does not serve; then the leaves are materialized.

  Args:
    method: the function, such as `MyDense.__call__`.

  Returns:
    A decorator that returns the rule unchanged.

  Raises:
    TypeError: if `method` is not a function.

  Example:
    >>> import flax.linen as nn, pelt_jax as pelt
    >>> class Scaled(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     return 2.0 * x @ self.param("w", nn.initializers.ones, (x.shape[-1], 3))
    >>> @pelt.rule(Scaled.__call__)
    ... def scaled(module, leaves, x):
    ...   return 2.0 * leaves["w"].einsum("...i,io->...o", x)
  """
  if not callable(method):
    raise TypeError(f"method must be a function such as MyDense.__call__, got {method!r}")

  def register(run: Callable) -> Callable:
    RULES[inspect.unwrap(method)] = run
    return run

  return register


def rule_for(function: Callable) -> Callable | None:
  """The rule of a plain function."""
  return RULES.get(inspect.unwrap(function))


def _custom(module: nn.Module) -> bool:
  """Whether a linear module was given its own product or promotion, which no rule knows."""
  return (
    getattr(module, "dot_general", None) is not None
    or getattr(module, "dot_general_cls", None) is not None
    or module.promote_dtype is not dtypes.promote_dtype
  )


def _dtype(module: nn.Module, *values: Any) -> Any:
  """The compute dtype, as `promote_dtype` finds it."""
  shapes = [jax.ShapeDtypeStruct((), v.dtype) for v in values if v is not None]
  return module.dtype or jnp.result_type(*(s.dtype for s in shapes))


@rule(nn.Dense.__call__)
def _dense(module: nn.Dense, leaves: dict, inputs: Any) -> Any:
  if _custom(module):
    return NotImplemented
  kernel, bias = leaves["kernel"], leaves.get("bias") if module.use_bias else None
  inputs = jnp.asarray(inputs)
  x = jnp.asarray(inputs, _dtype(module, inputs, kernel, bias))
  y = kernel.einsum("...i,io->...o", x, precision=module.precision)
  return y if bias is None else y + bias.spread(y)


@rule(nn.DenseGeneral.__call__)
def _dense_general(module: nn.DenseGeneral, leaves: dict, inputs: Any) -> Any:
  if _custom(module):
    return NotImplemented
  kernel, bias = leaves["kernel"], leaves.get("bias") if module.use_bias else None
  inputs = jnp.asarray(inputs)
  tuple_of = lambda v: (v,) if isinstance(v, int) else tuple(v)
  # Flax sorts both, so the kernel's axes come in the order of the input's, however they were named.
  axis = sorted(a % inputs.ndim for a in tuple_of(module.axis))
  batch = sorted(a % inputs.ndim for a in tuple_of(module.batch_dims))
  n_features = len(tuple_of(module.features))
  letters = iter(string.ascii_letters)
  x_letters = [next(letters) for _ in range(inputs.ndim)]
  features = [next(letters) for _ in range(n_features)]
  batch_letters = [x_letters[a] for a in batch]
  free = [c for i, c in enumerate(x_letters) if i not in axis and i not in batch]
  kernel_letters = [*batch_letters, *(x_letters[a] for a in axis), *features]
  out = [*batch_letters, *free, *features]
  eq = f"{''.join(x_letters)},{''.join(kernel_letters)}->{''.join(out)}"
  if axis == [inputs.ndim - 1] and not batch and n_features == 1:
    eq = "...i,io->...o"
  x = jnp.asarray(inputs, _dtype(module, inputs, kernel, bias))
  y = kernel.einsum(eq, x, precision=module.precision)
  if bias is None:
    return y
  if batch:  # the bias has the batch axes first, with the free axes between
    value = jnp.asarray(bias.materialize(), y.dtype)
    shape = value.shape[: len(batch)] + (1,) * len(free) + value.shape[len(batch) :]
    return y + value.reshape(shape)
  return y + bias.spread(y)


@rule(nn.Einsum.__call__)
def _einsum(module: nn.Einsum, leaves: dict, inputs: Any, einsum_str=None) -> Any:
  if _custom(module) or module.preferred_element_type is not None:
    return NotImplemented
  kernel, bias = leaves["kernel"], leaves.get("bias") if module.use_bias else None
  eq = (einsum_str or module.einsum_str or "").replace(" ", "")
  if eq.count(",") != 1 or "->" not in eq or "..." in eq.partition(",")[2].partition("->")[0]:
    return NotImplemented  # Flax itself words the error
  inputs = jnp.asarray(inputs)
  x = jnp.asarray(inputs, _dtype(module, inputs, kernel, bias))
  y = kernel.einsum(eq, x, precision=module.precision)
  if bias is None:
    return y
  shape = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
  _, broadcast = module._get_bias_shape(eq, x, shape)
  return y + jnp.asarray(bias.materialize(), y.dtype).reshape(broadcast)


@rule(nn.Embed.__call__)
def _embed(module: nn.Embed, leaves: dict, inputs: Any) -> Any:
  if module.promote_dtype is not dtypes.promote_dtype or module.num_embeddings == 1:
    return NotImplemented
  inputs = jnp.asarray(inputs)
  if not jnp.issubdtype(inputs.dtype, jnp.integer):
    return NotImplemented
  table = leaves["embedding"]
  return jnp.asarray(table.lookup(inputs), module.dtype or table.dtype)


@rule(nn.Embed.attend)
def _attend(module: nn.Embed, leaves: dict, query: Any) -> Any:
  if module.promote_dtype is not dtypes.promote_dtype:
    return NotImplemented
  table = leaves["embedding"]
  query = jnp.asarray(query)
  x = jnp.asarray(query, _dtype(module, query, table))
  return table.einsum("...d,vd->...v", x)


def _norm(kind: str, module: Any, leaves: dict, x: jax.Array, mask: Any = None) -> Any:
  """LayerNorm and RMSNorm over the last axis, scale and bias taken from nodes."""
  axes = (module.reduction_axes, module.feature_axes)
  if any(a not in (-1, (-1,), [-1]) for a in axes) or not module.force_float32_reductions:
    return NotImplemented
  extra = {"use_mean": False} if kind == "rms" else {}
  stats: Any = normalization._compute_stats  # its annotations are narrower than what it returns
  mean, var = stats(
    x,
    module.reduction_axes,
    module.dtype,
    module.axis_name,
    module.axis_index_groups,
    use_fast_variance=module.use_fast_variance,
    mask=mask,
    force_float32_reductions=module.force_float32_reductions,
    **extra,
  )
  scale = leaves["scale"] if module.use_scale else None
  bias = leaves["bias"] if kind == "layer" and module.use_bias else None
  y = x - jnp.expand_dims(mean, -1)
  mul = jax.lax.rsqrt(jnp.expand_dims(var, -1) + module.epsilon)
  if scale is not None:
    # the node is spread in its own dtype, as Linen multiplies before it casts the result
    mul = mul * scale.spread(jax.ShapeDtypeStruct(y.shape, scale.dtype))
  y = y * mul
  if bias is not None:
    y = y + bias.spread(jax.ShapeDtypeStruct(y.shape, bias.dtype))
  dtype = dtypes.canonicalize_dtype(
    x, *(jnp.zeros((), v.dtype) for v in (scale, bias) if v is not None), dtype=module.dtype
  )
  return jnp.asarray(y, dtype)


rule(nn.LayerNorm.__call__)(functools.partial(_norm, "layer"))
rule(nn.RMSNorm.__call__)(functools.partial(_norm, "rms"))
