"""What a LoRA step costs against a forward pass, counted by XLA and by hand.

    python experiments/flops.py [--out experiments/results]

Compiles (never runs) the step of a small Llama, params passed as arguments, and writes flops.json
and flops.md. Beside XLA's figures stands a count of the matrix products that the mathematics needs,
made from the forward pass alone (`needed`).
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

import pelt_jax as pelt
from pelt_jax import models

SIZES = dict(
  vocab_size=8000,
  hidden_size=256,
  intermediate_size=688,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=4,
  max_position_embeddings=256,
  tie_word_embeddings=False,
  model_type="llama",
)
BATCH, LENGTH, VIRTUAL = 8, 128, 20


@dataclasses.dataclass
class Dots:
  """FLOPs of matrix products, 2 per multiply-add.

  Attributes:
    forward: of the forward pass.
    backward: of the gradients that the active inputs need: one product for each operand that
      depends on them. A frozen kernel does not, so it costs nothing.
    again: of forward products inside remat, whose backward pass may run them once more.
  """

  forward: int = 0
  backward: int = 0
  again: int = 0

  @property
  def needed(self) -> int:
    """What a step has to compute, without what remat repeats."""
    return self.forward + self.backward


def needed(loss: Callable, trainable: Any, *args: Any) -> Dots:
  """Counts the products of `loss(trainable, *args)` and of its gradient in `trainable`."""
  program = jax.make_jaxpr(loss)(trainable, *args)
  count, active = Dots(), len(jax.tree.leaves(trainable))
  flags = [i < active for i in range(len(program.jaxpr.invars))]
  _walk(program.jaxpr, flags, count, 1, False)
  return count


def dots_in(function: Callable, *args: Any) -> int:
  """FLOPs of all products in the program of `function` as JAX traced it."""
  return needed(lambda _, *a: function(*a), (), *args).forward


def _walk(jaxpr: Any, flags: Sequence[bool], count: Dots, times: int, remat: bool) -> list[bool]:
  """Adds the products of `jaxpr`; returns which of its outputs depend on active inputs."""
  known = dict(zip(jaxpr.invars, flags, strict=True))
  active = lambda v: not hasattr(v, "val") and known.get(v, False)  # literals are not
  for eqn in jaxpr.eqns:
    inputs = [active(v) for v in eqn.invars]
    out = [any(inputs)] * len(eqn.outvars)
    name, inner = eqn.primitive.name, _inner(eqn)
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      flops = 2 * times * math.prod(shape[i] for i in contracted)
      flops *= math.prod(eqn.outvars[0].aval.shape)
      count.forward += flops
      count.backward += flops * sum(inputs)
      count.again += flops * (remat and any(inputs))
    elif name == "scan":
      # Constants, carries, then slices of stacked inputs. Versions of JAX name the numbers
      # differently, but only what is stacked has one axis more outside.
      same = lambda a, b: a.aval.shape == b.aval.shape
      carries = sum(map(same, eqn.outvars, inner.outvars))
      consts = sum(map(same, eqn.invars, inner.invars)) - carries
      while True:  # a carry may become active after a turn
        out = _walk(inner, inputs, Dots(), 1, remat)
        carry = slice(consts, consts + carries)
        grown = [a or b for a, b in zip(inputs[carry], out[:carries], strict=True)]
        if grown == inputs[carry]:
          break
        inputs[carry] = grown
      _walk(inner, inputs, count, times * eqn.params["length"], remat)
    elif name == "cond":
      raise NotImplementedError("a conditional has no single cost")
    elif inner is not None:
      inside = inputs[len(inputs) - len(inner.invars) :]
      out = _walk(inner, inside, count, times, remat or name in ("checkpoint", "remat2"))
    elif name == "stop_gradient":
      out = [False]
    for v, flag in zip(eqn.outvars, out, strict=True):
      known[v] = flag and jnp.issubdtype(v.aval.dtype, jnp.inexact)
  return [active(v) for v in jaxpr.outvars]


def _inner(eqn: Any) -> Any:
  """The program inside a call, a loop or a custom derivative."""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr"):
    if name in eqn.params:
      found = eqn.params[name]
      return getattr(found, "jaxpr", found)
  return None


def compiled_flops(function: Callable, *args: Any) -> float:
  """XLA's count for the compiled program; elementwise work counts one FLOP per number."""
  cost = jax.jit(function).lower(*args).compile().cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  return cost["flops"]


def train_step(loss: Callable, tx: optax.GradientTransformation) -> Callable:
  """One plain optimizer step on the trainable part."""

  def step(trainable, frozen, state, batch):
    value, grads = pelt.value_and_grad(loss)(trainable, frozen, batch)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value

  return step


