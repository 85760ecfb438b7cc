"""AdapterHub's folders: adapters, prefixes, LoRA, MAM, UniPELT, AdapterFusion, heads.

Torch is not needed on either way.
"""

from pelt_jax.interop._hub import export as export
from pelt_jax.interop._hub import labels as labels
from pelt_jax.interop._hub import load as load
