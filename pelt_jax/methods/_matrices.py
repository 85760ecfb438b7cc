"""What methods share that change kernels as whole matrices, (in, out)."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pelt_jax._node import Weight
from pelt_jax._site import Site, Target, Targets, find
from pelt_jax._transform import letter_names, like_box
from pelt_jax.methods._lora import matrices, put_over
from pelt_jax.nodes._lora import lora_axes, matrix_sizes, subscripts


class Matrix(NamedTuple):
  """A kernel as one matrix.

  Attributes:
    site: its leaf.
    axes: kernel axes : its inputs, its outputs.
    inputs: how many.
    outputs: how many.
  """

  site: Site
  axes: str
  inputs: int
  outputs: int

  @property
  def is_table(self) -> bool:
    """Whether rows are looked up."""
    return "lookup" in self.site.equations

  def boxed(self, leaf: Any, value: jax.Array, axes: str) -> Any:
    """An array beside the kernel in a box like its own.

    Args:
      leaf: the kernel.
      value: stacked axes first.
      axes: a letter for each other axis: "i" inputs, "o" outputs, any other is the array's own.
    """
    _, inputs, outputs = subscripts(self.axes)
    lead, names = self.names(leaf)
    of = {"i": names.get(inputs), "o": names.get(outputs)}  # several axes as one have no name
    return like_box(leaf, value, (*lead, *map(of.get, axes)))

  def names(self, leaf: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The names in the kernel's box: of stacked axes, and of the others by letter."""
    return letter_names(leaf, len(self.site.stacked), subscripts(self.axes)[0])

  def uniform(self, key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for every stacked layer."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, (*self.site.stacked, *shape), dtype, -bound, bound)

  def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> jax.Array:
    """One number for every stacked layer."""
    return jnp.full((*self.site.stacked, *shape), value, dtype)


def whole_matrices(
  method: str,
  sites: tuple[Site, ...],
  targets: Targets,
  layers: Iterable[int] | None,
  tables: bool = False,
) -> list[Matrix]:
  """The kernels that targets name.

  Raises:
    ValueError: if one is looked up and `tables` is false, only read by its module, or no single
      matrix.
  """
  found = matrices(find(sites, targets, kind="leaf", layers=layers), targets, method)
  return [_matrix(method, target, tables) for target in found]


def _matrix(method: str, target: Target, tables: bool) -> Matrix:
  site = target.site
  if "lookup" in site.equations and not tables:
    raise ValueError(
      f"{method}: {site.path!r} is a table whose rows are looked up, and {method} changes products "
      "alone; leave it out of targets, or use lora or hira"
    )
  if not site.equations:
    raise ValueError(
      f"{method}: {site.path!r} is only read by {site.module or 'its module'}, so which of its "
      "axes are inputs is not known. Give the module a rule (pelt.rule), or leave it out of targets"
    )
  if "lookup" in site.equations:
    axes = "io:i,o"
  else:
    kernel, a, b = subscripts(lora_axes(site.equations[0], len(site.shape)))
    inputs, outputs = ("".join(c for c in kernel if c in s) for s in (a, b))
    if set(inputs) & set(outputs) or not inputs or not outputs:
      raise ValueError(
        f"{method}: {site.path!r} of shape {site.shape} takes part in {site.equations[0]!r}, as a "
        "batch of matrices; leave it out of targets, or use lora"
      )
    axes = f"{kernel}:{inputs},{outputs}"
  return Matrix(site, axes, *matrix_sizes(axes, site.shape))


def put(
  method: str,
  key: jax.Array,
  params: dict,
  found: Iterable[Matrix],
  make: Callable[[Matrix, Any, jax.Array], Weight],
) -> dict:
  """Params with `make(matrix, leaf, key)` over each kernel.

  Raises:
    ValueError: if a kernel trains already.
  """
  at = {matrix.site.path: matrix for matrix in found}
  sites = [matrix.site for matrix in at.values()]
  return put_over(method, key, params, sites, lambda s, leaf, k: make(at[s.path], leaf, k))


def check_rank(method: str, rank: int, matrix: Matrix) -> None:
  """Raises ValueError for a rank above the matrix's own."""
  if rank > min(matrix.inputs, matrix.outputs):
    raise ValueError(
      f"{method}: rank {rank} exceeds the matrix at {matrix.site.path!r}, which is {matrix.inputs} "
      f"x {matrix.outputs}; lower rank, or leave it out of targets"
    )
