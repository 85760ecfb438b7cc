"""A real language model learns a real task: SmolLM2-135M-Instruct on E2E table-to-text, by LoRA.

  python experiments/smollm2_e2e.py --model SMOLLM2_FOLDER --data E2E_FOLDER --out runs/e2e
  python experiments/smollm2_e2e.py ... --check      # afterwards: the same texts from torch PEFT

Writes chat files from the data set's CSV, trains with the main job, generates for ten held-out
tables before and after, and exports the adapter for PEFT. `--check` needs torch and peft.
"""

import argparse
import csv
import json
import pathlib

import finetune
import jax.numpy as jnp
import numpy as np

import pelt_jax as pelt
from pelt_jax import models, training

PROMPT = "Write one sentence about this restaurant, with every fact given: "
SHOWN, NEW_TOKENS = 10, 60


def chat(path: pathlib.Path, limit: int | None = None) -> list[dict]:
  """The data set's rows as conversations."""
  with open(path, newline="", encoding="utf-8") as file:
    rows = [{k.lower(): v for k, v in row.items()} for row in csv.DictReader(file)]
  turns = [[("user", PROMPT + row["mr"]), ("assistant", row["ref"])] for row in rows[:limit]]
  return [{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns]


def tables(path: pathlib.Path) -> list[str]:
  """Every 60th distinct table of the test set: short and long ones."""
  with open(path, newline="", encoding="utf-8") as file:
    distinct = list(dict.fromkeys(next(iter(row.values())) for row in csv.DictReader(file)))
  return distinct[::60][:SHOWN]


def prompts(tokenizer, asked: list[str]) -> list[list[int]]:
  texts = [tokenizer.render([{"role": "user", "content": PROMPT + t}], prompt=True) for t in asked]
  return [tokenizer.encode(text).ids for text in texts]


def write_texts(apply, params, tokenizer, ids: list[list[int]]) -> list[list[int]]:
  """Greedy continuations, all prompts in one left-padded batch."""
  width = max(map(len, ids))
  padded = np.array([[tokenizer.pad] * (width - len(row)) + row for row in ids])
  mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in ids])
  made = training.generate(
    apply,
    params,
    jnp.asarray(padded),
    jnp.asarray(mask),
    max_new_tokens=NEW_TOKENS,
    eos_token_id=tokenizer.eos,
  )
  lengths = np.asarray(made.lengths)
  return [row[:n].tolist() for row, n in zip(np.asarray(made.tokens), lengths, strict=True)]


def train(args: argparse.Namespace) -> None:
  out, data = pathlib.Path(args.out), pathlib.Path(args.data)
  out.mkdir(parents=True, exist_ok=True)
  for name, limit in (("train", None), ("dev", 96)):
    rows = chat(data / f"{name}set.csv", limit)
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  general = ["--general", args.general] if args.general else []
  report = finetune.main(
    [
      *("--model", args.model, "--task", "lm", "--method", "lora"),
      *("--set", "rank=16", "--set", "alpha=32", "--set", "targets=all-linear"),
      *("--train", str(out / "train.jsonl"), "--eval", str(out / "dev.jsonl"), *general),
      *("--steps", str(args.steps), "--batch", str(args.batch), "--length", "192"),
      *("--lr", "5e-4", "--out", str(out / "run"), "--resume" if args.resume else "--overwrite"),
    ]
  )
  model, base = models.from_pretrained(args.model, task="lm")
  params = pelt.load(out / "run" / "adapter", base)
  apply, tokenizer = pelt.bypass(model.apply), training.load_tokenizer(args.model)
  asked = tables(data / "testset.csv")
  ids = prompts(tokenizer, asked)
  before, after = (write_texts(apply, p, tokenizer, ids) for p in (base, params))
  pelt.interop.peft.export(out / "peft", params, model)
  texts = [
    {"table": t, "prompt": i, "before": tokenizer.decode(b), "after": tokenizer.decode(a), "ids": a}
    for t, i, b, a in zip(asked, ids, before, after, strict=True)
  ]
  (out / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")
  write_report(out, report, texts, None)


def check(args: argparse.Namespace) -> None:
  """The exported adapter in torch PEFT: greedy texts, token by token."""
  import torch
  from peft import PeftModel
  from transformers import AutoModelForCausalLM

  out = pathlib.Path(args.out)
  texts = json.loads((out / "texts.json").read_text())
  model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
  model = PeftModel.from_pretrained(model, str(out / "peft")).eval()
  same = []
  for text in texts:
    ours, prompt = text["ids"], text["prompt"]
    with torch.no_grad():
      made = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
      )[0, len(prompt) :].tolist()
      scores = model(input_ids=torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    first = next((i for i, (a, b) in enumerate(zip(ours, made, strict=False)) if a != b), None)
    best = torch.topk(scores, 2).values
    gap = None if first is None else float(best[first, 0] - best[first, 1])
    same.append({"equal": ours == made, "first difference": first, "gap there": gap})
  report = json.loads((out / "run" / "report.json").read_text())
  (out / "check.json").write_text(json.dumps(same, indent=1) + "\n")
  write_report(out, report, texts, same)
  print(f"{sum(s['equal'] for s in same)} of {len(same)} texts equal torch PEFT's, token for token")


def write_report(
  out: pathlib.Path, report: dict, texts: list[dict], same: list[dict] | None
) -> None:
  lines = [finetune.as_markdown(report).replace("(loss.png)", "(run/loss.png)")]
  lines.append("\n## Ten held-out tables, greedy\n")
  for i, text in enumerate(texts):
    lines += [f"**{text['table']}**\n", f"- before: {text['before']}", f"- after: {text['after']}"]
    if same is not None:
      lines.append(f"- torch PEFT on the exported adapter: {same[i]}")
    lines.append("")
  (out / "report.md").write_text("\n".join(lines))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
  parser.add_argument("--data", required=True, help="folder of the E2E data set")
  parser.add_argument("--general", help="general text: how much of it is forgotten")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--out", default="runs/smollm2_e2e")
  parser.add_argument("--resume", action="store_true", help="go on where the run stopped")
  parser.add_argument(
    "--check", action="store_true", help="compare with torch PEFT, after training"
  )
  given = parser.parse_args()
  check(given) if given.check else train(given)
