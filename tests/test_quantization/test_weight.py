"""Quantized weights: formulas by hand, layouts, gradients, what a backward pass keeps."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pelt_jax as pelt
from pelt_jax import _node
from pelt_jax.quantization import CODE_BOOKS, _blocks, _product, quantize
from pelt_jax.quantization._code_books import dynamic_map
from tests.test_models.helpers import close

LAYOUTS = ("rows", "words", "flat")
VALUES = np.array(CODE_BOOKS["nf4"].values, np.float32)
MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2


def drawn(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(kernel, block=64):
  """Codes and scales of a kernel (inputs, outputs), in NumPy."""
  flat = kernel.T.reshape(-1)
  blocks = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
  scales = np.abs(blocks).max(1)
  inverse = np.divide(1, scales, where=scales > 0, out=np.zeros_like(scales))
  codes = np.searchsorted(MIDDLES, blocks * inverse[:, None], side="left")
  return codes.reshape(-1)[: flat.size], scales


def dequantized(kernel, block=64):
  codes, scales = by_hand(kernel, block)
  values = VALUES[codes] * np.repeat(scales, block)[: codes.size]
  return values.reshape(kernel.shape[::-1]).T


def codes_of(node):
  """Codes in order of the rows."""
  codes, (rows, _) = np.asarray(node.codes), node.plan.matrix
  if node.layout == "words":
    eights = [(codes >> 4 * j & 15) for j in range(8)]
    return np.stack(eights, 1).reshape(-1, rows).T.reshape(-1)
  return np.stack([codes >> 4, codes & 15], -1).reshape(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "block"), [((128, 6), 64), ((64, 3), 32), ((5, 3), 64)])
def test_codes_scales_and_values_by_hand(layout, shape, block):
  kernel = drawn(*shape)
  node = quantize(kernel, layout=layout, block=block)
  assert node.layout == ("flat" if shape[0] % block else layout)
  codes, scales = by_hand(kernel, block)
  np.testing.assert_array_equal(codes_of(node)[: codes.size], codes)
  found = np.asarray(node.scales)
  np.testing.assert_array_equal(
    (found.T if layout == node.layout == "words" else found).ravel(), scales
  )
  np.testing.assert_array_equal(node.materialize(), dequantized(kernel, block))
  assert node.shape == shape and node.dtype == jnp.float32


def test_a_block_known_from_elsewhere():
  w = np.array([(i - 31) * 0.05 for i in range(64)], np.float32)
  node = quantize(w[:, None], layout="flat")
  packed = "00001111111122222333344455566677788999aaabbbccccddddeeeeeeefffff"
  assert bytes(np.asarray(node.codes)).hex() == packed
  assert float(node.scales[0]) == np.float32(1.6)


def test_a_middle_goes_down_zeros_stay_and_the_ends_are_exact():
  w = np.zeros((128, 1), np.float32)
  w[:15, 0], w[15], w[16] = MIDDLES, 1, -1
  out = np.asarray(quantize(w).materialize())
  np.testing.assert_array_equal(out[:15, 0], VALUES[:-1])
  assert out[15] == 1 and out[16] == -1 and not out[17:].any()
  assert (np.abs(out[:15] - w[:15]) <= np.diff(VALUES).max() / 2 + 1e-7).all()


def test_scaling_by_powers_of_two_and_other_blocks_change_no_code():
  kernel = drawn(128, 4)
  codes = codes_of(quantize(kernel))
  np.testing.assert_array_equal(codes_of(quantize(kernel * 2.0**-9)), codes)
  other = kernel.copy()
  other[64:] *= 7.3  # the second block of every row
  same = codes_of(quantize(other)).reshape(4, 2, 64)[:, 0]
  np.testing.assert_array_equal(same, codes.reshape(4, 2, 64)[:, 0])


def test_quantizing_again_changes_nothing():
  once = quantize(drawn(128, 6))
  again = quantize(once.materialize())
  np.testing.assert_array_equal(again.codes, once.codes)
  np.testing.assert_array_equal(again.scales, once.scales)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_double_quantization_by_hand(layout):
  kernel = drawn(64, 300)
  node = quantize(kernel, double_quant=True, layout=layout)
  codes, scales = by_hand(kernel)
  offset, table = np.float32(node.offset), dynamic_map()
  np.testing.assert_allclose(offset, scales.mean(), rtol=1e-6)
  rest = scales - offset
  nested = np.array([np.abs(rest[i : i + 256]).max() for i in (0, 256)])
  np.testing.assert_array_equal(node.nested, nested)
  shares = rest / np.repeat(nested, 256)[:300]
  eights = np.abs(shares[:, None] - table).argmin(1)
  found = np.asarray(node.scales)
  found = (found.T if layout == "words" else found).ravel()
  assert np.abs(found.astype(int) - eights).max() <= 1 and (found == eights).mean() > 0.99
  scales = table[found] * np.repeat(nested, 256)[:300] + offset
  values = (VALUES[codes].reshape(-1, 64) * scales[:, None]).reshape(300, 64).T
  np.testing.assert_array_equal(node.materialize(), values)
  stored = sum(x.nbytes for x in (node.codes, node.scales, node.nested, node.offset))
  assert stored == kernel.size // 2 + 300 + 4 * 2 + 4


def test_equal_scales_survive_double_quantization():
  kernel = np.tile(np.linspace(-1, 1, 64, dtype=np.float32)[:, None], (1, 8))
  node = quantize(kernel, double_quant=True)
  assert float(node.nested[0]) == 0
  np.testing.assert_array_equal(node.materialize(), quantize(kernel).materialize())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_coded_as_float32_and_rounded_once(dtype):
  kernel = jnp.asarray(drawn(128, 6), dtype)
  node, wide = quantize(kernel), quantize(kernel.astype("float32"))
  np.testing.assert_array_equal(node.codes, wide.codes)
  np.testing.assert_array_equal(node.scales, wide.scales)
  np.testing.assert_array_equal(node.materialize(), wide.materialize().astype(dtype))


def test_kernels_of_several_axes_lie_as_torch_has_them():
  kernel = drawn(64, 2, 3)  # inputs, heads, width
  node = quantize(kernel, outputs=(1, 2))
  want = dequantized(kernel.reshape(64, 6)).reshape(64, 2, 3)
  np.testing.assert_array_equal(node.materialize(), want)
  experts = drawn(2, 64, 3)
  node = quantize(experts, outputs=(0, 2))
  want = np.stack([dequantized(e) for e in experts])
  np.testing.assert_array_equal(node.materialize(), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacked_layers_are_quantized_one_by_one(layout):
  kernel = drawn(3, 64, 5)
  node = quantize(kernel, stacked=1, layout=layout, double_quant=True)
  assert node.shape == kernel.shape and node.offset.shape == node.source.shape == (3,)
  for i, layer in enumerate(kernel):
    one = quantize(layer, layout=layout, double_quant=True)
    np.testing.assert_array_equal(node.codes[i], one.codes)
    np.testing.assert_array_equal(node.materialize()[i], one.materialize())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("double", [False, True])
def test_products_and_their_gradient(layout, double):
  kernel = drawn(128, 6)
  x, g = jnp.asarray(drawn(2, 3, 128)), jnp.asarray(drawn(2, 3, 6, seed=1))
  node = quantize(kernel, layout=layout, double_quant=double)
  plain = np.asarray(node.materialize(), np.float64)
  y, back = jax.vjp(lambda x: node.einsum("...i,io->...o", x), x)
  close(y, np.asarray(x) @ plain, 1e-6)
  close(back(g)[0], np.asarray(g) @ plain.T, 1e-6)
  tied = quantize(kernel, layout=layout, outputs=(0,))  # a table, read as a head
  close(tied.einsum("...d,vd->...v", g), g @ np.asarray(tied.materialize()).T, 1e-6)


def largest(program):
  """Numbers in the largest array of floats in a compiled program."""
  found = re.findall(r"f32\[([\d,]+)\]", program.as_text())
  return max(math.prod(map(int, sizes.split(","))) for sizes in found)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
  ("shape", "outputs", "eq", "x"),
  [
    ((256, 96), None, "...i,io->...o", (2, 16, 256)),
    ((4, 64, 96), None, "...hd,hdo->...o", (3, 4, 64)),
    ((256, 6, 16), (1, 2), "bi,ihd->bhd", (1, 256)),
    ((96, 256), (0,), "...d,vd->...v", (5, 256)),
  ],
)
def test_few_tokens_are_multiplied_tile_by_tile(monkeypatch, shape, outputs, eq, x, double):
  """On CPU, in a loop that holds a part of the kernel alone; gradients as ever."""
  monkeypatch.setattr(_product, "_TILE", 2**14)
  options = {"layout": "words", "outputs": outputs, "double_quant": double}
  node, x = quantize(drawn(*shape) / 16, **options), jnp.asarray(drawn(*x, seed=1))
  tiled = jax.jit(lambda x, node: jnp.sin(node.einsum(eq, x))).lower(x, node).compile()
  plain = jax.jit(lambda x, node: jnp.sin(_node.contract(eq, x, node.materialize())))
  assert largest(tiled) <= math.prod(shape) // 2
  assert largest(plain.lower(x, node).compile()) == math.prod(shape)
  close(tiled(x, node), plain(x, node), 1e-5)
  of = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))(x)
  whole = lambda x: _node.contract(eq, x, node.materialize())
  close(of(lambda x: node.einsum(eq, x)), of(whole), 1e-5)


@pytest.mark.parametrize(
  ("layout", "tokens", "dtype", "cut"),
  [
    ("words", 4, jnp.float32, True),
    ("words", 33, jnp.float32, False),
    ("words", 4, jnp.bfloat16, False),
    ("rows", 4, jnp.float32, False),
  ],
)
def test_which_products_are_cut(monkeypatch, layout, tokens, dtype, cut):
  monkeypatch.setattr(_product, "_TILE", 2**14)
  node, x = quantize(drawn(128, 128), layout=layout), jnp.ones((tokens, 128), dtype)
  found = str(jax.make_jaxpr(lambda x, node: node.einsum("...i,io->...o", x))(x, node))
  assert ("scan[" in found) == cut


def test_the_backward_pass_keeps_codes_alone():
  node, x = quantize(drawn(128, 64), double_quant=True), jnp.asarray(drawn(4, 128))
  _, back = jax.vjp(lambda x: node.einsum("...i,io->...o", x), x)
  kept = [r for r in jax.tree.leaves(back) if hasattr(r, "shape")]
  assert max(r.size * r.dtype.itemsize for r in kept) == 128 * 64 // 2
  program = str(jax.make_jaxpr(jax.grad(lambda x: node.einsum("...i,io->...o", x).sum()))(x))
  assert "optimization_barrier" in program


def test_products_in_bfloat16():
  node = quantize(drawn(128, 6))
  x = jnp.asarray(drawn(4, 128), jnp.bfloat16)
  y = node.einsum("...i,io->...o", x)
  assert y.dtype == jnp.bfloat16
  want = jnp.dot(x, node.materialize().astype(jnp.bfloat16))
  np.testing.assert_array_equal(y, want)


BAD = [
  ({"book": "nf5"}, "book='nf5': known are nf4"),
  ({"book": (1.0,)}, "2 to 16 finite numbers"),
  ({"block": 48}, "power of two from 32 to 4096, got 48"),
  ({"layout": "planes"}, "layout must be one of .* got 'planes'"),
  ({"outputs": (2,)}, r"outputs must name some of the kernel's axes \[0, 1\]"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_bad_options(options, match):
  with pytest.raises(ValueError, match=match):
    quantize(drawn(64, 2), **options)


def test_what_has_no_code():
  for value in (np.inf, -np.inf, np.nan):
    kernel = drawn(64, 2)
    kernel[3, 1] = value
    with pytest.raises(ValueError, match="infinities or NaNs"):
      quantize(kernel)
    out = jax.jit(lambda k: quantize(k).materialize())(kernel)  # unknown there, and loud
    assert not np.isfinite(out[:, 1]).all()
  with pytest.raises(TypeError, match="array of floats"):
    quantize(np.arange(64))
  with pytest.raises(TypeError, match="array of floats"):
    quantize([1.0, 2.0])


def test_denormal_blocks_are_zero():
  kernel = drawn(64, 2)
  kernel[:, 1] *= 1e-39
  assert not np.asarray(quantize(kernel).materialize())[:, 1].any()
  assert pelt.quantization.quantize is quantize


def test_selecting_is_looking_up_and_leaves_no_arrays_outside_a_scan():
  """What TPUs run in place of a gather: the same bits, and nothing kept beside a loop."""
  codes = jnp.asarray(np.random.default_rng(0).integers(16, size=(3, 8, 5)), jnp.uint8)
  for table in (np.linspace(-1, 1, 16, dtype=np.float32), np.arange(15, -1, -1, dtype=np.uint8)):
    found = _blocks.selected(table, codes)
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(np.signbit(found), np.signbit(table[codes]))
    np.testing.assert_array_equal(found, table[codes])
  assert _blocks.selected(table, codes[:0]).shape == (0, 8, 5)
  table = np.array([-0.0, 1.5], np.float32)
  assert np.signbit(_blocks.selected(table, jnp.zeros(2, jnp.uint8))).all()

  def layer(x, codes):
    return jnp.sin(x * _blocks.selected(table, codes)), None

  gradient = jax.grad(lambda x, codes: jax.lax.scan(layer, x, codes)[0].sum())
  program = jax.make_jaxpr(gradient)(jnp.ones((8, 5)), codes)
  loops = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
  taken = [v for eqn in loops for v in eqn.invars[: eqn.params["num_consts"]]]
  assert loops and not [v for v in taken if v.aval.shape == codes.shape[1:]], program
