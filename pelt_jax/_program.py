"""A traced function whose results are computed one by one, each from what it needs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


class Program:
  """What `jax.make_jaxpr` returned, evaluated on demand.

  Args:
    closed: The traced function.

  Attributes:
    inputs: Its arguments' variables, with their numbers.
    results: The variables that it returns, in order.
  """

  def __init__(self, closed: core.ClosedJaxpr) -> None:
    jaxpr = closed.jaxpr
    self.inputs = {v: n for n, v in enumerate(jaxpr.invars)}
    constants: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    # A literal cannot be looked up: as a result it gets a name.
    names = {n: object() for n, v in enumerate(jaxpr.outvars) if isinstance(v, core.Literal)}
    self._constants = constants | {name: _value(jaxpr.outvars[n]) for n, name in names.items()}
    self.results = tuple(names.get(n, v) for n, v in enumerate(jaxpr.outvars))
    self._makers = {v: (n, eqn) for n, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}

  def compute(
    self, variables: Iterable[Any], known: dict[Any, Any], read: Callable[[int], Any]
  ) -> list[Any]:
    """The values of some variables.

    Args:
      variables: Of `results`.
      known: Values by variable; those computed are added.
      read: Gives the input of a number; called for the inputs that are needed and not known yet.
    """

    def value(variable: Any) -> Any:
      if isinstance(variable, core.Literal):
        return _value(variable)
      if variable in self._constants:
        return self._constants[variable]
      if variable not in known:
        known[variable] = read(self.inputs[variable])
      return known[variable]

    wanted = list(variables)
    for _, eqn in sorted(self._needed(wanted, known).items()):
      with eqn.ctx.manager:
        parameters = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*map(value, eqn.invars), **parameters)
      out = out if eqn.primitive.multiple_results else [out]
      known.update(zip(eqn.outvars, out, strict=True))
    return [value(v) for v in wanted]

  def _needed(self, variables: list[Any], known: dict[Any, Any]) -> dict[int, Any]:
    """The equations that compute the variables, by their place in the program."""
    found, left = {}, list(variables)
    while left:
      variable = left.pop()
      if isinstance(variable, core.Literal) or variable in known or variable not in self._makers:
        continue
      number, eqn = self._makers[variable]
      if number not in found:
        found[number] = eqn
        left.extend(eqn.invars)
    return found


def _value(literal: Any) -> jax.Array:
  return jnp.asarray(literal.val, literal.aval.dtype)
