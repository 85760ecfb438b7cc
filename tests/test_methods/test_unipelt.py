"""UniPELT and MAM: compositions against their parts, gates at their limits, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import models, nodes
from pelt_jax._walk import walk
from tests.test_methods.test_adapter import moved
from tests.test_models.helpers import built, close, tokens

LONG = pytest.mark.parity
SMALL = {"length": 3, "rank": 2, "bottleneck": 5, "reparametrize": False}
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)


def unified(name="bert", scan=True, scale=0.3, **options):
  model, base = built(name, "encoder", scan=scan)
  sites = pelt.sites(model, tokens(2, 6), MASK)
  method = pelt.unipelt(**(SMALL | options))
  params = moved(method.init(jax.random.key(1), base, sites), scale)
  return model, base, params, pelt.bypass(model.apply)


def with_gates(params, bias):
  """Gates whose linear map is zero: each is sigmoid(bias)."""

  def fixed(x):
    if not isinstance(x, nodes.MeanGate):
      return x
    return x.replace(kernel=jnp.zeros_like(x.kernel), bias=jnp.full_like(x.bias, bias))

  return jax.tree.map(fixed, params, is_leaf=lambda x: isinstance(x, nodes.MeanGate))


def test_gates_without_weights_are_a_half():
  _, _, params, apply = unified()
  _, seen = apply({"params": with_gates(params, 0.0)}, tokens(2, 6), MASK, record="gates")
  gates = [v["gates"] for v in seen.values()]
  assert len(gates) == 4 and {g.shape for g in gates} == {(3, 2)}  # layers, rows
  for gate in gates:
    np.testing.assert_array_equal(gate, 0.5)


def test_starts():
  """Kernels N(0, 0.02²), each gate and layer its own, biases zero; ours read the mask."""
  model, base = built("bert", "encoder")
  sites = pelt.sites(model, tokens(2, 6), MASK)
  gates = gates_of(pelt.unipelt(**SMALL).init(jax.random.key(1), base, sites))
  assert len(gates) == 4 and {(g.mask, g.pool) for g in gates} == {("attention_mask", "mean")}
  drawn = [kernel for g in gates for kernel in g.kernel]
  assert len(drawn) == 4 * 3 and {k.shape for k in drawn} == {(32, 1)}
  np.testing.assert_allclose(np.std(drawn), 0.02, rtol=0.15)
  apart = [np.abs(a - b).max() for i, a in enumerate(drawn) for b in drawn[:i]]
  assert min(apart) > 1e-2
  assert not any(np.asarray(g.bias).any() for g in gates)


def gates_of(params):
  is_gate = lambda x: isinstance(x, nodes.MeanGate)
  found = (leaf for _, v in walk(params) for leaf in jax.tree.leaves(v, is_leaf=is_gate))
  return [leaf for leaf in found if is_gate(leaf)]


def test_open_gates_are_the_sum_of_the_parts():
  """G = 1: a LoRA with s = 1, a prefix, a Pfeiffer adapter, added one after another."""
  model, base, params, apply = unified()
  sites = pelt.sites(model, tokens(2, 6), MASK)
  parts = pelt.chain(
    pelt.lora(2, 2, targets=("query", "value")),
    pelt.prefix_tuning(3, reparametrize=False, shift_positions=False),
    pelt.adapter("pfeiffer", bottleneck=5),
  )
  plain = parts.init(jax.random.key(1), base, sites)

  def arrays(tree):
    """The parts' own arrays, whatever gates stand between."""
    found = {}
    for path, value in walk(tree):
      for node in jax.tree.leaves(value, is_leaf=_is_part):
        if _is_part(node):
          found[path] = node
    return found

  def _is_part(x):
    return isinstance(x, nodes.LoraWeight | nodes.Prefix | nodes.Bottleneck)

  mine, theirs = arrays(params), arrays(plain)
  assert set(mine) == set(theirs) and len(mine) == 4
  for path, node in theirs.items():
    names = [n for n in ("a", "b", "keys", "values", "down", "down_bias", "up", "up_bias")
             if hasattr(node, n)]  # fmt: skip
    changes = {n: getattr(mine[path], n) for n in names}
    replaced = lambda x, node=node, c=changes: x.replace(**c) if x is node else x
    plain = jax.tree.map(replaced, plain, is_leaf=_is_part)
  ids = tokens(2, 6)
  want = apply({"params": plain}, ids, MASK)
  close(apply({"params": with_gates(params, 40.0)}, ids, MASK), want, 5e-6, MASK)
  assert np.abs(np.asarray(apply({"params": params}, ids, MASK) - want)[0]).max() > 1e-3


