"""Nodes of the vocabulary against forwards written by hand, in float64 and all four modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from pelt_jax._node import Chain
from tests.test_core import tiny
from tests.test_core.tiny import BATCH, HEADS, LAYERS, WIDTH, values

P = 2  # length of prefixes
SCALES = (1.5, -0.5, 2.0)  # one number per layer, so that layers cannot be mixed up


@pytest.fixture(autouse=True)
def float64():
  # Flax's LayerNorm promotes float64 with float32, which strict promotion forbids.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield


# A scan of remat nests the most traces of all modes; the others wait for the long suite.
@pytest.fixture(
  params=[pytest.param(m, marks=[pytest.mark.parity] * (m != "scan_remat")) for m in tiny.MODES]
)
def mode(request):
  return request.param


def compiled(f):
  """Compiled quickly rather than well: the programs are tiny and run once."""
  return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def check(model_mode, post, params, reference, rows=None):
  """Output to 1e-12 and gradients of every leaf, nodes included, to 1e-10 of the hand forward."""
  ids, mask = tiny.inputs()
  params = tiny.in_mode(params, model_mode)
  model = tiny.Model(post=post, mode=model_mode, dtype=jnp.float64)
  apply = pelt.bypass(model.apply)
  weights = values((BATCH, tiny.TIME, 3), 99)
  ours = lambda p: apply({"params": p}, ids, mask, **({} if rows is None else {"rows": rows}))

  def gradients(f):
    return jax.grad(lambda p: [jnp.sum((out := f(p)) * weights), out], has_aux=True)

  got, out = compiled(gradients(ours))(params)
  # Operation by operation: nearly all tests share these.
  wanted, want = gradients(lambda p: reference(p, ids, mask))(params)
  np.testing.assert_allclose(out, want, rtol=0, atol=1e-12)
  plain = model.apply({"params": _stripped(params)}, ids, mask)
  assert jnp.abs(want - plain).max() > 1e-2  # the nodes matter
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10, err_msg=jax.tree_util.keystr(path))


def _stripped(tree):
  """Params without nodes."""
  if isinstance(tree, dict):
    return {k: _stripped(v) for k, v in tree.items() if k not in ("bypass", "generators")}
  while isinstance(tree, pelt.nodes.LoraWeight | pelt.nodes.BankWeight):
    tree = tree.base
  return tree


def bottleneck(i, seed=0, lead=(), width=3):
  """A bottleneck whose numbers depend on the layer."""
  draw = lambda shape, n: values(lead + shape, 1000 * seed + 10 * i + n)
  return nodes.Bottleneck(
    draw((WIDTH, width), 0),
    draw((width,), 1),
    draw((width, WIDTH), 2),
    draw((WIDTH,), 3),
    jnp.full(lead, SCALES[i]),
    activation="tanh",
  )


def down_up(x, b):
  """The bottleneck's formula."""
  h = jnp.tanh(x @ b.down + b.down_bias[None, None]) @ b.up + b.up_bias[None, None]
  return h * b.scaling


def prefix(i, seed=0, lead=(), gate=None, **fields):
  shape = (*lead, P, HEADS, WIDTH // HEADS)
  return nodes.Prefix(values(shape, seed + i), values(shape, seed + 50 + i), gate, **fields)


def with_prefix(k2, v2):
  """The core with keys and values (B, P, H, D) in front."""

  def run(q, k, v, visible):
    seen = jnp.concatenate([jnp.ones(visible.shape[:1] + (P,), bool), visible], 1)
    return tiny.core(q, jnp.concatenate([k2, k], 1), jnp.concatenate([v2, v], 1), seen)

  return run


def rowwise(x):
  return jnp.broadcast_to(x[None], (BATCH, *x.shape))


@pytest.mark.parametrize("post", [True, pytest.param(False, marks=pytest.mark.parity)])
def test_adapter_around_the_norm(mode, post):
  params = tiny.at_layers(
    tiny.looped_params(), "ln_2/bypass", lambda i: nodes.AroundNorm(bottleneck(i))
  )

  def norm2(s, p):
    return tiny.norm(s + down_up(tiny.norm(s, p), p["bypass"].branch), p)

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, post, norm2=norm2)
    return tiny.forward(params, ids, mask, run)

  check(mode, post, params, reference)


