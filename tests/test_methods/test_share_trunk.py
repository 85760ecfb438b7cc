"""Several tasks over one batch: equal to separate runs, the shared layers run once, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pelt_jax as pelt
from pelt_jax import models, nodes, training
from pelt_jax._walk import update_at, walk
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import CONFIGS, built, close, padded, random_params, tokens

LONG = pytest.mark.parity
LAYERS = 3
LABELS = {"sst2": 2, "trec": 5}
IDS, MASK = padded(tokens(4, 7), [7, 5, 3, 6], "right")


SEEN = []  # what layers and how many rows


class Block(nn.Module):
  """A layer that notes how many rows it sees."""

  @nn.compact
  def __call__(self, x, factors, flag=True):
    assert flag and factors.shape[0] in (1, x.shape[0])
    SEEN.append((self.name, x.shape[0]))
    return factors * nn.Dense(2, use_bias=False, name="dense")(x)


class Stack(nn.Module):
  """Two layers and a head; `factors` has a row for each of the batch, or one for all."""

  early: bool = False

  @nn.compact
  def __call__(self, x, factors):
    if self.early:
      x = nn.Dense(2, use_bias=False, name="first")(x)
    for i in range(2):
      x = Block(name=f"layer_{i}")(x, factors=factors)
    return nn.Dense(1, use_bias=False, name="head")(x)


ROLES = {"layer": (pelt.Role("layer_*"),), "head": (pelt.Role("head"),)}


@pytest.mark.parametrize("each", [True, False])
def test_a_small_model_by_hand(each):
  """f (f x W0)(W1 + a b) H per task; layer 0 sees B rows, layer 1 two times B."""
  model, x = Stack(), jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
  factors = jnp.array([[1.0], [2.0], [4.0]] if each else [[2.0]])
  w0, w1 = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
  base = {"layer_0": {"dense": {"kernel": w0}}, "layer_1": {"dense": {"kernel": w1}}}
  base |= {"head": {"kernel": jnp.ones((2, 1))}}
  sites = pelt.sites(model, x, factors, roles=ROLES)
  tasks, want = {}, {}
  for name, a, head in (("one", [[1.0], [0.0]], [[1.0], [3.0]]), ("two", [[0.0], [2.0]], None)):
    b = jnp.array([[1.0, -1.0]])
    lora = nodes.LoraWeight(w1, jnp.array(a), b, jnp.array(1.0))
    head = jnp.array(head) if head else jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    new = {"layer_1/dense/kernel": lora, "head/kernel": nodes.Tuned(head)}
    tasks[name] = update_at(base, new)
    want[name] = factors * (factors * (x @ w0)) @ (w1 + jnp.array(a) @ b) @ head
  params = pelt.share_trunk(tasks, sites)
  SEEN.clear()
  out = pelt.bypass(model.apply)({"params": params}, x, factors)
  assert [*out] == ["one", "two"] and out["one"].shape == (3, 1) and out["two"].shape == (3, 3)
  for name in want:
    np.testing.assert_array_equal(out[name], want[name])
  assert SEEN == [("layer_0", 3), ("layer_1", 6)]


def trained(name, method, labels=None, task="classification"):
  """Tasks' models and params over one trunk, heads of their own, looped, in float64."""
  made, trunk = {}, None
  for i, (task_name, count) in enumerate((labels or LABELS).items()):
    options = {"num_labels": count} if task == "classification" else {}
    model = models.from_config(CONFIGS[name], task=task, dtype=jnp.float64, **options)
    base, sites = random_params(model), pelt.sites(model, IDS, MASK)
    heads = {s.path for s in sites if s.kind == "leaf" and any(r.role == "head" for r in s.roles)}
    trunk = base if trunk is None else trunk
    base = update_at(trunk, {p: v for p, v in walk(base) if p in heads})
    params = moved(method.init(jax.random.key(i), base, sites), 0.1 + i / 10)
    made[task_name] = model, base, params, sites
  return made


def compiled(model, params):
  """Outputs and FLOPs of a forward pass."""
  run = jax.jit(pelt.bypass(model.apply)).lower({"params": params}, IDS, MASK).compile()
  return run({"params": params}, IDS, MASK), run.cost_analysis()["flops"]


