"""MiniLM on TREC, several seeds: the main job beside a torch library with the same recipe.

  python experiments/trec.py --model MINILM_FOLDER --data DATA_FOLDER --out runs/trec
  python experiments/trec.py ... --torch            # the same recipe in torch PEFT or AdapterHub
  python experiments/trec.py ... --methods prefix_tuning p_tuning_v2 --seeds 3

Three epochs, batch 32, length 32 besides virtual tokens, the rate falls linearly after a warm-up;
the head trains too. Writes results.json and results.md; each call adds its rows, and a seed that is
done already is not run again. Prefixes in torch PEFT, and AdapterHub, need transformers 4.57.
"""

import argparse
import json
import pathlib
import statistics
import time

import finetune
import recipes
from recipes import RECIPES, VIRTUAL
from reporting import write

RECIPE = {"epochs": 3, "batch": 32, "length": recipes.LENGTHS["trec"]}
RATES = {name: recipes.rates(name, "classification") for name in RECIPES}
RATES |= dict.fromkeys(("lora", *recipes.QUANTIZED), (1e-3, 1e-3)) | {"full": (1e-4, 1e-4)}


def ours(args: argparse.Namespace, out: pathlib.Path, name: str) -> list[float]:
  """Accuracies of the main job."""
  recipe, (rate, head_rate) = RECIPES[name], RATES[name]
  found = []
  for seed in range(args.seeds):
    folder = out / f"{name}-{seed}"
    if not (folder / "report.json").is_file():
      job = ["--model", args.model, *recipes.tasks(args.data)["trec"], *recipe.arguments()]
      job += ["--epochs", str(RECIPE["epochs"]), "--batch", str(RECIPE["batch"])]
      job += ["--length", str(RECIPE["length"] + recipe.room), "--lr", str(rate)]
      job += ["--head-lr", str(head_rate)] if head_rate != rate else []
      finetune.main([*job, "--seed", str(seed), "--out", str(folder), "--overwrite"])
    report = json.loads((folder / "report.json").read_text())
    found.append(report["metric"]["after"])
  return found


def peft_model(model, name: str):
  """The model with torch PEFT's form of a method."""
  import peft

  virtual = {"task_type": "SEQ_CLS", "num_virtual_tokens": VIRTUAL}
  configs = {
    "lora": lambda: peft.LoraConfig(
      task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"]
    ),
    "prompt_tuning": lambda: peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **virtual),
    "p_tuning": lambda: peft.PromptEncoderConfig(
      encoder_reparameterization_type="LSTM", encoder_hidden_size=192, **virtual
    ),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(
      prefix_projection=True, encoder_hidden_size=512, **virtual
    ),
    "p_tuning_v2": lambda: peft.PrefixTuningConfig(**virtual),
  }
  if name not in configs:
    raise SystemExit(f"torch PEFT has no {name}; pass --methods")
  return peft.get_peft_model(model, configs[name]())


def hub_model(model, name: str):
  """The model with AdapterHub's form of a method."""
  import adapters

  prefix = {"prefix_length": VIRTUAL, "bottleneck_size": 512}
  configs = {
    "houlsby": lambda: adapters.DoubleSeqBnConfig(reduction_factor=16),
    "pfeiffer": lambda: adapters.SeqBnConfig(reduction_factor=16),
    "parallel": lambda: adapters.ParBnConfig(reduction_factor=2),
    "mam": lambda: adapters.ConfigUnion(
      adapters.PrefixTuningConfig(**prefix), adapters.ParBnConfig(reduction_factor=2)
    ),
    "unipelt": lambda: adapters.ConfigUnion(
      adapters.PrefixTuningConfig(**prefix, use_gating=True),
      adapters.SeqBnConfig(reduction_factor=16, use_gating=True),
      adapters.LoRAConfig(r=8, use_gating=True),
    ),
  }
  adapters.init(model)
  model.add_adapter(name, config=configs[name]())
  model.set_active_adapters(name)
  model.train_adapter(name)
  return model