@pytest.mark.parametrize(
  ("tap", "post"),
  [
    ("../ln_2:in", False),
    ("../attn:out", True),
    pytest.param("../ln_1:in", True, marks=pytest.mark.parity),
    pytest.param("../attn:out", False, marks=pytest.mark.parity),
    pytest.param("../in", False, marks=pytest.mark.parity),
    pytest.param("in", True, marks=pytest.mark.parity),
  ],
)
def test_parallel_adapter_reads_its_tap(mode, post, tap):
  params = tiny.at_layers(
    tiny.looped_params(), "mlp/bypass", lambda i: nodes.After(bottleneck(i), tap=tap)
  )

  def run(i, x, p, mask):
    p1, p2 = p["ln_1"], p["ln_2"]
    normed = x if post else tiny.norm(x, p1)
    a = tiny.attention(normed, p["attn"], mask)
    first = {"../in": x, "../attn:out": a, "../ln_1:in": x + a if post else x}
    h = tiny.norm(x + a, p1) if post else x + a
    first |= {"../ln_2:in": h, "../ln_1:out": h if post else normed}
    inner = h if post else tiny.norm(h, p2)
    first |= {"in": inner}
    y = tiny.mlp(inner, p["mlp"]) + down_up(first[tap], p["mlp"]["bypass"].branch)
    return tiny.norm(h + y, p2) if post else h + y

  check(mode, post, params, lambda params, i, m: tiny.forward(params, i, m, run))


def test_after_reads_its_output_and_before_its_input(mode):
  params = tiny.at_layers(tiny.looped_params(), "mlp/bypass", lambda i: nodes.After(bottleneck(i)))
  # the hidden axis is wider than what the branch gives, so `up` maps to it
  params = tiny.at_layers(
    params,
    "mlp/down/bypass",
    lambda i: nodes.Before(
      bottleneck(i, 1).replace(
        up=values((3, tiny.HIDDEN), 700 + i), up_bias=values((tiny.HIDDEN,), 800 + i)
      ),
      tap="../in",
    ),
  )

  def ffn(x, p, residual):
    h = jnp.tanh(tiny.affine(x, p["up"]))
    y = tiny.affine(h + down_up(x, p["down"]["bypass"].branch), p["down"])
    return y + down_up(y, p["bypass"].branch)

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, False, ffn=ffn)
    return tiny.forward(params, ids, mask, run)

  check(mode, False, params, reference)


@pytest.mark.parity
@pytest.mark.parametrize("post", [pytest.param(True, marks=pytest.mark.parity), False])
def test_gated_prefix(mode, post):
  gate = lambda i: nodes.MeanGate(values((WIDTH, 1), 70 + i), values((1,), 80 + i))
  params = tiny.at_layers(
    tiny.looped_params(), "attn/core/bypass", lambda i: prefix(i, gate=gate(i), tap="../in")
  )

  def attn(x, p, mask):
    node = p["core"]["bypass"]
    gates = jax.nn.sigmoid(x @ node.gate.kernel + node.gate.bias[None, None])[..., 0]
    weights = jnp.asarray(mask, jnp.float64)
    mean = ((gates * weights).sum(1) / weights.sum(1))[:, None, None, None]
    return tiny.attention(
      x, p, mask, core=with_prefix(node.keys[None] * mean, node.values[None] * mean)
    )

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, post, attn=attn)
    return tiny.forward(params, ids, mask, run)

  check(mode, post, params, reference)


def test_gated_branch_and_a_gate_that_is_a_number(mode):
  gate = lambda i: nodes.MeanGate(values((WIDTH, 1), 70 + i), values((1,), 80 + i), mask=None)
  params = tiny.at_layers(
    tiny.looped_params(), "mlp/bypass", lambda i: nodes.After(nodes.Gated(gate(i), bottleneck(i)))
  )
  params = tiny.at_layers(
    params, "attn/core/bypass", lambda i: prefix(i, gate=jnp.asarray(SCALES[i]))
  )

  def ffn(x, p, residual):
    y, node = tiny.mlp(x, p), p["bypass"].branch
    gates = jax.nn.sigmoid(y @ node.gate.kernel + node.gate.bias[None, None]).mean(1, keepdims=True)
    return y + gates * down_up(y, node.branch)

  def attn(x, p, mask):
    n = p["core"]["bypass"]
    front = with_prefix(rowwise(n.keys * n.gate), rowwise(n.values * n.gate))
    return tiny.attention(x, p, mask, core=front)

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, False, attn=attn, ffn=ffn)
    return tiny.forward(params, ids, mask, run)

  check(mode, False, params, reference)


