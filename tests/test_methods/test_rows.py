"""Several tasks' adapters in one bank: each row of a mixed batch has its own task's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax._walk import update_at
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

LONG = pytest.mark.parity
NAMES = ("sst2", "trec", "wnut")
ADAPTERS = {
  "houlsby": lambda m: pelt.adapter("houlsby", bottleneck=m),  # trains the norms too
  "pfeiffer": lambda m: pelt.adapter("pfeiffer", bottleneck=m),
  "parallel": lambda m: pelt.adapter("parallel", bottleneck=m),
  "learned": lambda m: pelt.adapter("scaled_parallel", bottleneck=m, scaling="learned"),
  "channel": lambda m: pelt.adapter("scaled_parallel", bottleneck=m, scaling="channel"),
  "own norm": lambda m: pelt.adapter("pfeiffer", bottleneck=m, norm=True, activation="gelu"),
}
SHORT = {("llama", "houlsby", "scan")}
ROWS = np.array([2, 0, 1, 2])


def tasks(name, style, scan=True):
  """A model and three tasks' params: adapters of unequal width, heads of five labels each."""
  model, base = built(name, "classification")
  if not scan:
    model, base = model.clone(scan=False), models.to_looped(base, model)
  sites = pelt.sites(model, tokens(4, 6))
  method = lambda m: pelt.chain(ADAPTERS[style](m), pelt.train("head"))
  made = [method(3 + i).init(jax.random.key(i), base, sites) for i in range(3)]
  return model, {
    n: moved(p, 0.1 + i / 10) for i, (n, p) in enumerate(zip(NAMES, made, strict=True))
  }


@pytest.mark.parametrize(("name", "style", "mode"), [
  pytest.param(*case, marks=[] if case in SHORT else [LONG])
  for case in ((n, s, m) for n in ("bert", "llama") for s in ADAPTERS for m in ("scan", "loop"))
])  # fmt: skip
def test_each_row_has_its_own_tasks_numbers(name, style, mode):
  model, some = tasks(name, style, mode == "scan")
  ids, mask = tokens(4, 6), np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 6, [1] * 3 + [0] * 3])
  apply = jax.jit(pelt.bypass(model.apply))
  mixed = apply({"params": pelt.bank(some)}, ids, mask, rows=ROWS)
  own = np.stack([apply({"params": p}, ids, mask) for p in some.values()])
  for row, task in enumerate(ROWS):
    close(mixed[row], own[task, row], 1e-5)
  apart = np.abs(own[:, None] - own[None]).max((2, 3))
  assert (apart + np.eye(3) > 1e-2).all()  # no two tasks could be taken for each other
  if style == "learned":
    every = pelt.parallel(apply)({"params": pelt.bank(some)}, ids, mask)
    close(every, own, 1e-5)


@LONG
@pytest.mark.parametrize("style", ["pfeiffer", "learned"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compositions_of_every_task(name, style):
  """Rows of a bank whose members are stacks and averages, weights of their own included."""
  model, some = tasks(name, style)
  shared, mean = some.pop("wnut"), dict(zip("ab", some.values(), strict=True))
  made = {
    n: pelt.stack({
      "shared": shared,
      "own": pelt.average(mean, weights={"a": w, "b": 1 - w}, head=head),
    }, head="own")
    for n, w, head in (("sst2", 0.25, "a"), ("trec", -1.0, "b"))
  }  # fmt: skip
  ids, rows = tokens(4, 6), np.array([1, 0, 0, 1])
  apply = jax.jit(pelt.bypass(model.apply))
  mixed = apply({"params": pelt.bank(made)}, ids, rows=rows)
  own = [apply({"params": p}, ids) for p in made.values()]
  for row, task in enumerate(rows):
    close(mixed[row], own[task][row], 1e-5)
  assert np.abs(own[0] - own[1]).max() > 1e-2


def test_what_one_bank_cannot_hold_is_named():
  model, base = built("bert", "classification")
  sites = pelt.sites(model, tokens(2, 6))
  head = pelt.chain(pelt.adapter("pfeiffer", bottleneck=3), pelt.train("head"))
  first = head.init(jax.random.key(0), base, sites)
  kernel = first["classifier"]["kernel"]
  wide = update_at(first, {"classifier/kernel": kernel.replace(value=jnp.zeros((32, 6)))})
  match = (
    r"members 'one' and 'two' of the bank have 'classifier/kernel' of shapes .*number of labels"
  )
  with pytest.raises(ValueError, match=match):
    pelt.bank({"one": first, "two": wide})
  bare = pelt.adapter("pfeiffer", bottleneck=3).init(jax.random.key(0), base, sites)
  with pytest.raises(ValueError, match="members 0 and 1 of the bank differ at"):
    pelt.bank([first, bare])
  with pytest.raises(ValueError, match="params hold no bank"):
    pelt.parallel(pelt.bypass(model.apply))({"params": first}, tokens(2, 6))
  banked = pelt.bank([first, first])
  with pytest.raises(ValueError, match="so leave rows out"):
    pelt.parallel(pelt.bypass(model.apply))({"params": banked}, tokens(2, 6), rows=np.array([0, 1]))
