"""P-Tuning against torch: its LSTM and MLP, an optimizer step, and torch PEFT's prompt encoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from tests import support
from tests.test_methods.test_prompt_parity import array, logits, pair
from tests.test_models import helpers

torch = support.require("torch")
peft = support.require("peft")

from tests.test_models.test_parity import lifted as lifted  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
N, D, LR = 5, 12, 1e-2


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def from_torch(node, embedding, lstm, mlp, convert=array):
  """The node with torch's arrays; `convert` reads one."""
  cells = lambda suffix: tuple(
    cell.replace(
      w_ih=convert(getattr(lstm, f"weight_ih_l{i}{suffix}")).T,
      w_hh=convert(getattr(lstm, f"weight_hh_l{i}{suffix}")).T,
      b_ih=convert(getattr(lstm, f"bias_ih_l{i}{suffix}")),
      b_hh=convert(getattr(lstm, f"bias_hh_l{i}{suffix}")),
    )
    for i, cell in enumerate(node.forward)
  )
  linear = [m for m in mlp if isinstance(m, torch.nn.Linear)]
  made = node.replace(
    embedding=convert(embedding.weight),
    forward=cells(""),
    backward=cells("_reverse"),
    mlp=tuple(
      a.replace(kernel=convert(m.weight).T, bias=convert(m.bias))
      for a, m in zip(node.mlp, linear, strict=True)
    ),
  )
  shapes = [[x.shape for x in jax.tree.leaves(n)] for n in (made, node)]
  assert shapes[0] == shapes[1]
  return made


def ours(hidden, dtype):
  """Our node alone, of the paper's form."""
  sites = pelt.sites(nn.Embed(7, D), jnp.zeros((1, 2), jnp.int32))
  table = {"embedding": jnp.zeros((7, D), dtype)}
  params = pelt.p_tuning(N, hidden=hidden).init(jax.random.key(0), table, sites)
  (node,) = params["generators"].values()
  return node


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("hidden", [D // 2, D])
def test_outputs_and_an_adam_step_are_torchs(hidden, dtype, tolerance):
  torch.manual_seed(0)
  kind = getattr(torch, dtype)
  embedding = torch.nn.Embedding(N, D, dtype=kind)
  lstm = torch.nn.LSTM(D, hidden, 2, bidirectional=True, batch_first=True, dtype=kind)
  mlp = torch.nn.Sequential(
    torch.nn.Linear(2 * hidden, D, dtype=kind),
    torch.nn.ReLU(),
    torch.nn.Linear(D, D, dtype=kind),
  )
  target = torch.randn(N, D, dtype=kind)
  with jax.enable_x64(dtype == "float64"):
    node = from_torch(ours(hidden, dtype), embedding, lstm, mlp)
    rows = mlp(lstm(embedding.weight[None])[0])[0]
    helpers.close(node.prompt(), array(rows), tolerance)

    parameters = [p for m in (embedding, lstm, mlp) for p in m.parameters()]
    tx = torch.optim.Adam(parameters, LR)
    ((rows - target) ** 2).sum().backward()
    want = from_torch(node, embedding, lstm, mlp, lambda p: array(p.grad))
    wanted = array(target)
    grads = jax.jit(jax.grad(lambda n: ((n.prompt() - wanted) ** 2).sum()))(node)
    helpers.trees_close(grads, want, tolerance)

    tx.step()
    after = from_torch(node, embedding, lstm, mlp)
    mine = optax.adam(LR)
    with jax.numpy_dtype_promotion("standard"):
      updates, _ = mine.update(grads, mine.init(node))
    # A step is g / (|g| + eps): where g is small, its rounding shows as it is, hence not relative.
    step = optax.apply_updates(node, updates)
    helpers.trees_close(step, after, 1e-4 if dtype == "float32" else 1e-9)
    moved = after.forward[0].b_ih + after.forward[0].b_hh
    moved = moved - node.forward[0].b_ih - node.forward[0].b_hh
    helpers.close(jnp.abs(moved), np.full(moved.shape, 2 * LR), 1e-3)


@pytest.mark.parametrize("kind", ["LSTM", "MLP"])
@pytest.mark.parametrize(
  ("name", "task"), [("llama", "lm"), ("gpt2", "lm"), ("bert", "classification")]
)
def test_torch_pefts_prompt_encoder(name, task, kind, tmp_path, lifted):
  config = lambda **kw: peft.PromptEncoderConfig(
    num_virtual_tokens=N, encoder_reparameterization_type=kind, encoder_hidden_size=10, **kw
  )
  ids = helpers.tokens(2, 7)
  with jax.enable_x64(True):
    model, base, theirs = pair(name, task, config, tmp_path)
    method = pelt.p_tuning(N, encoder=kind.lower(), variant="peft", hidden=10)
    params = method.init(jax.random.key(0), base, pelt.sites(model, ids))
    encoder = theirs.prompt_encoder["default"]
    ((number, node),) = params["generators"].items()
    assert isinstance(node, nodes.PromptEncoder)
    lstm = encoder.lstm_head if kind == "LSTM" else None
    params["generators"][number] = from_torch(node, encoder.embedding, lstm, encoder.mlp_head)
    assert pelt.count(params).trainable == sum(p.numel() for p in encoder.parameters())
    virtual = np.tile(np.array(pelt.virtual_tokens(params), np.int32), (2, 1))
    got = pelt.bypass(model.apply)({"params": params}, np.concatenate([virtual, ids], axis=1))
    helpers.close(got, logits(theirs, ids), 1e-9)
