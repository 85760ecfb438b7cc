"""Hugging Face PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, prompts, prefixes, IA3, VeRA, LoHa, LoKr, MiSS and HiRA. Torch is not needed on either way.
Such files do not say which numbers the base had: load them over the one that they were trained on.
"""

from pelt_jax.interop._peft import export as export
from pelt_jax.interop._peft import load as load
