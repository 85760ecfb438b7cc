"""AdapterHub's compositions: the right ones number for number in float64, its defects shown."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from tests.support import require
from tests.test_models.helpers import close, tokens

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = require("torch")
adapters = require("adapters")
require("flax_transformers")

from tests.test_foreign.adapterhub import CASES, lifted, read, theirs  # noqa: E402

composition = importlib.import_module("adapters.composition")
assert lifted  # a fixture
NAMES = ("one", "two", "three")
WEIGHTS = {"one": 1.5, "two": -0.75, "three": 0.25}


def right(names, weights):
  """Their Average with the factor 1 / N that it multiplies its weighted sum by taken out."""
  values = [len(names) * weights[n] for n in names]
  return composition.Average(*names, weights=values, normalize_weights=False)


def pick(members, *names):
  return {n: members[n] for n in names}


def stack_of_average(members):
  mean = pelt.average(pick(members, "two", "three"), weights={"two": 3, "three": 1})
  return pelt.stack({"one": members["one"], "mean": mean})


def average_of_stack(members):
  pair = pelt.stack(pick(members, "one", "two"))
  parts = {"pair": pair, "three": members["three"]}
  return pelt.average(parts, weights={"pair": 0.75, "three": 0.25})


# Theirs, ours of the named adapters.
COMPOSITIONS = {
  "stack": (lambda: adapters.Stack(*NAMES), pelt.stack),
  "average": (
    lambda: right(NAMES, WEIGHTS),
    lambda members: pelt.average(members, weights=WEIGHTS),
  ),
  "stack of an average": (
    lambda: adapters.Stack("one", right(("two", "three"), {"two": 0.75, "three": 0.25})),
    stack_of_average,
  ),
  "average of a stack": (
    lambda: composition.Average(
      adapters.Stack("one", "two"), "three", weights=[1.5, 0.5], normalize_weights=False
    ),
    average_of_stack,
  ),
  "parallel": (lambda: adapters.Parallel(*NAMES), pelt.bank),
}
# Theirs normalizes twice before a stack inside an average, and a stack of parallel adapters forgets
# all but its last: shown below. Its parallel adapters cannot be run in a Parallel block.
WRONG = {("pfeiffer", "average of a stack"), ("parallel", "stack"), ("parallel", "parallel")}
WRONG |= {("parallel", "stack of an average"), ("parallel", "average of a stack")}
PAIRS = [
  (family, style, block)
  for family in ("bert", "gpt2")
  for style in ("pfeiffer", "houlsby", "parallel")
  for block in COMPOSITIONS
  if (style, block) not in WRONG
]


class Both:
  """Their model with three adapters and ours, holding the same arrays."""

  def __init__(self, family, style, folder):
    _, config = CASES[style]

    def add(model):
      for name in NAMES:
        model.add_adapter(name, config=config())
      model.train_adapter(adapters.Parallel(*NAMES))

    self.folder, self.model = folder, theirs(family, folder / "base", add)
    self.ids = tokens(2, 7)
    self.module, self.base = models.from_pretrained(
      folder / "base", task="encoder", dtype="float64"
    )
    self.sites = pelt.sites(self.module, self.ids)

  def run(self, block):
    self.model.set_active_adapters(block)
    return self.model(input_ids=torch.tensor(self.ids).long()).last_hidden_state

  def members(self):
    """Our params of every adapter, by way of the files that theirs are saved in."""
    save = lambda name: lambda folder: self.model.save_adapter(folder, name)
    given = (self.module, self.base, self.sites)
    return {name: read(save(name), self.folder / name, *given) for name in NAMES}

  def ours(self, params):
    apply = pelt.bypass(self.module.apply)
    return np.asarray(jax.jit(apply)({"params": params}, self.ids))


@pytest.mark.parametrize(("family", "style", "block"), PAIRS)
def test_outputs_and_gradients(family, style, block, tmp_path, lifted):
  make_theirs, make_ours = COMPOSITIONS[block]
  with jax.enable_x64(True):
    both = Both(family, style, tmp_path)
    out = both.run(make_theirs())
    shape = (3, 2, 7, 32) if block == "parallel" else (2, 7, 32)
    cotangent = np.random.default_rng(0).normal(size=shape)
    out.backward(torch.tensor(cotangent).reshape(out.shape))
    apply = pelt.bypass(both.module.apply)
    apply = pelt.parallel(apply) if block == "parallel" else apply

    def loss(params):
      got = apply({"params": params}, jnp.asarray(both.ids))
      return jnp.sum(got * cotangent), got

    trainable, frozen = pelt.partition(make_ours(both.members()))
    (_, got), grads = jax.jit(pelt.value_and_grad(loss, has_aux=True))(trainable, frozen)
    close(got, out.detach().numpy().reshape(shape), 1e-9)
    with torch.no_grad():
      trained = [p for p in both.model.parameters() if p.requires_grad]
      for p in trained:
        p.copy_(p.grad)
    want, _ = pelt.partition(make_ours(both.members()))
    ours, theirs_ = jax.tree.leaves(grads), jax.tree.leaves(want)
    assert sum(g.size for g in ours) == sum(p.numel() for p in trained)
    dead = [not np.any(b) for b in theirs_]  # two ReLUs a place: some see nothing
    assert sum(dead) < len(dead) / 4
    for a, b, none in zip(ours, theirs_, dead, strict=True):
      close(a, b, 1e-9) if not none else np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("style", ["pfeiffer", "houlsby", "parallel"])
def test_soup(style, tmp_path, lifted):
  with jax.enable_x64(True):
    both = Both("bert", style, tmp_path)
    torch.set_default_dtype(torch.float64)  # in which it makes the new adapter
    try:
      both.model.average_adapter("mean", list(NAMES), weights=[3.0, -1.0, 2.0])
    finally:
      torch.set_default_dtype(torch.float32)
    both.model.eval()
    want = both.run("mean").detach().numpy()
    soup = pelt.soup(both.members(), weights=dict(zip(NAMES, (3, -1, 2), strict=True)))
    close(both.ours(soup), want, 1e-9)


def test_what_theirs_gets_wrong(tmp_path, lifted):
  """The right numbers are those of the formulas in tests/test_methods/test_composition.py."""
  far = lambda a, b: np.abs(a - b).max() > 1e-2 * np.abs(b).max()
  with jax.enable_x64(True):
    both = Both("bert", "houlsby", tmp_path / "houlsby")
    run = lambda block: both.run(block).detach().numpy()
    # Of three equal adapters the average is that adapter; theirs is a third of it.
    assert far(run(composition.Average("one", "one", "one")), run("one"))
    equal = {n: both.members()["one"] for n in NAMES}
    close(both.ours(pelt.average(equal)), run("one"), 1e-9)
    close(run(right(("one", "one", "one"), {"one": 1 / 3})), run("one"), 1e-9)

    both = Both("bert", "parallel", tmp_path / "parallel")
    members = both.members()
    # Beside the sublayer each adds its own; theirs leaves out what came before the last.
    close(run(adapters.Stack(*NAMES)), run("three"), 1e-12)
    pair = both.ours(pelt.stack(members))
    assert far(run(adapters.Stack(*NAMES)), pair)
    with pytest.raises(RuntimeError, match="must match"):  # rows of three batches beside one
      run(adapters.Parallel(*NAMES))
    thirds = pelt.average(members, weights=dict.fromkeys(NAMES, 1.0), normalize=False)
    close(pair, both.ours(thirds), 1e-9)

    both = Both("bert", "pfeiffer", tmp_path / "pfeiffer")
    # A stack inside an average reads what it reads alone; theirs normalizes that once more.
    alone = adapters.Stack("one", "two")
    twice = composition.Average(alone, weights=[1.0], normalize_weights=False)
    assert far(run(twice), run(alone))
    pair = pelt.stack(pick(both.members(), "one", "two"))
    close(both.ours(pelt.average({"pair": pair})), run(alone), 1e-9)
