"""Makes `data_hub/`: folders as AdapterHub writes them, with what it computes, in float64.

    python -m tests.test_interop.make_hub_values

It needs `adapters` and torch. A family's base lies in `data_hub/FAMILY/base`, and every case of
`hub.STORED` in a folder beside it, with AdapterHub's own files and `logits.npy`; `gradients` holds
the same files with the gradients of `sum(logits * hub.cotangent)`. All that trains is drawn anew
from N(0, 0.3²), since what is zero at first would hide errors.
"""

import importlib
import os
import pathlib
import shutil
import warnings

import adapters
import numpy as np
import torch
import transformers

from tests.test_interop.hub import CONFIGS, DATA, IDS, LABELS, LENGTH, MASK, STORED, cotangent

MODELS = {
  "bert": "BertAdapterModel",
  "roberta": "RobertaAdapterModel",
  "gpt2": "GPT2AdapterModel",
  "llama": "LlamaAdapterModel",
  "t5": "T5ForConditionalGeneration",
}
NAMES = ("one", "two")  # of adapters that are fused
PREFIX = {"prefix_length": LENGTH, "bottleneck_size": 5}
CASES = {
  "pfeiffer": lambda: adapters.SeqBnConfig(reduction_factor=8),
  "houlsby": lambda: adapters.DoubleSeqBnConfig(reduction_factor=8),
  "parallel": lambda: adapters.ParBnConfig(reduction_factor=4),
  "learned": lambda: adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
  "channel": lambda: adapters.SeqBnConfig(
    reduction_factor=3, scaling="channel", non_linearity="gelu_new", leave_out=[1]
  ),
  "factors": lambda: adapters.SeqBnConfig(
    reduction_factor={"0": 8, "default": 5.5}, ln_before=True, non_linearity="tanh"
  ),
  "prefix": lambda: adapters.PrefixTuningConfig(**PREFIX),
  "flat": lambda: adapters.PrefixTuningConfig(**PREFIX, flat=True, leave_out=[0]),
  "lora": lambda: adapters.LoRAConfig(r=2, alpha=3, attn_matrices=["q", "k"], output_lora=True),
  "mam": lambda: adapters.MAMConfig(
    adapters.PrefixTuningConfig(**PREFIX), adapters.ParBnConfig(reduction_factor=4)
  ),
  "unipelt": lambda: adapters.UniPELTConfig(
    adapters.PrefixTuningConfig(**PREFIX),
    adapters.SeqBnConfig(reduction_factor=8),
    adapters.LoRAConfig(r=2),
  ),
}


def make_base(family: str, folder: pathlib.Path) -> None:
  """A random base as a Hugging Face folder, in float64."""
  raw = dict(CONFIGS[family])
  config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
  cls = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModel
  torch.manual_seed(0)
  model = cls.from_config(config).double()
  draw(model.named_parameters())
  model.save_pretrained(folder)
  (folder / "generation_config.json").unlink(missing_ok=True)


def draw(named) -> None:
  """Random parameters, norms near one."""
  with torch.no_grad():
    for name, p in named:
      p.normal_(0, 0.3 if p.ndim > 1 else 0.1)
      if ("norm" in name.lower() and name.endswith("weight")) or ".ln_" in name:
        p.add_(1)


def read_base(family: str, folder: pathlib.Path):
  """AdapterHub's model over a base."""
  source = adapters if hasattr(adapters, MODELS[family]) else transformers
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = getattr(source, MODELS[family]).from_pretrained(
      folder, attn_implementation="eager", dtype=torch.float64
    )
    if source is transformers:
      adapters.init(model)
  return model.double().eval()


def add(model, family: str, case: str) -> None:
  """Adds a case's adapters and a head, all random."""
  names = NAMES if case == "fusion" else (case,)
  config = CASES["pfeiffer" if case == "fusion" else case]
  for name in names:
    model.add_adapter(name, config=config())
  if case == "fusion":
    model.add_adapter_fusion(adapters.Fuse(*names))
    model.set_active_adapters(adapters.Fuse(*names))
  else:
    model.set_active_adapters(case)
  if family != "t5":
    config = {"head_type": "classification", "num_labels": len(LABELS)}
    config["id2label"] = dict(enumerate(LABELS))
    if family in ("gpt2", "llama"):
      config |= {"layers": 1, "activation_function": None, "bias": False}
    model.add_prediction_head_from_config(case, config)
  model.double().eval()
  torch.manual_seed(1)
  draw(added(model))


def added(model):
  """Names and parameters of what `add` put into a model."""
  keys = (
    ".adapters.",
    "adapter_fusion_layer.",
    "prefix_tunings.",
    "prefix_gates.",
    ".loras.",
    "heads.",
  )
  return [(n, p) for n, p in model.named_parameters() if any(k in n for k in keys)]


def save(model, case: str, folder: pathlib.Path) -> None:
  """Writes a case's folder, as torch's files where a prefix keeps AdapterHub from safetensors."""
  safe = case in ("houlsby", "learned", "fusion")
  if case == "fusion":
    fuse = adapters.Fuse(*NAMES)
    model.save_adapter_setup(str(folder), fuse, head_setup=case, use_safetensors=safe)
  else:
    model.save_adapter(str(folder), case, with_head=hasattr(model, "heads"), use_safetensors=safe)


def load(model, case: str, folder: pathlib.Path) -> None:
  """Loads what was written here, into modules that are float64 from the start."""
  read = model.load_adapter_setup if case == "fusion" else model.load_adapter
  torch.set_default_dtype(torch.float64)
  try:
    read(str(folder), set_active=True, use_safetensors=True)
  finally:
    torch.set_default_dtype(torch.float32)
  model.double().eval()


def forward(model) -> torch.Tensor:
  ids, mask = torch.tensor(IDS), torch.tensor(MASK)
  given = {"decoder_input_ids": ids.flip(1)} if model.config.model_type == "t5" else {}
  return model(input_ids=ids, attention_mask=mask, **given).logits


def logits(model) -> np.ndarray:
  with torch.no_grad():
    return forward(model).numpy()


def to_gradients(model) -> None:
  """Puts the gradients of what was added in its place."""
  for _, p in added(model):
    p.requires_grad_()
  out = forward(model)
  (out * torch.tensor(cotangent(out.shape))).sum().backward()
  with torch.no_grad():
    for _, p in added(model):
      p.copy_(p.grad)


def main() -> None:
  os.chdir(DATA)  # the files name the folder of the base
  for family in sorted({f for f, _ in STORED}):
    shutil.rmtree(family, ignore_errors=True)
    make_base(family, pathlib.Path(family, "base"))
  for family, case in STORED:
    model = read_base(family, pathlib.Path(family, "base"))
    add(model, family, case)
    folder = pathlib.Path(family, case)
    save(model, case, folder)
    np.save(folder / "logits.npy", logits(model))
    to_gradients(model)
    save(model, case, folder / "gradients")
    print(family, case, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))


if __name__ == "__main__":
  torch.Tensor.float = torch.Tensor.double
  from tests.test_models.lifting import Lifted

  for kind in MODELS:
    for at in ("transformers", "adapters"):
      module = importlib.import_module(f"{at}.models.{kind}.modeling_{kind}")
      module.torch = Lifted(torch)
  main()
