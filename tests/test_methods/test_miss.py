"""MiSS: closed forms, then its identities."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import nodes
from tests.test_methods import matrices
from tests.test_methods.matrices import close, dense, moved

PLAIN = pelt.miss(3, targets="kernel")
PADDED = pelt.miss(4, targets="kernel")  # 6 inputs are a block of 4 and half a one
MINI = pelt.miss(4, kind="mini", mini_rank=2, targets="kernel")
BAT = pelt.miss(2, kind="bat", targets="kernel")
KINDS = {"plain": PLAIN, "padded": PADDED, "mini": MINI, "bat": BAT}
ALL = pytest.mark.parametrize("method", KINDS.values(), ids=KINDS)


def filled(method, block, kernel, x):
  model = nn.Dense(kernel.shape[1], use_bias=False)
  params = method.init(jax.random.key(0), {"kernel": kernel}, pelt.sites(model, x))
  field = "blocks" if block.ndim == 3 else "block"
  params["kernel"] = params["kernel"].replace(**{field: block})
  return pelt.bypass(model.apply)({"params": params}, x), pelt.merge(params)["kernel"]


def test_closed_forms():
  """Exact in binary: sums over blocks, a last block that is filled up, and repeated columns."""
  x, w = jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.zeros((4, 2))
  block = jnp.array([[1.0, 2.0], [0.0, 1.0]])
  y, merged = filled(pelt.miss(2, targets="kernel"), block, w, x)  # sums (4, 6)
  np.testing.assert_array_equal(y, [[4.0, 14.0]])
  np.testing.assert_array_equal(merged, [[1.0, 2.0], [0.0, 1.0], [1.0, 2.0], [0.0, 1.0]])
  three = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])  # sums (1 + 4, 2, 3)
  y, _ = filled(pelt.miss(3, targets="kernel"), three, w, x)
  np.testing.assert_array_equal(y, [[11.0, 2.0]])
  mini = pelt.miss(2, kind="mini", mini_rank=1, targets="kernel")
  y, merged = filled(mini, jnp.array([[1.0], [0.5]]), w, x)
  np.testing.assert_array_equal(y, [[7.0, 7.0]])
  np.testing.assert_array_equal(merged[:, 0], [1.0, 0.5, 1.0, 0.5])


def test_closed_form_of_bat():
  """W_pq M_p + M_p in torch's (out, in): one block of outputs, two of inputs."""
  w = jnp.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0], [1.0, 0.0]])  # (in, out)
  m = jnp.array([[[1.0, 2.0], [0.0, 1.0]]])
  x = jnp.eye(4)
  y, merged = filled(pelt.miss(2, kind="bat", targets="kernel"), m, w, x)
  blocks = [w[:2].T, w[2:].T]
  want = np.concatenate([(b + b @ m[0] + m[0]).T for b in blocks])
  np.testing.assert_array_equal(merged, want)
  np.testing.assert_array_equal(y, want)


@ALL
def test_starts_as_the_base(method):
  matrices.starts_as_the_base(method, {"blocks" if method is BAT else "block"})


def test_formulas_counts_and_ranks():
  picks = lambda r: jnp.eye(r)[np.arange(6) % r]  # the a of the LoRA that it is
  lora = lambda r: lambda w, b, f: (w + picks(r) @ f["block"], b)
  assert matrices.computes(PLAIN, lora(3), 30, 3) == 3
  assert matrices.computes(PADDED, lora(4), 40, 4) == 4
  mini = lambda w, b, f: (w + picks(4) @ jnp.tile(f["block"], 5), b)
  assert matrices.computes(MINI, mini, 8, 2) == 2

  def bat(w, b, f):
    torch, blocks = np.asarray(w.T).copy(), np.asarray(f["blocks"])
    for p in range(5):
      for q in range(3):
        one = torch[2 * p : 2 * p + 2, 2 * q : 2 * q + 2]
        one += one @ blocks[p] + blocks[p]
    return torch.T, b

  assert matrices.computes(BAT, bat, 20, 6) == 6


@ALL
def test_axes_rows_files(method, tmp_path):
  matrices.reads_axes(method)
  matrices.serves_rows(method)
  matrices.goes_through_files(method, tmp_path)


@pytest.mark.parity
@ALL
def test_codes_and_bfloat16(method):
  matrices.runs_over_codes(method)
  matrices.is_bfloat16(method)


@pytest.mark.parity
def test_scanned_layers():
  matrices.stacks(pelt.miss(4, targets=("attn/query", "attn/out")))
  matrices.stacks(pelt.miss(2, kind="bat", targets=("attn/value", "attn/out", "mlp/up")))


def test_specs():
  assert matrices.specs_of(PLAIN) == {"block": (None, "model")}
  assert matrices.specs_of(MINI) == {"block": ()}
  assert matrices.specs_of(BAT) == {"blocks": ("model", None, None)}


@pytest.mark.parametrize(("method", "rank"), [(PLAIN, 3), (PADDED, 4)])
def test_it_is_the_lora_whose_a_picks(method, rank):
  with jax.enable_x64(True):
    model, x, base, params = dense(method)
    params = moved(params)
    picks = jnp.eye(rank)[np.arange(6) % rank]
    node = nodes.LoraWeight(base["kernel"], picks, params["kernel"].block, jnp.ones(()))
    apply = pelt.bypass(model.apply)
    close(apply({"params": {**params, "kernel": node}}, x), apply({"params": params}, x))


def test_wide_mini_is_standard():
  with jax.enable_x64(True):
    model, x, _, params = dense(PLAIN)
    wide = dense(pelt.miss(3, kind="mini", mini_rank=10, targets="kernel"))[3]
    params = moved(params)
    wide["kernel"] = wide["kernel"].replace(block=params["kernel"].block)
    apply = pelt.bypass(model.apply)
    close(apply({"params": wide}, x), apply({"params": params}, x))


def test_bad_input():
  for options, match in (
    (dict(rank=0), "rank must be"),
    (dict(kind="maxi"), "kind must be one of"),
    (dict(mini_rank=0), "mini_rank must be"),
    (dict(kind="bat", dropout=0.1), "drops nothing"),
  ):
    with pytest.raises(ValueError, match=match):
      pelt.miss(**options)
  for options, match in (
    (dict(rank=7), "rank 7 exceeds the inputs"),
    (dict(rank=2, kind="mini", mini_rank=3), "mini_rank=3 does not divide"),
    (dict(rank=4, kind="bat"), "does not divide both sides"),
  ):
    with pytest.raises(ValueError, match=match):
      dense(pelt.miss(targets="kernel", **options))
  init = matrices.refuses_bad_targets(lambda t: pelt.miss(2, targets=t))
  with pytest.raises(ValueError, match="table whose rows are looked up"):
    init("emb")


def test_members_of_a_bank_have_one_rank():
  """Zeros behind a block would change which input meets which row."""
  x = jnp.ones((2, 8))
  model = nn.Dense(6, use_bias=False)
  base = model.init(jax.random.key(0), x)["params"]
  sites = pelt.sites(model, x)
  made = [pelt.miss(r, targets="kernel").init(jax.random.key(r), base, sites) for r in (2, 4)]
  with pytest.raises(ValueError, match="a MissWeight of different sizes at 'kernel'"):
    pelt.bank(made)
