"""Makes `data/`: adapters as torch PEFT writes them, with its outputs and gradients in float64.

    python -m tests.test_interop.make_values

Every case of `harness.CASES` gets a folder with PEFT's own two files and `values.npz`: the base's
tensors, the outputs of the adapted and of the merged model, and the gradient of every trained
tensor for the loss sum(output * COTANGENT). Trained tensors are moved by 0.3 * N(0, 1) first,
since a zero factor would hide errors. PiSSA and OLoRA take the base apart in float32.
"""

import json
import pathlib
import warnings

import numpy as np
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from tests.test_interop.harness import CASES, COTANGENT, DATA, IDS, Case


class Experts(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.up = torch.nn.Parameter(torch.randn(2, 8, 5) * 0.5)
    self.down = torch.nn.Parameter(torch.randn(2, 5, 8) * 0.5)

  def forward(self, x):
    hidden = torch.tanh(torch.einsum("bti,eoi->bteo", x, self.down))
    return x + torch.einsum("bteo,eio->bti", hidden, self.up)


class Mix(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.w = torch.nn.Parameter(torch.randn(8, 8) * 0.5)

  def forward(self, x):
    return x @ self.w.T


class Model(torch.nn.Module):
  def __init__(self, case: Case):
    super().__init__()
    linear = (lambda i, o, bias: Conv1D(o, i)) if case.conv else torch.nn.Linear
    self.emb = torch.nn.Embedding(11, 6)
    self.lin, self.lin2 = linear(6, 10, True), linear(10, 8, False)
    self.experts = Experts() if case.experts else torch.nn.Identity()
    self.mix = Mix() if case.matrix else torch.nn.Identity()
    self.head = torch.nn.Linear(8, 3)

  def forward(self, ids):
    x = torch.tanh(self.lin2(torch.tanh(self.lin(self.emb(ids)))))
    return self.head(self.mix(self.experts(x)))


def torch_model(case: Case) -> Model:
  torch.manual_seed(0)
  model = Model(case).double()
  for parameter in model.parameters():
    parameter.data = torch.randn_like(parameter) * 0.5
  return model


def outputs(model: torch.nn.Module) -> np.ndarray:
  with torch.no_grad():
    return model.eval()(torch.from_numpy(IDS)).numpy()


def load_in_peft(case: Case, folder: pathlib.Path) -> PeftModel:
  model = PeftModel.from_pretrained(torch_model(case), str(folder), autocast_adapter_dtype=False)
  return model.double()  # VeRA's pair is float32 at first


def adapted(case: Case) -> tuple[PeftModel, dict, dict]:
  """A model under PEFT, its trained tensors moved; what `values.npz` says of its base; those."""
  model = torch_model(case)
  model = model.float() if case.start else model
  base = {f"base/{k}": v.numpy().copy() for k, v in model.state_dict().items()}
  base |= {"conv": np.array(True)} if case.conv else {}
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "fan_in_fan_out")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[case.kind](**case.config)
    made = get_peft_model(model, config).double()
  trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
  # PEFT 0.21 trains AdaLoRA's divisor, though it saves none.
  trained = {n: p for n, p in trained.items() if "ranknum" not in n}
  for parameter in trained.values():
    if case.start:
      parameter.data.zero_()  # the signs of singular vectors are LAPACK's choice
    parameter.data += 0.3 * torch.randn_like(parameter)
  return made.eval(), base, trained


def make(case: Case, folder: pathlib.Path) -> None:
  model, base, trained = adapted(case)
  model.save_pretrained(str(folder))
  out = model(torch.from_numpy(IDS))
  (out * torch.from_numpy(COTANGENT)).sum().backward()
  gradients = {
    "gradient/" + n.replace(".modules_to_save.default", "").replace(".default", ""): p.grad.numpy()
    for n, p in trained.items()
  }
  merged = outputs(model.merge_and_unload())
  values = dict(out=out.detach().numpy(), merged=merged, **base, **gradients)
  np.savez_compressed(folder / "values.npz", **values)
  # The card says nothing that the tests need, and the version should not change the file.
  (folder / "README.md").unlink(missing_ok=True)
  config = json.loads((folder / "adapter_config.json").read_text())
  if isinstance(config["target_modules"], list):
    config["target_modules"].sort()  # PEFT keeps a set
  (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
  for name, case in CASES.items():
    make(case, DATA / name)
    print(name, sorted(p.name for p in (DATA / name).iterdir()))
