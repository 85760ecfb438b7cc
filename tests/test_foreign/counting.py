"""FLOPs of a compiled step against those that its mathematics needs."""

import inspect

import jax
import jax.numpy as jnp

import pelt_jax as pelt
from experiments import flops
from pelt_jax import _rules


def check_step(module, args, method, *, without=None, roles=None, **kwargs) -> float:
  """Asserts that a step of `method` costs at most 1.01 times the products it needs.

  What is needed comes from the forward pass: each product once, and once more for every operand
  that depends on something trained; the compiled step also counts all elementwise work.

  Args:
    module: of anyone's, with weights abstract.
    args: its positional arguments, abstract.
    method: the transform.
    without: a function whose rule, taken away, must make the step cost more: its kernels then
      materialize, and what is added to a matrix has a gradient as costly as the matrix's own.
    roles: of the family.
    **kwargs: passed to the module.

  Returns:
    FLOPs needed by the step over those of the forward pass.
  """
  plain = jax.eval_shape(lambda k, a: module.init(k, *a, **kwargs), jax.random.key(0), args)
  plain = plain["params"]
  sites = pelt.sites(module, *args, roles=roles, **kwargs)
  params = jax.eval_shape(lambda p: method.init(jax.random.key(1), p, sites), plain)
  apply = pelt.bypass(module.apply)

  def loss(trainable, frozen, args):
    out = apply({"params": pelt.combine(trainable, frozen)}, *args, **kwargs)
    return sum(jnp.mean(x) for x in jax.tree.leaves(out))  # a pooler's product counts too

  trainable, frozen = pelt.partition(params)
  wanted = flops.needed(loss, trainable, frozen, args).needed
  step = jax.value_and_grad(loss)
  assert flops.dots_in(step, trainable, frozen, args) == wanted
  cost = flops.compiled_flops(step, trainable, frozen, args)
  assert wanted <= cost <= 1.01 * wanted, cost / wanted
  if without is not None:
    found = _rules.RULES.pop(inspect.unwrap(without))
    try:
      more = flops.compiled_flops(lambda *a: step(*a), trainable, frozen, args)
    finally:
      _rules.RULES[inspect.unwrap(without)] = found
    assert more > 1.1 * wanted, more / wanted
  forward = flops.dots_in(lambda p, a: module.apply({"params": p}, *a, **kwargs), plain, args)
  print(
    f"{type(module).__name__}: compiled / needed {cost / wanted:.4f}, step / forward "
    f"{wanted / forward:.3f}" + (f", without rule {more / wanted:.3f}" if without else "")
  )
  return wanted / forward