def theirs(args: argparse.Namespace, out: pathlib.Path, method: str) -> list[float]:
  """Accuracies of torch PEFT or AdapterHub."""
  import numpy as np
  import torch
  from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

  from pelt_jax import training

  data = {
    n: training.read(f"{args.data}/trec/TREC.{n}.all", "classification") for n in ("train", "test")
  }
  labels = training.label_list(data["train"])
  tokenizer = training.load_tokenizer(args.model)

  def tensors(examples):
    ids = [tokenizer.encode(e.text, special=True).ids[: RECIPE["length"]] for e in examples]
    width = max(map(len, ids))
    padded = torch.tensor([row + [tokenizer.pad] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return padded, mask, torch.tensor([labels.index(e.label) for e in examples])

  def cut(mask: torch.Tensor) -> int:
    return int(mask.sum(1).max())  # a batch is as wide as its longest row

  ids, mask, gold = tensors(data["train"].examples)
  test = tensors(data["test"].examples)
  scores = []
  for seed in range(args.seeds):
    done = out / f"torch-{method}-{seed}.json"
    if done.is_file():
      scores.append(json.loads(done.read_text()))
      continue
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    model = (hub_model if method in recipes.ADAPTERS else peft_model)(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    heads = {id(p) for name, p in model.named_parameters() if "classifier" in name}
    groups = [
      {"params": [p for p in trained if (id(p) in heads) == head], "lr": rate}
      for head, rate in zip((False, True), RATES[method], strict=True)
    ]
    tx = torch.optim.AdamW(groups, weight_decay=0.01)
    per_epoch = len(gold) // RECIPE["batch"]
    steps = per_epoch * RECIPE["epochs"]
    schedule = get_linear_schedule_with_warmup(tx, round(0.06 * steps), steps)
    model.train()
    for epoch in range(RECIPE["epochs"]):
      order = np.random.default_rng(1000 * seed + epoch).permutation(len(gold))
      for i in range(per_epoch):
        rows = order[i * RECIPE["batch"] : (i + 1) * RECIPE["batch"]]
        width = cut(mask[rows])
        result = model(
          input_ids=ids[rows, :width], attention_mask=mask[rows, :width], labels=gold[rows]
        )
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        tx.step()
        schedule.step()
        tx.zero_grad()
    model.eval()
    with torch.no_grad():
      logits = model(input_ids=test[0], attention_mask=test[1]).logits
    scores.append(float((logits.argmax(-1) == test[2]).float().mean()))
    write(done, json.dumps(scores[-1]))
    taken = time.perf_counter() - began
    print(f"torch {method}, seed {seed}: {scores[-1]:.4f} in {taken:.0f} s", flush=True)
  return scores


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
  parser.add_argument("--data", type=pathlib.Path, required=True, help="folder that holds trec/")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--methods", nargs="+", default=["lora", "full", "bitfit"], choices=RECIPES)
  parser.add_argument("--torch", action="store_true", help="run the torch library")
  parser.add_argument("--out", default="runs/trec")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  file = out / "results.json"
  results = json.loads(file.read_text()) if file.is_file() else {}
  for name in args.methods:
    if args.torch:
      library = "AdapterHub" if name in recipes.ADAPTERS else "torch PEFT"
      results[f"{library} {name}"] = theirs(args, out, name)
    else:
      results[name] = ours(args, out, name)
  write(file, json.dumps(results, indent=2) + "\n")
  lines = ["# MiniLM on TREC: accuracy on the test set\n", "| run | mean | deviation | seeds |"]
  lines.append("|---|---|---|---|")
  for name, scores in results.items():
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    each = ", ".join(f"{s:.3f}" for s in scores)
    lines.append(f"| {name} | {statistics.mean(scores):.4f} | {spread:.4f} | {each} |")
  rates = {m: r for m, r in RATES.items() if any(m in name.split() for name in results)}
  rates = "; ".join(f"{m} {a:g}" + f", head {b:g}" * (a != b) for m, (a, b) in rates.items())
  recipe = ", ".join(f"{k} {v}" for k, v in RECIPE.items()) + f", {VIRTUAL} virtual tokens"
  recipe += f", peak rates: {rates}"
  lines.append(f"\nRecipe: {recipe}; weight decay 0.01, clip 1.0, warm-up 6 %, linear decay.")
  write(out / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
