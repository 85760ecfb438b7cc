"""Bit for bit against bitsandbytes on CPU: codes, scales, values, products, double quantization."""

import jax.numpy as jnp
import numpy as np
import pytest

from pelt_jax.quantization import CODE_BOOKS, quantize
from pelt_jax.quantization._blocks import encode_scales
from pelt_jax.quantization._code_books import dynamic_map
from tests.support import require
from tests.test_quantization.test_weight import codes_of, drawn

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = require("torch")
functional = require("bitsandbytes").functional


@pytest.fixture(autouse=True)
def uncompiled():
  """Their dequantization would be compiled anew for every shape, which takes a minute each."""
  with torch.compiler.set_stance("force_eager"):
    yield


def adversarial():
  """Ties, zeros of both signs, blocks of zeros, of one number, of one magnitude."""
  kernel = drawn(256, 6)
  thresholds = np.array(CODE_BOOKS["nf4"].thresholds, np.float32)
  kernel[:64, 0] = 0
  kernel[64:128, 0] = np.resize([*thresholds, 1], 64)
  kernel[128:192, 0] = np.resize([*-thresholds, -1], 64) * 0.37
  kernel[:, 1] = -0.0
  kernel[5, 1] = -3
  kernel[:, 2] = np.resize([0.7, -0.7], 256)
  kernel[:, 3] *= 1e-30
  kernel[:, 4] *= 1e30
  return kernel


def theirs(kernel, book, block, dtype="float32"):
  # Flat: of a matrix with rows shorter than blocks of 512 or 1,024, version 0.50.2 dequantizes all
  # blocks but the first with a wrong scale on CPU.
  weight = torch.tensor(np.asarray(kernel, np.float32)).T.reshape(-1)
  return functional.quantize_4bit(
    weight.to(getattr(torch, dtype)), blocksize=block, quant_type=book, compress_statistics=False
  )


def check(kernel, book="nf4", block=64, dtype="float32"):
  packed, state = theirs(kernel, book, block, dtype)
  for layout in ("rows", "words", "flat"):
    node = quantize(jnp.asarray(kernel, dtype), book=book, block=block, layout=layout)
    want = packed.numpy().ravel()
    codes = codes_of(node)
    np.testing.assert_array_equal(codes[0::2] << 4 | codes[1::2], want)
    scales = np.asarray(node.scales)
    scales = scales.T if node.layout == "words" else scales
    np.testing.assert_array_equal(scales.ravel(), state.absmax.numpy())
    values = functional.dequantize_4bit(packed, state).float().numpy()
    values = values.reshape(kernel.shape[::-1]).T
    np.testing.assert_array_equal(np.asarray(node.materialize(), np.float32), values)


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_random_numbers(book, block):
  check(drawn(256, 48, seed=block), book, block)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(256, 6), (50, 7), (3, 5)])
def test_dtypes_and_partial_blocks(dtype, shape):
  check(drawn(*shape), dtype=dtype)


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_adversarial_numbers(book):
  check(adversarial(), book)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_real_weights(minilm, dtype):
  from pelt_jax import models

  _, params = models.from_pretrained(minilm, task="encoder")
  layer = params["encoder"]["layer"]["3"]
  for kernel in (layer["attention"]["self"]["query"], layer["output"]["dense"]):
    check(np.asarray(kernel["kernel"]), dtype=dtype)


def test_real_weights_of_a_decoder(smollm2):
  from pelt_jax import models

  _, params = models.from_pretrained(smollm2, dtype="bfloat16")
  kernel = params["model"]["layers"]["7"]["mlp"]["down_proj"]["kernel"]
  check(np.asarray(kernel.astype("float32")), dtype="bfloat16")


def test_scales_are_quantized_as_in_float64():
  """Their own lookup on CPU has 65,536 entries and errs; that of float64 is exact."""
  scales = np.abs(drawn(1000, 64)).max(1)
  offset = np.float32(scales.mean())
  codes, nested = encode_scales(jnp.asarray(scales), jnp.asarray(offset))
  rest, table = torch.tensor(scales - offset), torch.tensor(dynamic_map())
  exact, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(rest.double(), table, 256)
  np.testing.assert_array_equal(nested, absmax.float().numpy())
  np.testing.assert_array_equal(codes, exact.numpy().ravel())
  default, _ = functional.quantize_blockwise(rest, code=table, blocksize=256)
  steps = np.abs(default.numpy().ravel().astype(int) - np.asarray(codes, int))
  assert steps.max() <= 4 and (steps > 0).mean() < 0.01


def test_double_quantization():
  kernel = drawn(256, 96)
  packed, state = functional.quantize_4bit(
    torch.tensor(kernel).T.contiguous(), quant_type="nf4", compress_statistics=True
  )
  node = quantize(kernel, double_quant=True, layout="flat")
  np.testing.assert_array_equal(node.codes, packed.numpy().ravel())
  np.testing.assert_allclose(node.offset, state.offset.item(), rtol=1e-6)
  values = functional.dequantize_4bit(packed, state).numpy().T
  got = np.asarray(node.materialize())
  assert np.abs(got - values).max() < 0.02 * np.abs(values).max()
  assert (np.abs(got - values) > 1e-5).mean() < 0.02


def test_their_layers_product_and_gradient():
  bitsandbytes = require("bitsandbytes")
  kernel, x, g = drawn(128, 24), drawn(5, 128), drawn(5, 24, seed=1)
  layer = bitsandbytes.nn.Linear4bit(
    128, 24, bias=False, quant_type="nf4", compress_statistics=False
  )
  layer.weight = bitsandbytes.nn.Params4bit(
    torch.tensor(kernel).T.contiguous(),
    requires_grad=False,
    quant_type="nf4",
    compress_statistics=False,
  )
  layer = layer.to("cpu")
  given = torch.tensor(x, requires_grad=True)
  out = layer(given)
  out.backward(torch.tensor(g))
  node = quantize(kernel)
  import jax

  y, back = jax.vjp(lambda x: node.einsum("...i,io->...o", x), jnp.asarray(x))
  np.testing.assert_allclose(y, out.detach().numpy(), rtol=0, atol=1e-5)
  np.testing.assert_allclose(back(jnp.asarray(g))[0], given.grad.numpy(), rtol=0, atol=1e-5)
