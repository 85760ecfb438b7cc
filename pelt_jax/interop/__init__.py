"""Adapter files of other projects, in and out."""

from pelt_jax.interop import adapterhub as adapterhub
from pelt_jax.interop import peft as peft
