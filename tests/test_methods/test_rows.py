"""Several tasks' adapters in one bank: each row of a mixed batch has its own task's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax._walk import get_at, update_at
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


NESTED = {
  "two LoRAs": lambda: pelt.chain(pelt.lora(2), pelt.lora(3)),
  "over codes": lambda: pelt.qlora(2, block=32),
  "merge-aware": lambda: pelt.qlora(2, block=32, merge_aware=True),
}


@pytest.mark.parametrize(
  "nested", [pytest.param("two LoRAs", marks=LONG), "merge-aware", "over codes"]
)
def test_nodes_on_nodes_are_each_members_own(nested):
  """What lies between the outermost node and the base is the member's too."""
  model, base = built("llama", "encoder")
  ids = tokens(2, 6)
  params = NESTED[nested]().init(jax.random.key(0), base, pelt.sites(model, ids))
  some = [moved(params, 0.1), moved(params, 0.3)]
  apply = jax.jit(pelt.bypass(model.apply))
  own = np.stack([apply({"params": p}, ids) for p in some])
  banked = pelt.bank(some)
  mixed = apply({"params": banked}, ids, rows=np.array([1, 0]))
  close(mixed, np.stack([own[1, 0], own[0, 1]]), 1e-5)
  assert np.abs(own[0] - own[1]).max() > 1e-2
  for member, out in zip(pelt.unbank(banked)[1], own, strict=True):
    close(apply({"params": member}, ids), out, 1e-6)


def test_quantized_bases_are_compared_and_shared():
  """Codes alone are a base: equal in all members, held once, and no method's own."""
  model, base = built("llama", "encoder")
  ids = tokens(2, 6)
  sites = pelt.sites(model, ids)
  init = lambda method, base, by: moved(method.init(jax.random.key(0), base, sites), by)
  some = pelt.chain(pelt.nf4(block=32), pelt.lora(2, targets="query"))
  one, two = (init(some, base, by) for by in (0.1, 0.3))
  apply = pelt.bypass(model.apply)
  banked = pelt.bank([one, two])
  mixed = apply({"params": banked}, ids, rows=np.array([1, 0]))
  own = [apply({"params": p}, ids) for p in (one, two)]
  close(mixed, np.stack([own[1][0], own[0][1]]), 1e-5)
  assert pelt.count(banked).rank == 2  # of one member
  for member, out in zip(pelt.unbank(banked)[1], own, strict=True):
    close(apply({"params": member}, ids), out, 1e-6)
  other = init(some, jax.tree.map(lambda x: x + 0.1, base), 0.1)
  fp4 = init(pelt.chain(pelt.nf4(block=32, book="fp4"), pelt.lora(2, targets="query")), base, 0.1)
  for wrong in (other, fp4):
    with pytest.raises(ValueError, match="have other values at '.*' of the base"):
      pelt.bank([one, wrong])
  mean = pelt.soup({"a": one, "b": two}, head="a")
  leaf = lambda p: jax.tree.leaves(pelt.partition(p)[0])[0]
  close(leaf(mean), (leaf(one) + leaf(two)) / 2, 1e-6)
  adapter = pelt.chain(pelt.nf4(block=32), pelt.adapter("pfeiffer", bottleneck=2))
  a, b = (init(adapter, base, by) for by in (0.1, 0.3))
  apply({"params": pelt.average({"a": a, "b": b})}, ids)  # no leaf of the model is in the way


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


@pytest.mark.parametrize(("name", "style", "mode"), [
  pytest.param(*case, marks=[] if case == ("bert", "own norm", "scan") else [LONG])
  for case in ((n, s, m) for n in ("bert", "llama") for s in ADAPTERS for m in ("scan", "loop"))
])  # fmt: skip
def test_a_bank_is_taken_apart(name, style, mode):
  """Members of their own numbers, widened by zeros; the base below them."""
  model, some = tasks(name, style, mode == "scan")
  base, members = pelt.unbank(pelt.bank(some))
  assert len(members) == 3
  plain = jax.tree.map(jnp.shape, model.init(jax.random.key(0), tokens(4, 6))["params"])
  assert jax.tree.map(jnp.shape, base) == plain
  apply, ids = jax.jit(pelt.bypass(model.apply)), tokens(4, 6)
  for task, member in zip(some.values(), members, strict=True):
    close(apply({"params": member}, ids), apply({"params": task}, ids), 1e-6)
  widest = members[2]  # no zeros
  assert jax.tree.structure(widest) == jax.tree.structure(some["wnut"])
  jax.tree.map(np.testing.assert_array_equal, widest, some["wnut"])


