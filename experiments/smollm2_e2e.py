"""A real language model learns a real task: SmolLM2-135M-Instruct on E2E table-to-text.

  python experiments/smollm2_e2e.py --model SMOLLM2_FOLDER --data E2E_FOLDER --out runs/e2e
  python experiments/smollm2_e2e.py ... --method prefix_tuning
  python experiments/smollm2_e2e.py ... --check      # afterwards: the same texts from torch PEFT
  python experiments/smollm2_e2e.py --compare FOLDER # of runs: results.md, a line for each

Writes chat files from the data set's CSV, trains with the main job, answers the test set's tables
and scores the answers against all their references (BLEU, ROUGE), shows ten of them before and
after, and exports the adapter for PEFT. `--check` needs torch and peft.
"""

import argparse
import csv
import json
import pathlib
import re

import finetune
import reporting

import pelt_jax as pelt
from pelt_jax import models, training

PROMPT = "Write one sentence about this restaurant, with every fact given: "
SHOWN, NEW_TOKENS = 10, 60
METHODS = {
  "lora": ("lora", "rank=16", "alpha=32", "targets=all-linear"),
  "qlora": ("qlora", "rank=16", "alpha=32"),
  "qlora_merge_aware": ("qlora", "rank=16", "alpha=32", "merge_aware=true"),
  "adalora": ("adalora", "rank=24", "target_rank=16", "alpha=48"),
  "dora": ("dora", "rank=16", "alpha=32", "targets=all-linear"),
  "miss": ("miss", "rank=32", "targets=all-linear"),
  "prefix_tuning": ("prefix_tuning", "length=20"),
  "prompt_tuning": ("prompt_tuning", "length=20"),
  "parallel": ("adapter", "style=scaled_parallel", "bottleneck=64"),
  "unipelt": ("unipelt", "length=20", "gate_pool=token"),
}