@LONG
def test_closed_gates_of_lora_and_adapter_leave_the_prefix():
  model, base, params, apply = unified(parts=("lora", "adapter"))
  ids = tokens(2, 6)
  got = apply({"params": with_gates(params, -90.0)}, ids, MASK)
  close(got, model.apply({"params": base}, ids, MASK), 2e-6, MASK)
  # A prefix scaled to zero still takes its share of the softmax.
  _, _, params, apply = unified(parts=("prefix",))
  got = apply({"params": with_gates(params, -90.0)}, ids, MASK)
  assert np.abs(np.asarray(got - model.apply({"params": base}, ids, MASK))[0]).max() > 1e-3


@LONG
def test_padding_moves_the_gates_only_where_asked():
  for pool, same in (("mean", True), ("mean_all", False), ("token", True)):
    _, _, params, apply = unified(gate_pool=pool)
    apply = jax.jit(apply)
    ids = tokens(2, 6)
    padded = apply({"params": params}, ids, MASK)[1, :4]
    alone = apply({"params": params}, ids[1:, :4], MASK[1:, :4])[0]
    apart = float(jnp.abs(padded - alone).max())
    assert (apart < 5e-6) == same, (pool, apart)


@LONG
def test_rows_stand_alone():
  _, _, params, apply = unified()
  ids = tokens(2, 6)
  whole = apply({"params": params}, ids, MASK)
  close(apply({"params": params}, ids[::-1], MASK[::-1]), whole[::-1], 5e-6)


@LONG
def test_looped_equals_scanned_and_banked_rows_their_own_runs():
  model, _, params, apply = unified()
  ids = tokens(2, 6)
  want = jax.jit(apply)({"params": params}, ids, MASK)
  looped = model.clone(scan=False)
  got = pelt.bypass(looped.apply)({"params": models.to_looped(params, model)}, ids, MASK)
  close(got, want, 5e-6)
  other = unified(scale=0.2)[2]
  bank = pelt.bank([params, other])
  both = jax.jit(apply)({"params": bank}, ids, MASK, rows=np.array([1, 0]))
  close(both[0], apply({"params": other}, ids, MASK)[0], 5e-6)
  close(both[1], want[1], 5e-6)
  with pytest.raises(ValueError, match="holds a bank, whose members' values cannot be handed out"):
    apply({"params": bank}, ids, MASK, rows=np.array([1, 0]), record="gates")


