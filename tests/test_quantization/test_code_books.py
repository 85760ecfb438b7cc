"""Code books against what is known of them."""

import hashlib
import importlib
import statistics

import numpy as np
import pytest

from pelt_jax.quantization import CODE_BOOKS, bits, code_book
from pelt_jax.quantization._code_books import dynamic_map, dynamic_thresholds
from tests.support import REPOSITORY

NF4 = CODE_BOOKS["nf4"]


def test_nf4_is_the_table_to_the_bit():
  table = np.array(NF4.values, np.float32)
  digest = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
  assert hashlib.sha256(table.tobytes()).hexdigest() == digest
  assert (table < 0).sum() == 7 and (table > 0).sum() == 8 and table[7] == 0
  assert NF4.zero == 7 and NF4.order == tuple(range(16))


def test_nf4s_recipe():
  """Quantiles of N(0, 1), seven below zero and eight above, divided by the largest."""
  quantile = statistics.NormalDist().inv_cdf
  offset = 0.9677083
  above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  found = np.sort([*above, *below, 0.0]) / max(above)
  np.testing.assert_allclose(NF4.values, found, rtol=0, atol=2e-7)


def test_nf4s_thresholds_are_the_ones_of_the_kernels():
  known = [
    *(-0.84809637, -0.61063290, -0.45999527, -0.33967942, -0.23460740, -0.13791174, -0.045525018),
    *(0.03979015, 0.12025525, 0.20352125, 0.29201376, 0.38931254, 0.50166345, 0.64278692),
    0.86147845,
  ]
  np.testing.assert_array_equal(np.array(NF4.thresholds, np.float32), np.array(known, np.float32))


def test_the_dynamic_map_to_the_bit():
  table = dynamic_map()
  digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
  assert hashlib.sha256(table.tobytes()).hexdigest() == digest
  assert table[127] == 0 and table[-1] == 1 and table[0] > -0.993 and len(table) == 256
  assert (np.diff(dynamic_thresholds()) > 0).all()


def test_bits_a_parameter():
  assert bits(64, False) == 4.5
  assert bits(64, True) == 4.126953125
  assert bits(64, False) - bits(64, True) == 0.373046875


def test_a_code_book_of_ones_own_in_any_order():
  book = code_book([1.0, -1.0, 0.0])
  assert book.order == (1, 2, 0) and book.thresholds == (-0.5, 0.5) and book.zero == 2
  # The sign bit's second zero takes what is above zero, as in bitsandbytes on CPU.
  fp4 = CODE_BOOKS["fp4"]
  assert fp4.zero == 0 and 0.0 in fp4.thresholds


@pytest.mark.parametrize("values", [(), (1.0,), range(17), (0.0, np.inf), (0.0, np.nan)])
def test_what_is_no_code_book(values):
  with pytest.raises(ValueError, match="2 to 16 finite numbers"):
    code_book(values)


# Mean error and mean square of N(0, 1) in blocks of 64, measured on 67 million numbers.
ERRORS = {
  "nf4": (0.07280, 0.008461),
  "fp4": (0.09656, 0.014874),
  "fp4_e2m1": (0.08028, 0.011175),
  "fp4_e3m0": (0.13084, 0.035428),
  "int4": (0.09130, 0.011581),
  "int4_full": (0.08291, 0.009853),
  "int4_uniform": (0.08521, 0.010087),
  "equal_shares": (0.08476, 0.022233),
  "nf4, double quantization": (0.07290, 0.008474),
  "int4 min–max": (0.07570, 0.008030),
}


@pytest.mark.parity
def test_errors_on_normal_numbers(monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
  errors = importlib.import_module("quantization_error").errors
  # 4 million numbers: their own spread is 0.1 %.
  found = errors(np.random.default_rng(0).standard_normal(1 << 22, np.float32))
  assert found.keys() == ERRORS.keys()
  for name, by in found.items():
    np.testing.assert_allclose((by["l1"], by["mse"]), ERRORS[name], rtol=5e-3, err_msg=name)
