import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax.models import token_losses
from pelt_jax.models._loss import chunked_losses
from tests.test_models.helpers import (
  CONFIGS,
  VOCAB,
  built,
  close,
  random_params,
  tokens,
  trees_close,
)

OWN = pytest.param("llama", marks=pytest.mark.parity)


def test_loss_in_closed_form():
  # softmax of (0, ln 3) is (1/4, 3/4).
  logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]]))
  out = token_losses(logits, jnp.array([[0, 1, -100]]))
  np.testing.assert_allclose(out, [[np.log(4), np.log(4 / 3), 0]], rtol=1e-6)


def test_labels_outside_the_vocabulary_are_loud():
  out = token_losses(jnp.zeros((1, 3, 4)), jnp.array([[4, -1, 3]]))
  np.testing.assert_array_equal(jnp.isnan(out), [[True, True, False]])


def test_half_precision_logits_give_float32_losses():
  logits = jnp.zeros((1, 1, 300), jnp.bfloat16)
  out = token_losses(logits, jnp.array([[0]]))
  assert out.dtype == jnp.float32 and abs(float(out[0, 0]) - np.log(300)) < 1e-5


@pytest.mark.parametrize(  # own head, tied head
  "name", [OWN, pytest.param("qwen2", marks=pytest.mark.parity)]
)
# 4 chunks of 3 positions (one padded), 6 of 2
@pytest.mark.parametrize("chunk", [10, pytest.param(6, marks=pytest.mark.parity)])
def test_chunks_change_neither_losses_nor_gradients(name, chunk):
  model, params = built(name, "lm")
  ids, labels = tokens(3, 11), tokens(3, 11, seed=1)
  labels[0, :4] = -100

  def plain(p):
    out = token_losses(model.apply({"params": p}, ids), labels)
    return out.mean(), out

  def chunked(p):
    out = model.clone(loss_chunk=chunk).apply({"params": p}, ids, labels=labels)
    return out.mean(), out

  (_, want), gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
  (_, got), other = jax.jit(jax.value_and_grad(chunked, has_aux=True))(params)
  assert got.dtype == jnp.float32 and not got[0, :4].any()
  close(got, want, 2e-6)
  trees_close(other, gradient, 1e-5)


