"""Optimizers whose state lies elsewhere than params."""

from pelt_jax.optimizers._paged import paged as paged