ROWS = (2, 0, 1, 2)


@pytest.mark.parity
def test_banks_by_rows(mode):
  """Three members: a LoRA on the query, a parallel adapter and a prefix, one `rows` for all."""
  plain = tiny.looped_params()

  def member(n):
    params = tiny.at_layers(plain, "attn/core/bypass", lambda i: prefix(i, seed=200 * n))
    params = tiny.at_layers(
      params, "mlp/bypass", lambda i: nodes.After(bottleneck(i, 5 + n), tap="in")
    )
    return tiny.at_layers(params, "attn/query/kernel", lambda i: lora(plain, i, n, rank=1 + n))

  def lora(plain, i, n, rank):
    base = plain[f"h_{i}"]["attn"]["query"]["kernel"]
    a, b = values((WIDTH, rank), 31 * n + i), values((rank, HEADS, WIDTH // HEADS), 37 * n + i)
    return nodes.LoraWeight(base, a, b, jnp.asarray(SCALES[i] + n), axes="dhk:dr,rhk")

  members = [tiny.in_mode(member(n), mode) for n in range(3)]
  banked = pelt.bank(members)
  rows = jnp.array(ROWS)

  def heads(x, p):
    if not isinstance(p["kernel"], nodes.BankWeight):
      return tiny.project(x, p)
    m = jax.tree.map(lambda v: v[rows], p["kernel"].members)
    delta = jnp.einsum("btd,bdr,brhk,b->bthk", x, m.a, m.b, m.scaling)
    return tiny.project(x, {"kernel": p["kernel"].base, "bias": p["bias"]}) + delta

  def attn(x, p, mask):
    n = p["core"]["bypass"]
    return tiny.attention(x, p, mask, heads=heads, core=with_prefix(n.keys[rows], n.values[rows]))

  def ffn(x, p, residual):
    b = jax.tree.map(lambda v: v[rows], p["bypass"].branch.members)
    h = jnp.tanh(jnp.einsum("btd,bdm->btm", x, b.down) + b.down_bias[:, None])
    h = jnp.einsum("btm,bmd->btd", h, b.up) + b.up_bias[:, None]
    return tiny.mlp(x, p) + h * b.scaling[:, None, None]

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, False, attn=attn, ffn=ffn)
    return tiny.forward(params, ids, mask, run)

  ids, mask = tiny.inputs()
  model = tiny.Model(mode=mode, dtype=jnp.float64)
  want = reference(banked, ids, mask)
  apply = pelt.bypass(model.apply)
  fast = compiled(apply)
  got = fast({"params": banked}, ids, mask, rows=rows)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  # A mixed batch equals each member's own run.
  for b, n in enumerate(ROWS):
    alone = fast({"params": members[n]}, ids, mask)
    np.testing.assert_allclose(got[b], alone[b], rtol=0, atol=1e-12)
  weights = values(got.shape, 99)
  loss = lambda f: lambda p: jnp.sum(f(p) * weights)
  ours = compiled(jax.grad(loss(lambda p: apply({"params": p}, ids, mask, rows=rows))))(banked)
  theirs = jax.grad(loss(lambda p: reference(p, ids, mask)))(banked)
  worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
  assert max(jax.tree.leaves(worst)) < 1e-10, worst


def test_generator_fills_prefixes(mode):
  heads = (HEADS, WIDTH // HEADS)
  params = tiny.at_layers(
    tiny.looped_params(), "attn/core/bypass", lambda i: nodes.Prefix(None, None)
  )
  size = 2 * LAYERS * WIDTH
  sites = tuple(f"h_{i}/attn/core" for i in range(LAYERS))
  sites = sites if mode in ("loop", "remat") else ("h/attn/core",)
  mlp = nodes.PrefixMLP(
    values((P, 3), 1), values((3, 4), 2), values((4,), 3), values((4, size), 4), values((size,), 5),
    sites=sites, heads=heads,
  )  # fmt: skip
  params["generators"] = {"0": mlp}

  def table(g):
    return (jnp.tanh(g.embedding @ g.w1 + g.b1[None]) @ g.w2 + g.b2[None]).reshape(
      P, LAYERS, 2, *heads
    )

  def reference(params, ids, mask):
    made = table(params["generators"]["0"])

    def run(i, x, p, m):
      front = with_prefix(rowwise(made[:, i, 0]), rowwise(made[:, i, 1]))
      attn = lambda x, p, mask: tiny.attention(x, p, mask, core=front)
      return tiny.plain_layer(x, p, m, False, attn=attn)

    return tiny.forward(params, ids, mask, run)

  check(mode, False, params, reference)
  folded = pelt.fold(tiny.in_mode(params, mode))
  assert "generators" not in folded
  ids, mask = tiny.inputs()
  apply = pelt.bypass(tiny.Model(mode=mode, dtype=jnp.float64).apply)
  np.testing.assert_allclose(
    apply({"params": folded}, ids, mask), reference(params, ids, mask), rtol=0, atol=1e-12
  )


def test_two_generators_do_not_overwrite_each_other(mode):
  size = 2 * LAYERS * WIDTH

  def mlp(seed):
    draw = lambda shape, n: values(shape, seed + n)
    sites = tuple(f"h_{i}/attn/core" for i in range(LAYERS))
    return nodes.PrefixMLP(
      draw((P, 3), 1), draw((3, 4), 2), draw((4,), 3), draw((4, size), 4), draw((size,), 5),
      sites=sites if mode in ("loop", "remat") else ("h/attn/core",), heads=(HEADS, WIDTH // HEADS),
    )  # fmt: skip

  waiting = lambda i: Chain((nodes.Prefix(None, None), nodes.Prefix(None, None)))
  params = tiny.at_layers(tiny.looped_params(), "attn/core/bypass", waiting)
  names = [f"prefix_{n}" for n in range(12)]  # 10 sorts after 9, not after 1
  params["generators"] = {names[9]: mlp(0), names[10]: mlp(500)}
  filled = pelt.fold(tiny.in_mode(params, mode))
  one = lambda g: (jnp.tanh(g.embedding @ g.w1 + g.b1[None]) @ g.w2 + g.b2[None]).reshape(
    P, LAYERS, 2, HEADS, -1
  )
  for i in range(LAYERS):
    first, second = tiny.layer(filled, i)["attn"]["core"]["bypass"].nodes
    for node, name in ((first, names[9]), (second, names[10])):
      want = one(params["generators"][name])
      np.testing.assert_array_equal(node.keys, want[:, i, 0])
      np.testing.assert_array_equal(node.values, want[:, i, 1])


def test_chain_runs_the_last_outermost(mode):
  def make(i):
    return Chain((nodes.After(bottleneck(i, 1)), nodes.After(bottleneck(i, 2))))

  params = tiny.at_layers(tiny.looped_params(), "mlp/bypass", make)

  def ffn(x, p, residual):
    inner, outer = p["bypass"].nodes
    y = tiny.mlp(x, p)
    y = y + down_up(y, inner.branch)
    return y + down_up(y, outer.branch)

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, False, ffn=ffn)
    return tiny.forward(params, ids, mask, run)

  check(mode, False, params, reference)


def test_chain_of_two_norm_adapters_runs_the_norm_four_times(mode):
  def make(i):
    return Chain((nodes.AroundNorm(bottleneck(i, 1)), nodes.AroundNorm(bottleneck(i, 2))))

  params = tiny.at_layers(tiny.looped_params(), "ln_2/bypass", make)

  def norm2(s, p):
    inner, outer = p["bypass"].nodes
    once = lambda s: tiny.norm(s + down_up(tiny.norm(s, p), inner.branch), p)
    return once(s + down_up(once(s), outer.branch))

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, True, norm2=norm2)
    return tiny.forward(params, ids, mask, run)

  check(mode, True, params, reference)


def test_one_layer_without_a_node():
  """Looped layers need not hold the same nodes."""
  params = tiny.looped_params()
  params = tiny.update_at(params, {"h_1/ln_2/bypass": nodes.AroundNorm(bottleneck(1))})

  def norm2(s, p):
    if "bypass" not in p:
      return tiny.norm(s, p)
    return tiny.norm(s + down_up(tiny.norm(s, p), p["bypass"].branch), p)

  def reference(params, ids, mask):
    run = lambda i, x, p, m: tiny.plain_layer(x, p, m, True, norm2=norm2)
    return tiny.forward(params, ids, mask, run)

  check("loop", True, params, reference)