def shapes_in(jaxpr):
  """Shapes of everything a jaxpr computes, inner jaxprs included."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars)
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from shapes_in(inner)


def test_full_logits_never_exist():
  batch, length, chunk = 2, 64, 16
  raw = CONFIGS["llama"] | {"vocab_size": 4096, "num_hidden_layers": 1}
  model = models.from_config(raw, scan=True)
  params, ids = random_params(model), tokens(batch, length)

  def program(chunk):
    f = lambda p: model.clone(loss_chunk=chunk).apply({"params": p}, ids, labels=ids).sum()
    grad = jax.grad(f)
    largest = max(
      int(np.prod(s)) for s in shapes_in(jax.make_jaxpr(grad)(params).jaxpr) if 4096 in s
    )
    return largest, jax.jit(grad).lower(params).compile().memory_analysis().temp_size_in_bytes

  full = batch * length * 4096
  (plain, plain_bytes), (chunked, chunked_bytes) = program(10**6), program(chunk)
  assert plain == full  # the check sees them where they do exist
  # Nothing larger than the head itself (32 x 4096) or a chunk of logits.
  assert chunked <= max(32, chunk) * 4096 < full
  assert plain_bytes - chunked_bytes > 4 * (full - 4 * chunk * 4096)


def products_with(size, jaxpr):
  """How many products in the program touch an axis of that size."""
  count = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      count += any(size in v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      count += products_with(size, inner) if hasattr(inner, "eqns") else 0
  return count


@pytest.mark.parametrize("name", [OWN, "qwen2"])
def test_a_frozen_head_is_not_computed_again(name):
  model, params = built(name, "lm")
  ids, labels = tokens(3, 11), tokens(3, 11, seed=1)
  labels[0, :4] = -100
  sites = pelt.sites(model, ids)

  def step(method, chunk):
    trainable, frozen = pelt.partition(method.init(jax.random.key(0), params, sites))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)  # b starts at zero, a's gradient too
    apply = pelt.bypass(model.clone(loss_chunk=chunk).apply)
    weights = jnp.linspace(0, 1, 33, dtype=jnp.float32).reshape(3, 11)  # no two cotangents alike
    loss = lambda p: (apply({"params": p}, ids, labels=labels) * weights).sum()
    run = lambda t, f: pelt.value_and_grad(loss)(t, f)
    return jax.jit(run)(trainable, frozen), products_with(
      VOCAB, jax.make_jaxpr(run)(trainable, frozen).jaxpr
    )

  lora = pelt.lora(rank=2, targets=("query", "value"))
  (want, gradient), _ = step(lora, 10**6)
  (got, other), products = step(lora, 10)
  close(got, want, 2e-6)
  trees_close(other, gradient, 1e-5)
  assert products == 2  # the logits, and their gradient in x

  target = "lm_head" if name == "llama" else "embed_tokens"
  (want, gradient), _ = step(pelt.train(target), 10**6)
  (got, other), products = step(pelt.train(target), 10)
  close(got, want, 2e-6)
  trees_close(other, gradient, 1e-5)
  assert products == 4  # the logits twice, their gradients in x and in the head


@pytest.mark.parity
def test_dropout_at_the_head_is_the_same_both_ways():
  model, params = built("llama", "lm")
  ids = tokens(2, 8)
  method = pelt.chain(
    pelt.lora(rank=2, targets="head", dropout=0.5), pelt.lora(rank=2, targets="query")
  )
  params = method.init(jax.random.key(0), params, pelt.sites(model, ids))
  trainable, frozen = pelt.partition(params)
  trainable = jax.tree.map(lambda x: x + 0.1, trainable)
  apply = pelt.bypass(model.clone(loss_chunk=4).apply)

  def loss(trainable):
    out = apply(
      {"params": pelt.combine(trainable, frozen)},
      ids,
      labels=ids,
      deterministic=False,
      rngs={"dropout": jax.random.key(1)},
    )
    return out.sum()

  # Along the gradient the loss rises by its squared norm, if both passes drop the same entries.
  gradient = jax.grad(loss)(trainable)
  norm = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(gradient))
  size = 1e-2 / norm**0.5
  moved = [
    float(loss(jax.tree.map(lambda t, g, s=s: t + s * size * g, trainable, gradient)))
    for s in (-1, 1)
  ]
  assert abs((moved[1] - moved[0]) / (2 * size * norm) - 1) < 1e-2


def test_nodes_at_the_head_run_in_every_chunk():
  model, params = built("llama", "lm")
  ids = tokens(2, 8)
  method = pelt.lora(rank=2, targets="head")
  params = method.init(jax.random.key(0), params, pelt.sites(model, ids))
  params["lm_head"]["kernel"] = params["lm_head"]["kernel"].replace(b=jnp.ones((2, VOCAB)))
  apply = pelt.bypass(model.clone(loss_chunk=4).apply)
  want = token_losses(pelt.bypass(model.apply)({"params": params}, ids), ids)
  close(apply({"params": params}, ids, labels=ids), want, 2e-6)


def test_labels_have_the_shape_of_the_ids():
  model, params = built("llama", "lm")
  with pytest.raises(ValueError, match=r"shape of input_ids, \(2, 8\): \(2, 7\)"):
    model.apply({"params": params}, tokens(2, 8), labels=tokens(2, 7))


class Head(nn.Module):
  """Hidden states to losses by a head in bfloat16, in chunks or at once."""

  chunk: int | None = None

  def setup(self):
    self.dense = nn.Dense(VOCAB, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

  def __call__(self, x, labels):
    head = lambda module, x: module.dense(x)
    if self.chunk is None:
      return token_losses(head(self, x), labels)
    return chunked_losses(self, head, x, labels, self.chunk)


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.parity)])
def test_cotangents_in_bfloat16(trains):
  """Any weights of the tokens: gradients in bfloat16, as close as one rounding of them allows."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 7, 16)), jnp.bfloat16)
  labels = rng.integers(0, VOCAB, (2, 7)).astype(np.int32)
  labels[0, :2] = -100
  weights = jnp.asarray(rng.normal(size=(2, 7)) * 10.0 ** rng.integers(-3, 4, (2, 7)), jnp.float32)
  weights = weights.at[1, 3].set(0.0)
  params = Head().init(jax.random.key(0), x, labels)["params"]

  def gradient(model, x, params, weights):
    loss = lambda x, p: jnp.sum(model.apply({"params": p}, x, labels) * weights)
    return jax.jit(jax.grad(loss, argnums=(0, 1) if trains else 0))(x, params)

  got = gradient(Head(chunk=4), x, params, weights)
  wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  exact = nn.Dense(VOCAB)
  loss = lambda x, p: jnp.sum(
    token_losses(exact.apply({"params": p["dense"]}, x), labels) * weights
  )
  want = jax.grad(loss, argnums=(0, 1) if trains else 0)(wide(x), wide(params))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == jnp.bfloat16
    close(a, b, 2e-2)
  by_token = got[0] if trains else got
  np.testing.assert_array_equal(by_token[0, :2], 0)  # ignored
  np.testing.assert_array_equal(by_token[1, 3], 0)  # weighed zero
  want = want[0] if trains else want
  for t in range(7):  # each token by itself: small weights are not lost beside large ones
    if t != 3:
      close(by_token[1, t], want[1, t], 4e-2)
  doubled = gradient(Head(chunk=4), x, params, 4 * weights)  # exact in binary
  for a, b in zip(jax.tree.leaves(doubled), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(a, 4 * b)
