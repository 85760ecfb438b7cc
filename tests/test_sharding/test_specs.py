"""Where the arrays of every method's nodes lie on a mesh: closed forms, on shapes alone."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import pelt_jax as pelt
from pelt_jax import models, training
from pelt_jax._walk import named_nodes, walk

MESH = jax.sharding.AbstractMesh((2, 2, 4), ("data", "fsdp", "model"))
SIZES = dict(
  model_type="llama",
  vocab_size=48,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=8,
  num_key_value_heads=4,
)
ATTENTION = "model/layers/0/self_attn"
COLUMN, ROW = f"{ATTENTION}/q_proj/kernel", f"{ATTENTION}/o_proj/kernel"
TARGETS = ("query", "attention_out")
IDS = jnp.zeros((2, 4), jnp.int32)


@functools.cache
def built(scan=False):
  """A model's sites, and its params as shapes."""
  model = models.from_config(SIZES, scan=scan)
  base = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS)["params"])
  return pelt.sites(model, IDS), base


def added(method, base, sites):
  return jax.eval_shape(lambda base: method.init(jax.random.key(1), base, sites), base)


def found(params, sites, mesh=MESH):
  """The specs of params: by path of a node's array, None for what lies whole on every device."""
  at = pelt.shardings(params, training.base_specs(sites, mesh), mesh)
  assert jax.tree.structure(at) == jax.tree.structure(params)
  arrays = dict(walk(at))
  for path, node in named_nodes(at):
    arrays |= {f"{path}/{name}": value for name, value in node.children()}
  shardings = {p: v for p, v in arrays.items() if isinstance(v, jax.sharding.NamedSharding)}
  return {p: tuple(v.spec) if any(v.spec) else None for p, v in shardings.items()}


def below(specs, path):
  """What is split of one node, by field."""
  return {p.removeprefix(f"{path}/"): s for p, s in specs.items() if p.startswith(path) and s}


