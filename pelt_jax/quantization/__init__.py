"""4-bit weights: code books, packing, and the node that multiplies by them."""

from pelt_jax.quantization._code_books import CODE_BOOKS as CODE_BOOKS
from pelt_jax.quantization._code_books import CodeBook as CodeBook
from pelt_jax.quantization._code_books import bits as bits
from pelt_jax.quantization._code_books import code_book as code_book
from pelt_jax.quantization._merge import Loss as Loss
from pelt_jax.quantization._merge import MergeAware as MergeAware
from pelt_jax.quantization._merge import requantize as requantize
from pelt_jax.quantization._weight import NF4Weight as NF4Weight
from pelt_jax.quantization._weight import quantize as quantize