@LONG
def test_the_gates_gradient_in_closed_form():
  """dL/dG = <g, x A B> for a LoRA's gate, through sigmoid and mean."""
  import flax.linen as nn

  with jax.enable_x64(True):

    class Net(nn.Module):
      @nn.compact
      def __call__(self, x, attention_mask):
        return nn.Dense(4, use_bias=False, param_dtype=jnp.float64, name="query")(x)

    model, x = Net(), jax.random.normal(jax.random.key(0), (2, 3, 5), jnp.float64)
    mask = jnp.array([[1, 1, 0], [1, 1, 1]])
    base = model.init(jax.random.key(1), x, mask)["params"]
    roles = {r: (pelt.Role("query"),) for r in ("query", "value")}
    sites = pelt.sites(model, x, mask, roles=roles)
    method = pelt.unipelt(rank=2, parts=("lora",), dtype="float64")
    params = moved(method.init(jax.random.key(2), base, sites))
    cotangent = jax.random.normal(jax.random.key(3), (2, 3, 4), jnp.float64)
    trainable, frozen = pelt.partition(params)
    loss = lambda p: jnp.sum(cotangent * pelt.bypass(model.apply)({"params": p}, x, mask))
    _, grads = pelt.value_and_grad(loss)(trainable, frozen)
    node = params["query"]["kernel"]
    gate, real = node.scaling, np.asarray(mask, np.float64)[..., None]
    sigma = 1 / (1 + np.exp(-(np.asarray(x) @ np.asarray(gate.kernel) + np.asarray(gate.bias))))
    per_row = (np.asarray(cotangent) * np.asarray(x @ node.a @ node.b)).sum((1, 2))[:, None, None]
    inner = per_row * sigma * (1 - sigma) * real / real.sum(1, keepdims=True)
    got = grads["query"]["kernel"].scaling
    close(got.bias, inner.sum((0, 1)), 1e-12)
    close(got.kernel, np.einsum("bti,btg->ig", np.asarray(x), inner), 1e-12)


def test_a_causal_model_refuses_the_mean_and_stays_causal_by_token():
  _, _, params, apply = unified("llama")
  ids = tokens(2, 6)
  with pytest.raises(ValueError, match="a causal model would see what comes later; use gate_pool"):
    apply({"params": params}, ids)
  _, _, params, apply = unified("llama", gate_pool="token")
  apply = jax.jit(apply)
  close(apply({"params": params}, ids)[:, :4], apply({"params": params}, ids[:, :4]), 5e-6)


def test_packed_rows_refuse_the_mean():
  """Several texts in a row would share one gate, and padding count."""
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])
  _, _, params, apply = unified()
  with pytest.raises(
    ValueError, match=r"several texts share in a packed one; use gate_pool='token"
  ):
    apply({"params": params}, tokens(2, 6), segment_ids=segments)
  _, _, params, apply = unified(gate_pool="token")
  out = apply({"params": params}, tokens(2, 6), segment_ids=segments)
  assert np.isfinite(np.asarray(out)).all()


@LONG
def test_gpt2s_joint_projection_has_a_gate_per_part():
  _, _, params, apply = unified("gpt2", gate_pool="token", fused=((0, 2), 3))
  assert sorted(g.kernel.shape[-1] for g in gates_of(params)) == [1, 2]
  out = apply({"params": params}, tokens(2, 6))
  assert np.isfinite(np.asarray(out)).all()


def test_counts_are_the_published_ones():
  """BERT-base: 1,373,760 stored, 36,912 of gates beside; AP 1,078,848 and 18,456."""
  config = {"model_type": "bert", "vocab_size": 7, "max_position_embeddings": 8}
  config |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
  model = models.from_config(config, task="encoder", scan=True)
  ids = jnp.zeros((1, 4), jnp.int32)
  base = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  sites = pelt.sites(model, ids)

  def counted(method):
    return pelt.count(jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites), base))

  assert counted(pelt.unipelt()).stored == 1_373_760 + 36_912
  assert counted(pelt.unipelt(parts=("prefix", "adapter"))).stored == 1_078_848 + 2 * 769 * 12
  # GLUE's MAM: l = r = 16, biases of the branch and the released code's MLP apart.
  glue = counted(pelt.mam(16, bottleneck=16, scaling=2.0))
  assert glue.stored == 12 * (2 * 16 * 768 + 2 * 16 * 768 + 16 + 768)