# method -> what is split of its nodes over a column-parallel and a row-parallel kernel
WHOLE = ({"base": ("fsdp", "model")}, {"base": ("model", "fsdp")})
PAIR = ({"b": (None, "model")}, {"a": ("model", None)})
WEIGHTS = {
  "lora": (pelt.lora(4, targets=TARGETS), PAIR, WHOLE),
  "lora_fa": (pelt.lora_fa(4, targets=TARGETS), PAIR, WHOLE),
  "adalora": (pelt.adalora(9, 4, 2, targets=TARGETS), PAIR, WHOLE),
  "hira": (pelt.hira(4, targets=TARGETS), PAIR, WHOLE),
  "vera": (pelt.vera(4, targets=TARGETS), ({"lambda_b": ("model",)}, {}), WHOLE),
  "lokr": (pelt.lokr(4, targets=TARGETS), ({}, {}), WHOLE),
  "miss": (pelt.miss(4, targets=TARGETS), ({"block": (None, "model")}, {}), WHOLE),
  "bat": (
    pelt.miss(4, kind="bat", targets=TARGETS),
    ({"blocks": ("model", None, None)}, {}),
    WHOLE,
  ),
  "ia3": (
    pelt.ia3("query", feedforward="attention_out"),
    ({"scale": ("model",)}, {"scale": ("model",)}),
    WHOLE,
  ),
  "loha": (
    pelt.loha(4, targets=TARGETS),
    (dict.fromkeys(("b1", "b2"), (None, "model")), dict.fromkeys(("a1", "a2"), ("model", None))),
    WHOLE,
  ),
  "dora": (
    pelt.dora(4, targets=TARGETS),
    ({"magnitude": ("model",), "base/b": (None, "model")}, {"base/a": ("model", None)}),
    ({"base/base": ("fsdp", "model")}, {"base/base": ("model", "fsdp")}),
  ),
  "pissa": (
    pelt.pissa(4, targets=TARGETS),
    ({**PAIR[0], "base/b": (None, "model")}, {**PAIR[1], "base/a": ("model", None)}),
    ({"base/residual": ("fsdp", "model")}, {"base/residual": ("model", "fsdp")}),
  ),
  "qlora": (  # two blocks of 32 along 64 inputs: scales do not divide over four devices
    pelt.qlora(4, block=32, double_quant=False, layout="rows", targets=TARGETS),
    PAIR,
    (
      {"base/codes": ("model", "fsdp"), "base/scales": ("model", "fsdp")},
      {"base/codes": ("fsdp", "model"), "base/scales": ("fsdp", None)},
    ),
  ),
  "train": (
    pelt.train((COLUMN, ROW)),
    ({}, {}),
    ({"value": ("fsdp", "model")}, {"value": ("model", "fsdp")}),
  ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_additions_follow_their_kernel_over_tensor_axes_alone(name):
  method, additions, kernels = WEIGHTS[name]
  sites, base = built()
  specs = found(added(method, base, sites), sites)
  for path, mine, kernel in zip((COLUMN, ROW), additions, kernels, strict=True):
    assert below(specs, path) == mine | kernel


def test_stacked_axes_come_first():
  sites, base = built(scan=True)
  specs = found(added(pelt.lora(4, targets=TARGETS), base, sites), sites)
  assert below(specs, "model/layers/self_attn/q_proj/kernel")["b"] == (None, None, "model")
  assert below(specs, "model/layers/self_attn/o_proj/kernel")["a"] == (None, "model", None)


@pytest.mark.parametrize(
  ("method", "column", "row"),
  [
    (pelt.lora(4, targets=TARGETS), {"b": (None, None, "model")}, {"a": (None, "model", None)}),
    (
      pelt.dora(4, targets=TARGETS),
      {"magnitude": (None, "model"), "base/b": (None, None, "model")},
      {"base/a": (None, "model", None)},
    ),
    (pelt.miss(4, targets=TARGETS), {"block": (None, None, "model")}, {}),
  ],
  ids=["lora", "dora", "miss"],
)
def test_the_axis_of_members_is_never_split(method, column, row):
  sites, base = built()
  members = [added(method, base, sites) for _ in range(4)]
  specs = found(jax.eval_shape(pelt.bank, members), sites)
  for path, mine, kernel in ((COLUMN, column, ("fsdp", "model")), (ROW, row, ("model", "fsdp"))):
    assert below(specs, path) == {"base": kernel} | {f"members/{n}": s for n, s in mine.items()}


@pytest.mark.parametrize(
  ("mesh", "scan", "split"),
  [
    (MESH, False, (None, "model", None)),
    (MESH, True, (None, None, "model", None)),
    (jax.sharding.AbstractMesh((8,), ("model",)), False, None),  # of four key-value heads
    (jax.sharding.AbstractMesh((8,), ("fsdp",)), False, None),
  ],
)
def test_prefixes_are_split_along_key_value_heads(mesh, scan, split):
  sites, base = built(scan)
  specs = found(added(pelt.p_tuning_v2(6), base, sites), sites, mesh)
  prefixes = {p: s for p, s in specs.items() if p.endswith(("/keys", "/values"))}
  assert len(prefixes) == (2 if scan else 4) and set(prefixes.values()) == {split}


def test_prefixes_of_a_bank_and_of_a_chain_too():
  sites, base = built()
  method = pelt.chain(pelt.p_tuning_v2(6), pelt.p_tuning_v2(2))
  two = [added(method, base, sites) for _ in range(2)]
  specs = found(jax.eval_shape(pelt.bank, two), sites)
  prefixes = {p: s for p, s in specs.items() if p.endswith(("/keys", "/values"))}
  assert len(prefixes) == 8 and set(prefixes.values()) == {(None, None, "model", None)}


ADAPTER = pelt.adapter("houlsby", bottleneck=8, train_norms=False)


def fusion(key, params, sites):
  tasks = {name: ADAPTER.init(key, params, sites) for name in ("one", "two")}
  return pelt.adapter_fusion(tasks).init(key, params, sites)


@pytest.mark.parametrize(
  "method",
  [
    ADAPTER,
    pelt.adapter("pfeiffer", bottleneck=8),
    pelt.adapter("parallel", bottleneck=8),
    pelt.prefix_tuning(6, hidden=16),
    pelt.Transform(fusion),
  ],
  ids=["houlsby", "pfeiffer", "parallel", "prefix with its MLP", "fusion"],
)
def test_what_acts_on_the_residual_stream_is_whole_everywhere(method):
  sites, base = built()
  params = added(method, base, sites)
  specs = found(params, sites)
  mine = {p: s for p, s in specs.items() if p.split("/")[0] == "generators" or "/bypass/" in p}
  assert mine and set(mine.values()) == {None}


def test_unipelt():
  sites, base = built()
  specs = found(added(pelt.unipelt(6, rank=4, bottleneck=8, gate_pool="token"), base, sites), sites)
  lora = below(specs, COLUMN)
  assert {p for p in lora if "base" not in p} == {"b"} and lora["b"] == (None, "model")
  gates = [s for p, s in specs.items() if "scaling/" in p or "gate/" in p]
  assert gates and set(gates) == {None}


def test_prompts_follow_the_features_of_their_table():
  sites, base = built()
  params = added(pelt.prompt_tuning(5), base, sites)
  table = "model/embed_tokens/embedding"
  assert below(found(params, sites), table) == {"base": ("model", "fsdp")}
  specs = training.base_specs(sites, MESH)
  specs["model"]["embed_tokens"]["embedding"] = P(None, "model")
  at = pelt.shardings(params, specs, MESH)["model"]["embed_tokens"]["embedding"]
  assert tuple(at.prompt.spec) == (None, "model")


def test_a_module_split_along_two_axes_tells_nothing_about_heads():
  sites, base = built()
  params = added(pelt.p_tuning_v2(4), base, sites)
  specs = training.base_specs(sites, MESH)
  specs["model"]["layers"]["0"]["self_attn"]["o_proj"]["kernel"] = P("data", "model")
  at = pelt.shardings(params, specs, MESH, fsdp=("fsdp",))
  first, second = (
    [v for p, v in walk(at) if p.startswith(f"model/layers/{i}/self_attn") and "bypass" in p]
    for i in (0, 1)
  )
  assert tuple(first[0].keys.spec) == (None, None, None)
  assert tuple(second[0].keys.spec) == (None, "model", None)


@pytest.mark.parametrize(
  ("spec", "kind"),
  [
    (P("embed", "mlp"), ValueError),  # logical names
    (P("fsdp", ("data", "mlp")), ValueError),
    (P(None, "model", None), ValueError),
    ("model", TypeError),
    (None, TypeError),
    (jax.sharding.NamedSharding(MESH, P("model")), TypeError),
  ],
)
@pytest.mark.parametrize("place", [pelt.shardings, pelt.gathered])
def test_what_a_leaf_cannot_lie_by_is_named(place, spec, kind):
  params = {"up": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
  if place is pelt.gathered:
    params["up"]["kernel"] = pelt.nodes.Tuned(params["up"]["kernel"])
  with pytest.raises(kind) as error:
    place(params, {"up": {"kernel": spec}}, MESH)
  for part in (repr(spec), "'up/kernel'", "(8, 4)", "('data', 'fsdp', 'model')"):
    assert part in str(error.value)
  for remedy in ("nn.logical_to_mesh(specs, rules)", "PartitionSpec()"):
    assert remedy in str(error.value)


def test_axes_that_do_not_divide_go_from_the_end_and_are_told(caplog):
  at = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  lora = pelt.nodes.LoraWeight(at(8, 6), at(8, 3), at(3, 6), None, axes="io:ir,ro")
  params = {"a": at(6, 4), "b": at(4, 4), "c": lora, "d": pelt.nodes.Tuned(at(9))}
  specs = {
    "a": P(("data", "fsdp", "model"), None),
    "b": P(("data", "fsdp"), "model"),
    "c": P("fsdp", "model"),
    "d": P("data"),
  }
  found = pelt.shardings(params, specs, MESH)
  assert tuple(found["a"].spec) == ("data", None)
  assert tuple(found["b"].spec) == (("data", "fsdp"), "model")
  assert tuple(found["c"].base.spec) == ("fsdp", None) and tuple(found["c"].b.spec) == (None, None)
  (told,) = (record.getMessage() for record in caplog.records)
  assert told.partition(": ")[2] == (
    "a: dimension 0 of 6 over fsdp=2, model=4; c: dimension 1 of 6 over model=4; "
    "d: dimension 0 of 9 over data=2"
  )


def test_of_many_leaves_five_are_told(caplog):
  leaf = jax.ShapeDtypeStruct((3,), jnp.float32)
  for count, end in ((0, None), (5, "4: dimension 0 of 3 over data=2"), (7, "; and 2 more")):
    caplog.clear()
    names = [str(i) for i in range(count)]
    specs = dict.fromkeys(names, P("data"))
    pelt.shardings(dict.fromkeys(names, leaf), specs, MESH)
    assert [r.getMessage().endswith(end) for r in caplog.records] == [True] * (count > 0)
    assert not count or caplog.text.count("dimension 0") == 5


def test_one_axis_may_be_a_string():
  sites, base = built()
  params = added(
    pelt.chain(pelt.nf4(targets=TARGETS, block=32), pelt.lora(4, targets=TARGETS)), base, sites
  )
  specs = training.base_specs(sites, MESH)
  for place in (pelt.shardings, pelt.gathered):
    one, several = (place(params, specs, MESH, fsdp=name) for name in ("fsdp", ("fsdp",)))
    assert jax.tree.leaves(one) == jax.tree.leaves(several)
  assert pelt.gathered(params, specs, MESH, fsdp="model") != pelt.gathered(params, specs, MESH)