def method_of(drop, **options):
  return pelt.chain(pelt.adapter_drop(drop, bottleneck=5, **options), pelt.train("head"))


@pytest.mark.parametrize(
  "name", ["llama", *(pytest.param(n, marks=LONG) for n in ("bert", "roberta", "gpt2", "mistral"))]
)
def test_as_separate_runs_for_fewer_flops(name):
  """Float64, padding, heads of other sizes; (n + N (L - n)) / (N L) of the layers' FLOPs."""
  with jax.enable_x64(True):
    drop, count = 2, len(LABELS)
    tasks = trained(name, method_of(drop))
    model, _, _, sites = tasks["sst2"]
    shared = pelt.share_trunk({n: t[2] for n, t in tasks.items()}, sites)
    out, flops = compiled(model, shared)
    apart = {n: compiled(t[0], t[2]) for n, t in tasks.items()}
    for task, (want, _) in apart.items():
      assert out[task].shape == (4, LABELS[task])
      close(out[task], want, 1e-12)
    share = (drop + count * (LAYERS - drop)) / (count * LAYERS)
    # Adapters, heads, norms and embeddings are not shared, and are small.
    assert share - 0.02 < flops / sum(f for _, f in apart.values()) < share + 0.03


@LONG
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_kinds_of_tasks_and_of_adapters(name):
  """n = L: heads alone differ; three tasks; hidden states; robust adapters at a fixed n."""
  with jax.enable_x64(True):
    labels = {"a": 3, "b": 3, "c": 4}
    tasks = trained(name, method_of(LAYERS), labels)
    model, _, _, sites = tasks["a"]
    shared = pelt.share_trunk({n: t[2] for n, t in tasks.items()}, sites)
    assert sum(isinstance(v, nodes.Shared) for _, v in walk(shared)) == LAYERS
    out, _ = compiled(model, shared)
    for task, (one, _, params, _) in tasks.items():
      close(out[task], compiled(one, params)[0], 1e-12)

    robust = pelt.adapter_drop(2, robust=True, bottleneck=5, style="houlsby")
    tasks = trained(name, robust, {"a": 1, "b": 1}, task="encoder")
    model, _, _, sites = tasks["a"]
    members = {n: t[2] for n, t in tasks.items()}
    for drop in (1, 2):
      out, _ = compiled(model, pelt.share_trunk(members, sites, drop=drop))
      for task, params in members.items():
        assert out[task].shape == (4, 7, 32)
        close(out[task], compiled(model, pelt.drop_to(params, drop))[0], 1e-12)
    with pytest.raises(ValueError, match="the tasks have nodes in layer 0"):
      pelt.share_trunk(members, sites)


@LONG
def test_saved_recorded_and_differentiated(tmp_path):
  """A file over the widest task's base; gradients of one task's answers end above the trunk."""
  with jax.enable_x64(True):
    tasks = trained("bert", method_of(2))
    model, base, _, sites = tasks["trec"]
    shared = pelt.share_trunk({n: t[2] for n, t in tasks.items()}, sites)
    pelt.save(tmp_path, shared)
    loaded = pelt.load(tmp_path, base)
    assert jax.tree.structure(loaded) == jax.tree.structure(shared)
    out, _ = compiled(model, shared)
    for task, value in compiled(model, loaded)[0].items():
      np.testing.assert_array_equal(value, out[task])
    apply = pelt.bypass(model.apply)
    trainable, frozen = pelt.partition(shared)
    loss = lambda p: jnp.sum(apply({"params": p}, IDS, MASK)["sst2"] ** 2)
    _, grads = jax.jit(pelt.value_and_grad(loss))(trainable, frozen)
    up = next(v for p, v in walk(grads) if isinstance(v, nodes.AroundNorm)).branch.members.up
    assert float(jnp.abs(up[0]).max()) > 0 and float(jnp.abs(up[1]).max()) == 0
    with pytest.raises(ValueError, match="cannot be merged"):
      pelt.merge(shared)


def tiny(task="encoder", scan=False, name="bert"):
  model, base = built(name, task)
  if not scan:
    model, base = model.clone(scan=False), models.to_looped(base, model)
  return model, base, pelt.sites(model, IDS)