def test_the_tables_sizes_on_bart_large():
  """MAM's defaults are 6.7 %, of which biases and the prefixes' MLPs are no part."""
  d, layers = 1024, 12
  config = {"model_type": "bart", "vocab_size": 7, "max_position_embeddings": 8, "d_model": d}
  for part in ("encoder", "decoder"):
    config |= {f"{part}_layers": layers, f"{part}_attention_heads": 16, f"{part}_ffn_dim": 4 * d}
  model = models.from_config(config, task="seq2seq", scan=True)
  ids = jnp.zeros((1, 4), jnp.int32)
  init = lambda key: model.init(key, ids, decoder_input_ids=ids)
  base = jax.eval_shape(init, jax.random.key(0))["params"]
  sites = pelt.sites(model, ids, decoder_input_ids=ids)

  def counted(method):
    return pelt.count(jax.eval_shape(lambda p: method.init(jax.random.key(0), p, sites), base))

  biases = lambda r: 2 * layers * (r + d)
  attention, ffn = 3 * layers, 2 * layers
  assert counted(pelt.mam()).stored == 27_377_664 + biases(512)
  assert 2 * 30 * d * attention + 2 * 512 * d * ffn == 27_377_664
  mlp = d * 800 + 800 + 800 * (2 * layers * d) + 2 * layers * d + 30 * d  # one for each part
  assert counted(pelt.mam()).trainable == 3 * mlp + 2 * 512 * d * ffn + biases(512)
  assert counted(pelt.prefix_tuning(200)).stored == 14_745_600
  parallel = counted(pelt.adapter("parallel", bottleneck=1024)).stored
  assert parallel == 2 * 1024 * d * ffn + biases(1024)
  query_value = pelt.lora(8, targets=("query", "value"))
  assert counted(query_value).stored == 4 * 8 * d * attention
  assert counted(pelt.lora(102, targets=("ffn_in", "ffn_out"))).stored == 10 * 102 * d * ffn


@LONG
def test_mam_is_the_chain():
  model, base = built("bert", "encoder")
  sites, ids = pelt.sites(model, tokens(2, 6)), tokens(2, 6)
  method = pelt.mam(3, bottleneck=5, reparametrize=False)
  chained = pelt.chain(
    pelt.prefix_tuning(3, reparametrize=False),
    pelt.adapter("scaled_parallel", bottleneck=5, scaling=4.0),
  )
  params, want = (m.init(jax.random.key(1), base, sites) for m in (method, chained))
  assert jax.tree.structure(params) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  # The branch adds nothing yet: what is left is the prefix.
  prefix = pelt.prefix_tuning(3, reparametrize=False).init(jax.random.key(1), base, sites)
  apply = pelt.bypass(model.apply)
  close(apply({"params": params}, ids), apply({"params": prefix}, ids), 2e-6)


def test_gates_stand_where_other_nodes_are():
  """A guarded leaf's LoRA is gated too, and shifted positions are no part."""
  model, base = built("llama", "encoder")
  sites = pelt.sites(model, tokens(2, 6))
  beside = pelt.design("relu", "parallel", "query", "simple", size=2)
  method = pelt.chain(beside, pelt.unipelt(**SMALL, shift_positions=True, gate_pool="token"))
  params = jax.eval_shape(lambda p: method.init(jax.random.key(1), p, sites), base)
  attention = params["layers"]["self_attn"]
  query, value = (attention[n]["kernel"] for n in ("q_proj", "v_proj"))
  assert isinstance(query, nodes.Guard) and isinstance(query.base.scaling, nodes.MeanGate)
  assert isinstance(value.scaling, nodes.MeanGate)
  assert isinstance(params["positions"]["bypass"], nodes.Shift)


@pytest.mark.parametrize(("options", "match"), [
  ({"parts": ()}, "parts must be some of"),
  ({"parts": ("lora", "lora")}, "parts must be some of"),
  ({"gate_pool": "max"}, "gate_pool must be one of"),
  ({"rank": 0}, "rank"),
  ({"length": 0}, "length must be a whole number"),
])  # fmt: skip
def test_bad_options(options, match):
  with pytest.raises(ValueError, match=match):
    pelt.unipelt(**options)


def test_gated_weights_do_not_merge():
  _, _, params, _ = unified()
  with pytest.raises(ValueError, match="query/kernel: its gate depends on the input"):
    pelt.merge(params)