def chat(path: pathlib.Path, limit: int | None = None) -> list[dict]:
  """The data set's rows as conversations."""
  with open(path, newline="", encoding="utf-8") as file:
    rows = [{k.lower(): v for k, v in row.items()} for row in csv.DictReader(file)]
  turns = [[("user", PROMPT + row["mr"]), ("assistant", row["ref"])] for row in rows[:limit]]
  return [{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns]


def train(args: argparse.Namespace) -> None:
  out, data = pathlib.Path(args.out), pathlib.Path(args.data)
  out.mkdir(parents=True, exist_ok=True)
  for name, file, limit in (
    ("train", "trainset", None),
    ("dev", "devset", 96),
    ("test", "testset_w_refs", None),
  ):
    rows = chat(data / f"{file}.csv", limit)
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  general = ["--general", args.general] if args.general else []
  method, *settings = METHODS[args.method]
  # Virtual tokens come on top of the text's.
  length = 192 + (20 if args.method == "prompt_tuning" else 0)
  report = finetune.main(
    [
      *("--model", args.model, "--task", "lm", "--method", method),
      *(part for setting in settings for part in ("--set", setting)),
      *("--train", str(out / "train.jsonl"), "--eval", str(out / "dev.jsonl"), *general),
      *("--steps", str(args.steps), "--batch", str(args.batch), "--length", str(length)),
      *(["--lr", str(args.lr)] if args.lr else []),
      *("--out", str(out / "run"), "--resume" if args.resume else "--overwrite"),
    ]
  )
  model, base = models.from_pretrained(args.model, task="lm")
  params = pelt.load(out / "run" / "adapter", base)
  apply, tokenizer = pelt.bypass(model.apply), training.load_tokenizer(args.model)
  file = training.read(out / "test.jsonl", "lm")

  def asked(virtual, most=None):
    return training.questions(file, tokenizer, "lm", virtual=virtual, most=most)

  def writer(questions, progress):
    return training.Writer(
      apply, questions, tokenizer, max_new_tokens=NEW_TOKENS, progress=progress
    )

  virtual = pelt.virtual_tokens(params)
  write = writer(asked(virtual, args.tables), True)
  answers = write(params)
  report["settings"] = reporting.as_names(report["settings"])
  report["model"] = report["settings"]["model"]
  report["test"] = {"tables": len(answers), **write.scores(answers)}
  if args.method in ("lora", "prompt_tuning", "prefix_tuning"):  # PEFT has no others of these
    pelt.interop.peft.export(out / "peft", params, model)
  shown = asked((), SHOWN)
  before, after = writer(shown, False)(base), writer(asked(virtual, SHOWN), False).tokens(params)
  texts = [
    {
      "table": question.prompt.removeprefix(PROMPT),
      "prompt": question.ids,
      "reference": question.references[0],
      "before": first,
      "after": tokenizer.decode(ids).strip(),
      "ids": ids,
    }
    for question, first, ids in zip(shown, before, after, strict=True)
  ]
  finetune.write(out / "texts.json", json.dumps(texts, indent=1) + "\n")
  finetune.write(out / "report.json", json.dumps(report, indent=2) + "\n")
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
      scores = model(input_ids=torch.tensor([prompt + ours])).logits[0, -len(ours) - 1 : -1]
    first = next((i for i, (a, b) in enumerate(zip(ours, made, strict=False)) if a != b), None)
    best = torch.topk(scores, 2).values
    gap = None if first is None else float(best[first, 0] - best[first, 1])
    same.append({"equal": ours == made, "first difference": first, "gap there": gap})
  report = json.loads((out / "report.json").read_text())
  (out / "check.json").write_text(json.dumps(same, indent=1) + "\n")
  write_report(out, report, texts, same)
  print(f"{sum(s['equal'] for s in same)} of {len(same)} texts equal torch PEFT's, token for token")


def write_report(
  out: pathlib.Path, report: dict, texts: list[dict], same: list[dict] | None
) -> None:
  lines = [re.sub(r"\((\w+\.png)\)", r"(run/\1)", reporting.as_markdown(report))]
  test = report["test"]
  lines += [
    f"\n## Test set, {test['tables']} tables, all references, greedy\n",
    "| BLEU | ROUGE-1 | ROUGE-2 | ROUGE-L |\n|---|---|---|---|",
    "| {bleu:.2f} | {rouge_1:.4f} | {rouge_2:.4f} | {rouge_l:.4f} |".format(**test),
  ]
  lines.append("\n## Ten held-out tables, greedy\n")
  for i, text in enumerate(texts):
    lines += [f"**{text['table']}**\n", f"- reference: {text['reference']}"]
    lines += [f"- before: {text['before']}", f"- after: {text['after']}"]
    if same is not None:
      lines.append(f"- torch PEFT on the exported adapter: {same[i]}")
    lines.append("")
  (out / "report.md").write_text("\n".join(lines))


def compare(folder: pathlib.Path) -> None:
  """Writes results.md beside the folders of runs."""
  lines = ["# SmolLM2-135M-Instruct on E2E, greedy answers against all references\n"]
  lines.append(
    "| run | steps | rows | rate | trained | stored | loss, dev | BLEU "
    "| ROUGE-1 | ROUGE-2 | ROUGE-L | tables |"
  )
  lines.append("|---" * 12 + "|")
  for file in sorted(folder.glob("*/report.json")):
    report = json.loads(file.read_text())
    settings, counts, metric = report["settings"], report["parameters"], report["metric"]
    test = report.get("test")
    scores = "{bleu:.2f} | {rouge_1:.4f} | {rouge_2:.4f} | {rouge_l:.4f} | {tables}"
    lines.append(
      f"| {file.parent.name} | {report['steps']} | {settings['batch']} | {settings['lr']} "
      f"| {counts['trainable']:,} | {counts['stored']:,} "
      f"| {metric['before']:.3f} → {metric['after']:.3f} "
      f"| {scores.format(**test) if test else ' | | | | '} |"
    )
  finetune.write(folder / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
  parser.add_argument("--data", help="folder of the E2E data set")
  parser.add_argument("--general", help="general text: how much of it is forgotten")
  parser.add_argument("--method", default="lora", choices=METHODS)
  parser.add_argument("--lr", type=float, help="peak learning rate, if not the main job's")
  parser.add_argument("--tables", type=int, help="how many of the test set's 630 to answer")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--out", default="runs/smollm2_e2e")
  parser.add_argument("--resume", action="store_true", help="go on where the run stopped")
  parser.add_argument(
    "--check", action="store_true", help="compare with torch PEFT, after training"
  )
  parser.add_argument("--compare", type=pathlib.Path, help="only that: a folder of runs' folders")
  given = parser.parse_args()
  if given.compare:
    compare(given.compare)
  elif given.model is None or given.data is None:
    parser.error("--model and --data are needed")
  else:
    check(given) if given.check else train(given)
