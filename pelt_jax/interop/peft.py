"""Hugging Face PEFT's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`.

Torch is not needed on either way.
"""

from pelt_jax.interop._peft_export import export as export
from pelt_jax.interop._peft_load import load as load
