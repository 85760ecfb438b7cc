"""MiniLM on TREC, several seeds: the main job beside torch PEFT with the same recipe.

  python experiments/trec.py --model MINILM_FOLDER --data TREC_FOLDER --out runs/trec
  python experiments/trec.py ... --torch            # the same recipe in torch PEFT
  python experiments/trec.py ... --methods prefix_tuning p_tuning_v2 --seeds 3

Three epochs, batch 32, length 32 besides virtual tokens, the rate falls linearly after a warm-up;
the head trains too. Writes results.json and results.md; each call adds its rows, and a seed that is
done already is not run again.
"""

import argparse
import json
import pathlib
import statistics
import time

import finetune

VIRTUAL_METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2")
RECIPE = {"epochs": 3, "batch": 32, "length": 32}
RATES = {
  "lora": 1e-3,
  "full": 1e-4,
  "bitfit": 2e-3,
  "prompt_tuning": 3e-2,
  "p_tuning": 1e-3,
  "prefix_tuning": 2e-4,
  "p_tuning_v2": 7e-3,
}
HEAD_RATES = {"prefix_tuning": 5e-3}  # beside an MLP, which wants small steps
VIRTUAL = 10  # tokens of a prompt, rows of a prefix


def ours(args: argparse.Namespace, out: pathlib.Path) -> dict[str, list[float]]:
  """Accuracies of the main job, by method."""
  found: dict[str, list[float]] = {}
  for method in args.methods:
    room = VIRTUAL if method in ("prompt_tuning", "p_tuning") else 0
    options = [f"--length={RECIPE['length'] + room}"]
    options += ["--set", f"length={VIRTUAL}"] if method in VIRTUAL_METHODS else []
    options += ["--head-lr", str(HEAD_RATES[method])] if method in HEAD_RATES else []
    for seed in range(args.seeds):
      folder = out / f"{method}-{seed}"
      if not (folder / "report.json").is_file():
        finetune.main(
          [
            *("--model", args.model, "--task", "classification", "--method", method),
            *("--train", f"{args.data}/TREC.train.all", "--eval", f"{args.data}/TREC.test.all"),
            *("--epochs", str(RECIPE["epochs"]), "--batch", str(RECIPE["batch"]), *options),
            *("--lr", str(RATES[method]), "--seed", str(seed), "--out", str(folder), "--overwrite"),
          ]
        )
      report = json.loads((folder / "report.json").read_text())
      found.setdefault(method, []).append(report["metric"]["after"])
  return found


def peft_config(method: str):
  """What the method is called in torch PEFT."""
  import peft

  options = {"task_type": "SEQ_CLS", "num_virtual_tokens": VIRTUAL}
  if method == "lora":
    return peft.LoraConfig(
      task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"]
    )
  if method == "prompt_tuning":
    return peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **options)
  if method == "p_tuning":
    return peft.PromptEncoderConfig(
      encoder_reparameterization_type="LSTM", encoder_hidden_size=192, **options
    )
  if method == "prefix_tuning":
    return peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=512, **options)
  if method == "p_tuning_v2":
    return peft.PrefixTuningConfig(**options)
  raise SystemExit(f"torch PEFT has no {method}; pass --methods")


def theirs(args: argparse.Namespace, out: pathlib.Path, method: str) -> list[float]:
  """Accuracies of torch PEFT."""
  import numpy as np
  import torch
  from peft import get_peft_model
  from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

  from pelt_jax import training

  data = {
    n: training.read(f"{args.data}/TREC.{n}.all", "classification") for n in ("train", "test")
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
    done = out / f"peft-{method}-{seed}.json"
    if done.is_file():
      scores.append(json.loads(done.read_text()))
      continue
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    model = get_peft_model(model, peft_config(method))
    trained = [p for p in model.parameters() if p.requires_grad]
    heads = {id(p) for name, p in model.named_parameters() if "classifier" in name}
    groups = [
      {"params": [p for p in trained if (id(p) in heads) == head], "lr": rate}
      for head, rate in ((False, RATES[method]), (True, HEAD_RATES.get(method, RATES[method])))
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
    finetune.write(done, json.dumps(scores[-1]))
    taken = time.perf_counter() - began
    print(f"torch PEFT {method}, seed {seed}: {scores[-1]:.4f} in {taken:.0f} s", flush=True)
  return scores


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
  parser.add_argument("--data", required=True, help="folder of TREC")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--methods", nargs="+", default=["lora", "full", "bitfit"], choices=RATES)
  parser.add_argument("--torch", action="store_true", help="run torch PEFT")
  parser.add_argument("--out", default="runs/trec")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  file = out / "results.json"
  results = json.loads(file.read_text()) if file.is_file() else {}
  if args.torch:
    results |= {f"torch PEFT {m}": theirs(args, out, m) for m in args.methods}
  else:
    results |= ours(args, out)
  finetune.write(file, json.dumps(results, indent=2) + "\n")
  lines = ["# MiniLM on TREC: accuracy on the test set\n", "| run | mean | deviation | seeds |"]
  lines.append("|---|---|---|---|")
  for name, scores in results.items():
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    each = ", ".join(f"{s:.3f}" for s in scores)
    lines.append(f"| {name} | {statistics.mean(scores):.4f} | {spread:.4f} | {each} |")
  rates = {m: r for m, r in RATES.items() if any(m in name.split() for name in results)}
  recipe = ", ".join(f"{k} {v}" for k, v in RECIPE.items()) + f", peak rates {rates}"
  recipe += f", of heads {HEAD_RATES} where they are others, {VIRTUAL} virtual tokens"
  lines.append(f"\nRecipe: {recipe}; weight decay 0.01, clip 1.0, warm-up 6 %, linear decay.")
  finetune.write(out / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