def case(
  method: pelt.Transform, sizes: dict = SIZES, length: int = LENGTH, **options: bool
) -> tuple:
  """The loss of a Llama with full logits, its plain params, those with nodes, and a batch.

  All arrays are abstract. The full logits, so that forward and step do the same work: with
  `labels`, the model computes each chunk of logits a second time in the backward pass.
  """
  model = models.from_config(sizes, **options)
  ids = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
  plain = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  sites = pelt.sites(model, ids)
  params = jax.eval_shape(lambda p: method.init(jax.random.key(1), p, sites), plain)
  apply = pelt.bypass(model.apply)

  def loss(params, batch):
    return models.token_losses(apply({"params": params}, batch["ids"]), batch["labels"]).mean()

  return loss, plain, params, {"ids": ids, "labels": ids}


def measure(method: pelt.Transform) -> dict[str, float]:
  """Counts of the forward pass on plain params and of an AdamW step with `method`."""
  loss, plain, params, batch = case(method)
  trainable, frozen = pelt.partition(params)
  tx = optax.adamw(1e-3)
  step, state = train_step(loss, tx), jax.eval_shape(tx.init, trainable)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  wanted = needed(lambda t, f, b: loss(pelt.combine(t, f), b), trainable, frozen, batch)
  found = {
    "forward": compiled_flops(loss, plain, batch),
    "forward_nodes": compiled_flops(loss, params, batch),
    "step": compiled_flops(step, trainable, frozen, state, batch),
    "forward_dots": dots_in(loss, plain, batch),
    "step_dots": dots_in(step, trainable, frozen, state, batch),
    "needed_dots": wanted.needed,
    "trainable": size(trainable),
    "total": size(plain),
    "optimizer": size(state),
  }
  found["ratio"] = found["step"] / found["forward"]
  found["ratio_dots"] = found["step_dots"] / found["forward_dots"]
  return found


METHODS = {
  "lora(rank=8), query and value": pelt.lora(rank=8, targets=("query", "value")),
  "lora(rank=8), all-linear": pelt.lora(rank=8, targets="all-linear"),
  f"prefix_tuning({VIRTUAL})": pelt.prefix_tuning(VIRTUAL),
  f"p_tuning_v2({VIRTUAL})": pelt.p_tuning_v2(VIRTUAL),
  f"prompt_tuning({VIRTUAL})": pelt.prompt_tuning(VIRTUAL),
  "full": pelt.full(),
}


def main() -> None:
  """Writes the figures."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/results"))
  out = parser.parse_args().out
  rows = {name: measure(method) for name, method in METHODS.items()}
  loss, plain, _, batch = case(pelt.full(), length=LENGTH + VIRTUAL)
  longer = compiled_flops(loss, plain, batch)
  report = {
    "date": datetime.date.today().isoformat(),
    "versions": {m.__name__: m.__version__ for m in (jax, flax, optax)},
    "platform": jax.default_backend(),
    "model": SIZES,
    "batch": [BATCH, LENGTH],
    "forward_with_tokens_for_a_prompt": longer,
    "methods": rows,
  }
  lines = [
    "# FLOPs of a step against a forward pass",
    "",
    f"{report['date']}, {report['platform']}, "
    + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    + ".",
    "",
    f"Llama, {SIZES['num_hidden_layers']} looped layers, width {SIZES['hidden_size']}, FFN "
    f"{SIZES['intermediate_size']}, {SIZES['vocab_size']} tokens, batch {BATCH} x {LENGTH}, "
    "float32, no remat. Forward: mean token loss from full logits, on plain params. Step: value "
    "and gradient of the same loss on params with nodes, and AdamW. Both compiled with params as "
    "arguments; GFLOP by `cost_analysis()`, products alone beside it (from the jaxpr), and what "
    "the mathematics needs. In the prompt's row some of the 128 tokens are virtual. The forward "
    f"pass of {VIRTUAL} tokens more costs {longer / 1e9:.3f}.",
    "",
    "| method | forward | with nodes | step | step / forward | products: forward | step | needed "
    "| ratio | trainable | optimizer |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for name, r in rows.items():
    all_flops = [f"{r[k] / 1e9:.3f}" for k in ("forward", "forward_nodes", "step")]
    products = [f"{r[k] / 1e9:.3f}" for k in ("forward_dots", "step_dots", "needed_dots")]
    lines.append(
      f"| {name} | {' | '.join(all_flops)} | {r['ratio']:.3f} | "
      f"{' | '.join(products)} | {r['ratio_dots']:.3f} | {r['trainable']:,} | {r['optimizer']:,} |"
    )
  out.mkdir(parents=True, exist_ok=True)
  for name, text in (
    ("flops.json", json.dumps(report, indent=2) + "\n"),
    ("flops.md", "\n".join(lines) + "\n"),
  ):
    partial = out / f"{name}.partial"
    partial.write_text(text)
    os.replace(partial, out / name)
  print("\n".join(lines))


if __name__ == "__main__":
  main()