def test_bad_input_is_named():
  _, base, sites = tiny()
  init = lambda method, i=0: method.init(jax.random.key(i), base, sites)
  with pytest.raises(ValueError, match="tasks is empty"):
    pelt.share_trunk({}, sites)
  everywhere = {"a": init(pelt.adapter("pfeiffer", bottleneck=5))}
  with pytest.raises(ValueError, match="the tasks have nodes in layer 0"):
    pelt.share_trunk(everywhere, sites)
  with pytest.raises(TypeError, match="tasks must be params by name|Mapping"):
    pelt.share_trunk([everywhere["a"]], sites)
  for drop in (0, LAYERS + 1, True):
    with pytest.raises(ValueError, match=f"drop={drop!r}: expected 1 to 3"):
      pelt.share_trunk(everywhere, sites, drop=drop)
  lora = {"a": init(pelt.lora(rank=1))}
  with pytest.raises(ValueError, match="the tasks have nodes in layer 0"):
    pelt.share_trunk(lora, sites, drop=1)  # takes out adapters alone
  other = {f"n = {n}": init(pelt.adapter_drop(n, bottleneck=5)) for n in (1, 2)}
  with pytest.raises(ValueError, match="members 'n = 1' and 'n = 2' of the bank differ at"):
    pelt.share_trunk(other, sites)
  _, stack, stacked = tiny(scan=True)
  with pytest.raises(ValueError, match="a scan stacks them at 'encoder/layer'; unstack first"):
    pelt.share_trunk({"a": stack}, stacked)
  t5, _ = built("t5", "seq2seq")
  with pytest.raises(ValueError, match="share_trunk needs one stack of layers"):
    pelt.share_trunk({"a": base}, pelt.sites(t5, IDS, decoder_input_ids=IDS))


def test_generation_is_refused():
  model, base = built("gpt2", "lm")
  model, base = model.clone(scan=False), models.to_looped(base, model)
  sites = pelt.sites(model, IDS)
  params = pelt.adapter_drop(1, bottleneck=5).init(jax.random.key(0), base, sites)
  shared = pelt.share_trunk({"a": params}, sites)
  with pytest.raises(ValueError, match="answer whole forward passes, not generation"):
    training.generate(pelt.bypass(model.apply), shared, IDS, jnp.ones_like(IDS), max_new_tokens=1)


def test_what_runs_before_the_layers_may_not_differ():
  """Nor may rows be given, or a part of the model be run alone."""
  x, factors = jnp.ones((3, 2)), jnp.ones((1, 1))
  model = Stack(early=True)
  base = model.init(jax.random.key(0), x, factors)["params"]
  sites = pelt.sites(model, x, factors, roles=ROLES)
  made = lambda *targets: {
    name: pelt.lora(rank=1, targets=targets).init(jax.random.key(i), base, sites)
    for i, name in enumerate("ab")
  }
  apply = pelt.bypass(model.apply)
  shared = {"params": pelt.share_trunk(made("first/kernel", "layer_1/dense/kernel"), sites)}
  with pytest.raises(ValueError, match=r"of their own at \['first'\], which run before 'layer_0'"):
    apply(shared, x, factors)
  shared = {"params": pelt.share_trunk(made("layer_1/dense/kernel", "head/kernel"), sites)}
  assert apply(shared, x, factors)["b"].shape == (3, 1)
  with pytest.raises(ValueError, match="so leave rows out"):
    apply(shared, x, factors, rows=np.zeros(3, int))
  part = {k: v for k, v in shared["params"].items() if k != "bypass"}
  with pytest.raises(ValueError, match="'layer_0' is shared by tasks"):
    apply({"params": part}, x, factors)
  heads = {"a": (3, 4, 2), "b": (2, 1, 2)}
  heads = {
    name: update_at(base, {
      "head/kernel": nodes.Tuned(jnp.ones((2, one))),
      "layer_1/dense/kernel": nodes.Tuned(jnp.ones((2, two))),
    })
    for name, (one, two, _) in heads.items()
  }  # fmt: skip
  with pytest.raises(ValueError, match="differ in other ways than by a number of labels"):
    pelt.share_trunk(heads, sites)
