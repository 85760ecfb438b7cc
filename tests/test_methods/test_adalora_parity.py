"""AdaLoRA against torch PEFT: its allocator on the same tensors, and whole training runs."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import training
from tests.support import require

torch = require("torch")
peft = require("peft")

pytestmark = pytest.mark.parity

SHAPES = {"lin": (6, 10), "lin2": (10, 8)}
RANK, TARGET, ALPHA = 4, 2, 12
PHASES = dict(warmup=6, final=15, interval=3)


class Net(torch.nn.Module):
  """tanh(lin) then lin2, with the loss that PEFT adds its regulariser to."""

  def __init__(self):
    super().__init__()
    for name, (n, m) in SHAPES.items():
      setattr(self, name, torch.nn.Linear(n, m, bias=False))

  def forward(self, x, y):
    out = self.lin2(torch.tanh(self.lin(x)))
    return types.SimpleNamespace(loss=((out - y) ** 2).mean(), logits=out)


class Flax(nn.Module):
  """The same."""

  @nn.compact
  def __call__(self, x):
    dense = lambda name, width: nn.Dense(width, use_bias=False, param_dtype=x.dtype, name=name)
    return dense("lin2", 8)(jnp.tanh(dense("lin", 10)(x)))


def theirs(steps):
  torch.manual_seed(0)
  config = peft.AdaLoraConfig(
    target_modules=list(SHAPES),
    init_r=RANK,
    target_r=TARGET,
    lora_alpha=ALPHA,
    tinit=PHASES["warmup"],
    tfinal=PHASES["final"],
    deltaT=PHASES["interval"],
    total_step=steps,
    orth_reg_weight=0.3,
    beta1=0.8,
    beta2=0.7,
  )
  model = peft.get_peft_model(Net().double(), config).double()
  for name, p in model.named_parameters():
    if "ranknum" in name:  # PEFT 0.21 trains the scaling's divisor, which it means to keep fixed
      p.requires_grad = False
  return model, {name: getattr(model.base_model.model, name) for name in SHAPES}


def ours(layers, steps, **options):
  """Flax params with the tensors of torch's layers, and the method."""
  x = jnp.zeros((1, 6))
  base = {
    name: {"kernel": jnp.asarray(layer.base_layer.weight.detach().numpy().T)}
    for name, layer in layers.items()
  }
  method = pelt.adalora(
    steps,
    RANK,
    TARGET,
    ALPHA,
    targets="kernel",
    betas=(0.8, 0.7),
    gamma=0.3,
    ties="kth",
    **PHASES,
    **options,
  )
  params = method.init(jax.random.key(0), base, pelt.sites(Flax(), x))
  for name, layer in layers.items():
    a, e, b = (tensors(layer)[k] for k in ("a", "lam", "b"))
    params[name]["kernel"] = params[name]["kernel"].replace(a=a, lam=e, b=b)
  return method, params


def tensors(layer, grad=False):
  """Torch's A, E and B as ours lie."""
  take = lambda p: (p.grad if grad else p).detach().numpy().copy()
  a, e, b = (take(p["default"]) for p in (layer.lora_A, layer.lora_E, layer.lora_B))
  return {"a": jnp.asarray(a.T), "lam": jnp.asarray(e[:, 0]), "b": jnp.asarray(b.T)}


def averages(allocator, kind):
  """Torch's moving averages by our paths."""
  fields = {"A": ("a", lambda x: x.T), "E": ("lam", lambda x: x[:, 0]), "B": ("b", lambda x: x.T)}
  found = {}
  for name, value in getattr(allocator, kind).items():
    module, letter = name.split(".")[-3], name.split(".")[-2].removeprefix("lora_")
    field, turn = fields[letter]
    found[f"{module}/kernel/{field}"] = turn(value.numpy())
  return found