@LONG
def test_stacks_and_prefixes_of_a_bank_are_taken_apart():
  model, some = tasks("bert", "pfeiffer")
  one, two, three = some.values()
  prefix = pelt.prefix_tuning(2, reparametrize=False, shift_positions=False)
  sites = pelt.sites(model, tokens(4, 6))
  made = [pelt.stack({"a": a, "b": b}, head="a") for a, b in ((one, two), (one, three))]
  made = [prefix.init(jax.random.key(i), p, sites) for i, p in enumerate(made)]
  _, members = pelt.unbank(pelt.bank(made))
  apply, ids = jax.jit(pelt.bypass(model.apply)), tokens(4, 6)
  for task, member in zip(made, members, strict=True):
    close(apply({"params": member}, ids), apply({"params": task}, ids), 1e-6)


def test_multi_task_training_moves_what_tasks_share_and_fuses_after():
  """MT-A: the model and every task's adapters at once; then each alone, and their fusion."""
  model, some = tasks("bert", "pfeiffer")
  sites, ids = pelt.sites(model, tokens(4, 6)), tokens(4, 6)
  both = pelt.train("*").init(jax.random.key(0), pelt.bank(some), sites)
  whole = sum(x.size for x in jax.tree.leaves(pelt.unbank(pelt.bank(some))[0]))
  head = 5 * 32 + 5
  assert pelt.count(both).trainable == pelt.count(pelt.bank(some)).trainable + whole - head

  def loss(apply, params, batch, key):
    return jnp.mean((apply({"params": params}, batch["ids"], rows=batch["rows"]) - 1) ** 2)

  apply = pelt.bypass(model.apply)
  train = training.train_step(apply, loss, optax.sgd(1e-2))
  trainable, frozen, state = train.init(both)
  batch = {"ids": ids, "rows": jnp.array([2, 0, 0, 2])}
  new, _, _ = jax.jit(train.step)(trainable, frozen, state, batch, jax.random.key(0))
  trained = pelt.combine(new, frozen)
  base, members = pelt.unbank(trained)
  kernel = lambda tree: tree["bert"]["encoder"]["layer"]["intermediate"]["dense"]["kernel"]
  up = lambda tree: get_at(tree, "bert/encoder/layer/output/LayerNorm/bypass").branch.up
  assert np.abs(kernel(base) - kernel(some["sst2"])).max() > 1e-6
  moved_by = [
    np.abs(up(m) - up(o)).max() for m, o in zip(members, pelt.unbank(both)[1], strict=True)
  ]
  assert moved_by[1] == 0.0 and min(moved_by[0], moved_by[2]) > 1e-6  # no row was of the second
  mixed = apply({"params": trained}, ids, rows=ROWS)
  for row, task in enumerate(ROWS):
    np.testing.assert_array_equal(kernel(members[task]), kernel(base))  # frozen from here on
    close(mixed[row], apply({"params": members[task]}, ids)[row], 1e-5)
  fusion = pelt.adapter_fusion(dict(zip(NAMES, members, strict=True)))
  fused = pelt.chain(fusion, pelt.train("head")).init(jax.random.key(1), base, sites)
  assert pelt.count(fused).trainable == 3 * (3 * 32 * 32 + 2 * 32) + head
  assert np.isfinite(np.asarray(apply({"params": fused}, ids))).all()
  with pytest.raises(ValueError, match="params hold no bank"):
    pelt.unbank(base)


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
  with pytest.raises(TypeError, match="the tasks go into pelt.bank|Callable"):
    pelt.parallel({"one": first, "two": first})
  apply, ids = pelt.bypass(model.apply), tokens(2, 6)
  with pytest.raises(ValueError, match="rows: it chooses among the members of a bank"):
    apply({"params": first}, ids, rows=np.array([0, 1]))
  banked = pelt.bank([first, first])
  for rows in (["one", "two"], np.zeros(2)):
    with pytest.raises(ValueError, match="rows has dtype .* as integers"):
      apply({"params": banked}, ids, rows=rows)
  assert apply({"params": banked}, ids, rows=[0, 1]).shape[0] == 2
  with pytest.raises(ValueError, match="so leave rows out"):
    pelt.parallel(pelt.bypass(model.apply))({"params": banked}, tokens(2, 6), rows=np.array([0, 1]))
