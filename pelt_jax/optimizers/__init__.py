"""Optimizers: rates by group, and state that lies elsewhere than params."""

from pelt_jax.optimizers._lora_plus import lora_plus as lora_plus
from pelt_jax.optimizers._paged import paged as paged