def test_allocator_fed_the_same_tensors():
  """70 steps: moving averages within 1e-12 and the same masks, through all three phases."""
  steps = 70
  with jax.enable_x64(True):
    model, layers = theirs(steps)
    method, params = ours(layers, steps)
    trainable, _ = pelt.partition(params)
    state, update = method.post_step.init(trainable), jax.jit(method.post_step.update)
    allocator = model.base_model.rankallocator
    rng, pruned = np.random.default_rng(0), set()
    for t in range(steps):
      for p in (p for p in model.parameters() if p.requires_grad):
        p.data, p.grad = (torch.tensor(rng.normal(size=p.shape)) for _ in range(2))
      put = lambda tree, grad: {
        name: {"kernel": tree[name]["kernel"].replace(**tensors(layers[name], grad))}
        for name in SHAPES
      }
      new, grads = put(trainable, False), put(trainable, True)
      model.base_model.update_and_allocate(t)
      new, state = update(state, trainable, new, grads)
      if t < steps - PHASES["final"]:
        for kind, mine in (
          ("exp_avg_ipt", state.sensitivity),
          ("exp_avg_unc", state.uncertainty),
        ):
          want = averages(allocator, kind)
          assert want.keys() == mine.keys()
          for path, value in mine.items():
            np.testing.assert_allclose(value, want[path], rtol=1e-12)
      masks = [np.asarray(new[n]["kernel"].lam != 0) for n in SHAPES]
      for mask, layer in zip(masks, layers.values(), strict=True):
        np.testing.assert_array_equal(mask, layer.lora_E["default"].detach().numpy()[:, 0] != 0)
      pruned.add(int(sum(m.sum() for m in masks)))
    assert {8, 4} < pruned  # unpruned, fully pruned, and budgets between


def test_training_with_clipping():
  """60 steps of both with the regulariser, clipping and Adam: equal losses, masks and factors."""
  steps, clip = 60, 0.4
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(16, 6)), rng.normal(size=(16, 8))
  with jax.enable_x64(True):
    model, layers = theirs(steps)
    method, params = ours(layers, steps)
    loss = lambda apply, params, batch, key: jnp.mean((apply({"params": params}, x) - y) ** 2)
    init, step = training.train_step(
      pelt.bypass(Flax().apply), loss, optax.adam(0.02), method, clip=clip
    )
    trainable, frozen, state = init(params)
    step = jax.jit(step)
    trained = [p for p in model.parameters() if p.requires_grad]
    tx, clipped, budgets = torch.optim.Adam(trained, 0.02), 0, set()
    for t in range(steps):
      # Not by model(...), which without a task type goes past the regulariser.
      value = model.base_model(torch.tensor(x), torch.tensor(y)).loss
      value.backward()
      norm = torch.sqrt(sum((p.grad**2).sum() for p in trained))
      if norm > clip:
        clipped += 1
        for p in trained:
          p.grad *= clip / norm
      tx.step()
      model.base_model.update_and_allocate(t)
      tx.zero_grad()
      trainable, state, metrics = step(trainable, frozen, state, {}, jax.random.key(0))
      assert float(metrics["loss"]) == pytest.approx(value.item(), rel=1e-11)
      for name, layer in layers.items():
        mine = trainable[name]["kernel"]
        for field, want in tensors(layer).items():
          np.testing.assert_allclose(mine.array(field), want, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(mine.lam != 0, tensors(layer)["lam"] != 0)
      budgets.add(int(state.post.kept[t]))
    assert clipped > 5 and len(budgets) > 2 and step._cache_size() == 1
    whole = pelt.combine(trainable, frozen)
    assert sum(pelt.ranks(whole).values()) == 2 * TARGET
    out = pelt.bypass(Flax().apply)({"params": pelt.shrink(whole)}, x)
    want = model(torch.tensor(x), torch.tensor(y)).logits.detach().numpy()
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-9)
    model.base_model.merge_adapter()
    for name, layer in layers.items():
      np.testing.assert_allclose(
        pelt.merge(whole)[name]["kernel"],
        layer.base_layer.weight.detach().numpy().T,
        rtol=0,
        atol=1e-9,
      )
