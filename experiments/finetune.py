"""Fine-tunes a model with one method and reports what it gained, cost and forgot.

  python experiments/finetune.py                      # the demo: no arguments, no downloads
  python experiments/finetune.py --model MiniLM/ --task classification --method lora \
    --set rank=8 --train trec.train --eval trec.test --out runs/trec

Writes into --out: adapter/ (what was trained), report.json, report.md, loss.png, checkpoints/.
"""

import argparse
import ast
import collections.abc
import inspect
import json
import math
import pathlib
import platform
import shutil
import sys
import time
import types
import typing
import zlib

import jax
import jax.numpy as jnp
import optax
from reporting import as_markdown, plot, show, write

import pelt_jax as pelt
from pelt_jax import models, training

# Peak learning rates. PEFT methods start from zero change and need larger ones than full training.
RATES = {
  "full": {"classification": 5e-5, "tagging": 5e-5, "lm": 5e-5, "seq2seq": 5e-5},
  "bitfit": {"classification": 2e-3, "tagging": 2e-3, "lm": 1e-3, "seq2seq": 1e-3},
  "lora": {"classification": 2e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4},
  "prompt_tuning": {"classification": 3e-2, "tagging": 3e-2, "lm": 1e-2, "seq2seq": 3e-2},
  "p_tuning": {"classification": 1e-3, "tagging": 1e-3, "lm": 1e-3, "seq2seq": 1e-3},
  "prefix_tuning": {"classification": 1e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4},
  "p_tuning_v2": {"classification": 7e-3, "tagging": 1e-2, "lm": 5e-3, "seq2seq": 5e-3},
}
OTHER_RATES = {"classification": 1e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4}
METHODS = (  # those that this version has
  *("full", "bitfit", "lora", "adalora", "dora", "pissa", "olora", "ia3", "vera", "loha", "lokr"),
  *("qlora", "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "adapter"),
  *("adapter_fusion", "adapter_drop", "mam", "unipelt", "lora_fa", "miss", "hira"),
)
BATCHES = {"classification": 32, "tagging": 32, "lm": 8, "seq2seq": 16}
EPOCHS = {"classification": 3, "tagging": 3, "lm": 1, "seq2seq": 3}
WRITE = {"lm": 0, "seq2seq": 64}  # held-out prompts to answer
SHOWN = 5  # of the answers, in the report
NOISE = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2")  # until they are trained
WARMUP, DECAY, CLIP = 0.06, 0.01, 1.0  # of steps; of weights; of the gradient's norm
# The demo's model is tiny and its task far away: more capacity, larger steps.
DEMO = {"steps": 200, "batch": 16, "length": 128, "lr": 5e-3, "set": ("targets=all-linear",)}
OUTPUTS = ("adapter", "checkpoints", "report.json", "report.md", "loss.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--model", default="demo", help="Hugging Face folder, hub id, or demo")
  add("--train", help="JSONL, CSV, TSV, CoNLL or plain text")
  add("--eval", help="the same, held out")
  add("--general", help="general text: how much of it is forgotten (lm)")
  add("--columns", help="of tables: text,label or prompt=NAME,completion=NAME")
  add("--task", default="lm", choices=training.TASKS)
  add("--method", default="lora", help=", ".join(m for m in METHODS if hasattr(pelt, m)))
  add("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method")
  add("--epochs", type=int)
  add("--steps", type=int, help="instead of --epochs")
  add("--batch", type=int, help="rows per optimizer step")
  add("--accumulate", type=int, default=1, help="parts of a batch, run one after another")
  add("--placement", default="start", choices=training.PLACEMENTS, help="of virtual tokens")
  add("--lr", type=float, help="peak learning rate")
  add("--length", type=int, help="tokens per row; longer examples are cut")
  add(
    "--write", type=int, help="answer that many prompts of --eval and score the texts (lm, seq2seq)"
  )
  add("--beams", type=int, default=1, help="of the search for answers; 1 is greedy")
  add("--new-tokens", type=int, default=64, help="longest answer")
  add("--seed", type=int, default=0)
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the frozen model")
  add("--scan", action="store_true", help="compile one layer instead of all")
  add("--remat", action="store_true", help="save memory by computing activations again")
  add("--best", action="store_true", help="keep the best evaluation's adapter, not the last")
  add("--mesh", help="data=2,model=4")
  add("--distributed", action="store_true", help="several processes; needs --mesh")
  add("--resume", action="store_true", help="go on where --out stopped")
  add("--overwrite", action="store_true", help="replace what an earlier run left in --out")
  add("--traceback", action="store_true", help="show where an error arose")
  add("--quiet", action="store_true", help="no progress bar, no summary")
  add("--out", help="folder to write (runs/demo for the demo)")
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
  started = time.perf_counter()
  args = parse(argv)
  if args.distributed:
    if not args.mesh:
      raise ValueError("--distributed needs --mesh, which says what the processes share")
    jax.distributed.initialize()
  chief = jax.process_index() == 0
  demo = args.model == "demo"
  check_arguments(args, demo)
  method = build_method(args)  # first: a wrong option should not cost a minute of loading
  mesh = training.make_mesh(args.mesh) if args.mesh else None
  out = pathlib.Path(args.out)
  prepare(out, args)

  # Data, model.
  if demo:
    import demo as demo_files

    source = demo_files.folder(progress=not args.quiet)
    tokenizer = training.ByteTokenizer()
  else:
    source, tokenizer = args.model, None
  train_set, eval_set, general_set = read_files(args, demo)
  labels = () if args.task in WRITE else training.label_list(train_set)
  model, base = models.from_pretrained(
    source,
    task=args.task,
    num_labels=len(labels) or None,
    dtype=jnp.dtype(args.dtype),
    scan=args.scan,
    remat=args.remat,
    key=jax.random.key(args.seed),
  )
  tokenizer = tokenizer or training.load_tokenizer(model.config.source)
  limit = model.config.max_position_embeddings
  if model.config.model_type == "roberta":
    limit -= 2  # its positions start after the padding id
  elif model.config.model_type == "t5":
    limit = None  # its positions are relative

  # Method: nodes inside the params.
  ids = jnp.zeros((args.batch, 8), jnp.int32)
  sites = pelt.sites(model, ids, jnp.ones_like(ids))
  params = training.masters(method.init(jax.random.key(args.seed), base, sites))
  virtual = pelt.virtual_tokens(params)

  options = {"length": args.length, "limit": limit, "placement": args.placement}

  def encode(examples, task=args.task, virtual=virtual):
    return training.encode(examples, tokenizer, task, labels=labels, virtual=virtual, **options)

  def writer(virtual=virtual):
    asked = training.questions(
      eval_set, tokenizer, args.task, virtual=virtual, most=args.write, **options
    )
    return training.Writer(
      apply,
      asked,
      tokenizer,
      size=args.batch,
      max_new_tokens=args.new_tokens,
      beams=args.beams,
      progress=chief and not args.quiet,
    )

  train_rows, eval_rows = encode(train_set), encode(eval_set)
  lengths = training.buckets(train_rows, eval_rows)
  apply = pelt.bypass(model.apply)
  place, placing = None, {}
  if mesh is not None:
    jax.set_mesh(mesh)
    specs = pelt.shardings(params, training.base_specs(sites, mesh), mesh)
    params = jax.device_put(params, specs)
    place = lambda batch: training.place_batch(batch, mesh)
    placing["out_shardings"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  # What it can do before training.
  metric, higher = training.MAIN_METRIC[args.task]
  scoring = lambda rows, lengths: training.Evaluator(
    apply, rows, args.batch, lengths, place, **placing
  )
  evaluator = scoring(eval_rows, lengths)
  # An untrained prompt or prefix is noise: what counts is the model without one.
  noise = args.method in NOISE
  start = base if noise else params
  before = (scoring(encode(eval_set, virtual=()), None) if noise else evaluator)(start)
  forget = None
  if general_set is not None:
    forget = scoring(encode(general_set, "lm"), None)
    plain = scoring(encode(general_set, "lm", ()), None) if noise else forget
    forgotten = [plain(start)["loss"]]
  writing = {"before": writer(())(start)} if args.write else {}
  sample = []
  if demo and args.task == "lm":
    sample.append(continuation(apply, params, tokenizer, ()))

  # Training.
  loader = training.Loader(train_rows, args.batch, args.seed, lengths)
  steps = args.steps or args.epochs * loader.steps_per_epoch
  warmup = max(1, round(WARMUP * steps))
  rate = optax.join_schedules(
    [
      optax.linear_schedule(0.0, args.lr, warmup),
      optax.linear_schedule(args.lr, 0.0, steps - warmup),
    ],
    [warmup],
  )
  tx = optax.inject_hyperparams(optax.adamw)(learning_rate=rate, weight_decay=DECAY)
  if "backbone" in jax.tree.leaves(pelt.labels(params)):  # trained jointly, at its own rate
    slower = optax.scale(RATES["full"][args.task] / args.lr)
    groups = {"trainable": optax.identity(), "backbone": slower}
    tx = optax.chain(tx, optax.multi_transform(groups, pelt.labels))
  loss = training.LOSSES[args.task]
  train = training.train_step(apply, loss, tx, method, clip=CLIP, accumulate=args.accumulate)
  if chief and args.overwrite:  # not before everything was found to be in order
    for name in OUTPUTS:
      path = out / name
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
  same = run_options(args, steps) | {"contents of the files": fingerprint(train_rows, eval_rows)}
  checkpoints = training.Checkpoints(out / "checkpoints", same)
  if args.resume and checkpoints.latest() is None and not args.quiet:
    print(f"no checkpoint in {out / 'checkpoints'}: starting anew")
  every = max(1, loader.steps_per_epoch if args.epochs else math.ceil(steps / 4))
  done = training.fit(
    train,
    params,
    loader,
    steps=steps,
    key=jax.random.key(args.seed + 1),
    evaluate=evaluator,
    every=min(every, math.ceil(steps / 2)),
    metric=metric if args.best else None,
    higher_is_better=higher,
    checkpoints=checkpoints,
    resume=args.resume,
    progress=chief and not args.quiet,
    place=place,
  )

  # What it can do now.
  after = evaluator(done.params)
  if forget is not None:
    forgotten.append(forget(done.params)["loss"])
  if args.write:
    write_answers = writer()
    writing["after"] = write_answers(done.params)
  if sample:
    sample.append(continuation(apply, done.params, tokenizer, virtual))
  final = done.params if mesh is None else training.replicate(done.params, mesh)
  if not chief:
    return {}
  pelt.save(out / "adapter", final)
  if labels:
    write(out / "adapter" / "labels.json", json.dumps(labels, indent=2) + "\n")
  count = pelt.count(final, sites)
  report = {
    "method": args.method,
    "model": args.model,
    "task": args.task,
    "seed": args.seed,
    "steps": done.steps,
    "metric": {
      "name": metric,
      "higher_is_better": higher,
      "before": before[metric],
      "after": after[metric],
    },
    "forgetting": {"before": forgotten[0], "after": forgotten[1]} if forget else None,
    "parameters": {
      name: getattr(count, name)
      for name in ("trainable", "stored", "changed", "rank", "head", "total")
    },
    "bytes": {
      "adapter": sum(f.stat().st_size for f in (out / "adapter").rglob("*") if f.is_file()),
      "optimizer": sum(x.nbytes for x in jax.tree.leaves(done.state.optimizer)),
      "temp": done.cost["temp"],
    },
    "flops": {"step": done.cost["flops"], "forward": evaluator.program.cost()["flops"]},
    "time": {
      "compile_s": done.compile_s,
      "step_ms": done.step_ms,
      "total_s": time.perf_counter() - started,
    },
    "loss": done.history.loss,
    "versions": {
      "python": platform.python_version(),
      **{name: sys.modules[name].__version__ for name in ("jax", "flax", "optax")},
    },
    "settings": run_options(args, steps),
    "scores": {"before": before, "after": after, "during": done.history.evaluations},
    "truncated": {"train": train_rows.truncated, "eval": eval_rows.truncated},
    "sample": sample or None,
    "writing": as_report(args, write_answers, writing) if args.write else None,
  }
  plot(out / "loss.png", report)
  write(out / "report.md", as_markdown(report))
  write(out / "report.json", json.dumps(report, indent=2) + "\n")  # last: it says all is there
  if not args.quiet:
    show(report, out)
  return report


def check_arguments(args: argparse.Namespace, demo: bool) -> None:
  """Completes defaults; raises for what cannot work."""
  if demo and args.train is None and args.task != "lm":
    raise ValueError(f"--model demo --task {args.task} needs --train and --eval")
  if not demo or args.train or args.eval:
    missing = [name for name in ("train", "eval") if getattr(args, name) is None]
    if missing:
      raise ValueError(f"--{missing[0]} is missing: training needs a --train and an --eval file")
  if args.write and args.task not in WRITE:
    raise ValueError(
      f"--write: a model of --task {args.task} writes nothing; it needs lm or seq2seq"
    )
  if args.write is None:
    args.write = WRITE.get(args.task, 0)
  if args.general and args.task != "lm":
    raise ValueError("--general compares losses of language models: it needs --task lm")
  if args.out is None:
    if not demo:
      raise ValueError("--out is missing: the folder to write")
    args.out = "runs/demo"
  if args.resume and args.overwrite:
    raise ValueError("--resume and --overwrite exclude each other")
  if args.steps and args.epochs:
    raise ValueError("--steps and --epochs exclude each other")
  if args.write < 0:
    raise ValueError(f"--write {args.write}: expected 0 or more prompts")
  for name in ("steps", "epochs", "batch", "accumulate", "length", "lr", "beams", "new_tokens"):
    value = getattr(args, name)
    if value is not None and not value > 0:
      raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
  if demo and not args.train:
    for name in ("steps", "batch", "length"):
      if getattr(args, name) is None and not (name == "steps" and args.epochs):
        setattr(args, name, DEMO[name])
    if args.method == "lora" and args.lr is None:
      args.lr = DEMO["lr"]
    if args.method == "lora" and not args.set:
      args.set = list(DEMO["set"])
  args.batch = args.batch or BATCHES[args.task]
  if not args.steps:
    args.epochs = args.epochs or EPOCHS[args.task]
  args.lr = args.lr or RATES.get(args.method, OTHER_RATES)[args.task]
  if args.batch % args.accumulate:
    raise ValueError(f"--accumulate {args.accumulate} does not divide --batch {args.batch}")


def build_method(args: argparse.Namespace) -> pelt.Transform:
  """The method with its options, and the task's head beside it."""
  known = [name for name in METHODS if hasattr(pelt, name)]
  if args.method not in known:
    raise ValueError(f"--method {args.method}: unknown; known are {', '.join(known)}")
  factory = getattr(pelt, args.method)
  options = typed_options(args.method, factory, args.set)
  method = factory(**options)
  if args.task not in WRITE and args.method != "full":
    parts = [method, pelt.train("head")]
    # Trained jointly, the backbone is all that nothing else claimed before.
    method = pelt.chain(*(parts[::-1] if options.get("tune_backbone") else parts))
  return method


def typed_options(method: str, factory, settings: list[str]) -> dict:
  """`KEY=VALUE` texts as the factory's signature wants them."""
  parameters = inspect.signature(factory).parameters
  kinds = typing.get_type_hints(factory)
  values = {}
  for setting in settings:
    name, equals, text = setting.partition("=")
    if not equals:
      raise ValueError(f"--set {setting}: expected KEY=VALUE")
    if name not in parameters:
      options = ", ".join(f"{n}={p.default!r}" for n, p in parameters.items())
      raise ValueError(f"--set {name}: {method} has no such option; it has {options or 'none'}")
    values[name] = typed(setting, text, kinds.get(name, typing.Any))
  return values


def typed(setting: str, text: str, kind):
  """The value that `text` writes, if it is of that kind."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
  alternatives = alternatives_of(kind)
  if isinstance(value, str) and "," in value:
    value = tuple(part.strip() for part in value.split(",") if part.strip())
  for wanted in alternatives:
    if fits(value, wanted):
      return float(value) if wanted is float else value
    if not isinstance(value, str | tuple | list) and fits((value,), wanted):
      return (value,)  # layers=3
    if wanted is str and isinstance(value, int | float):
      return text
  names = " or ".join(getattr(k, "__name__", str(k)) for k in alternatives)
  raise ValueError(f"--set {setting}: expected {names}")


def alternatives_of(kind) -> list:
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return [one for part in typing.get_args(kind) for one in alternatives_of(part)]
  return [kind]


def fits(value, kind) -> bool:
  origin = typing.get_origin(kind) or kind
  if origin is typing.Any:
    return True
  if origin is typing.Literal:
    return value in typing.get_args(kind)
  if origin is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if origin is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if origin in (collections.abc.Iterable, collections.abc.Sequence):
    return isinstance(value, tuple | list)
  return isinstance(origin, type) and isinstance(value, origin)


def prepare(out: pathlib.Path, args: argparse.Namespace) -> None:
  """Makes the output folder; never mixes two runs in it."""
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out {out} is a file")
  if out.is_dir() and any(out.iterdir()) and not (args.resume or args.overwrite):
    raise ValueError(f"--out {out} is not empty: pass --resume to go on, or --overwrite")
  out.mkdir(parents=True, exist_ok=True)


def read_files(args: argparse.Namespace, demo: bool):
  """The examples to train on, to evaluate on, and of general text (or None)."""
  if demo:
    import demo as demo_files

    def text(name, content):
      return training.Examples(name, (training.Example(1, text=content),))

    general = text("standard library", demo_files.code()[1]) if args.task == "lm" else None
    if not args.train:
      before, held_out = demo_files.prose()
      return text("topics", before), text("held-out topics", held_out), general
  else:
    general = None
  if args.general:
    general = training.read(args.general, "lm")
  read = [training.read(path, args.task, args.columns) for path in (args.train, args.eval)]
  return *read, general


def as_report(
  args: argparse.Namespace, writer: training.Writer, writing: dict[str, list[str]]
) -> dict:
  """Scores of all answers, and some of the texts."""
  shown = range(0, len(writer.asked), max(1, -(-len(writer.asked) // SHOWN)))
  texts = [
    {
      "prompt": writer.asked[i].prompt,
      "reference": writer.asked[i].references[0],
      **{when: answers[i] for when, answers in writing.items()},
    }
    for i in shown
  ]
  scores = {when: writer.scores(answers) for when, answers in writing.items()}
  search = {"beams": args.beams, "new_tokens": args.new_tokens}
  return {"prompts": len(writer.asked), **search, "scores": scores, "texts": texts}


def fingerprint(*sets: training.Encoded) -> int:
  """A number that other data would change."""
  sums = 0
  for rows in sets:
    for row in rows.rows:
      for name in ("input_ids", "labels"):
        sums = zlib.crc32(row[name].tobytes(), sums)
  return sums


def run_options(args: argparse.Namespace, steps: int) -> dict:
  """What a resumed run has to share with the one it continues."""
  names = ("model", "train", "eval", "task", "method", "batch", "accumulate", "lr", "length")
  names += ("seed", "dtype", "scan", "best", "placement")
  return {name: getattr(args, name) for name in names} | {"set": sorted(args.set), "steps": steps}


PROMPT = 'The "with" statement '


def continuation(apply, params, tokenizer, virtual) -> str:
  """What the model writes after a prompt: drawn, since a small model's likeliest bytes repeat."""
  ids = jnp.array([[*virtual, tokenizer.bos, *tokenizer.encode(PROMPT).ids]], jnp.int32)
  made = training.generate(
    apply, params, ids, max_new_tokens=120, temperature=0.5, key=jax.random.key(0)
  )
  return PROMPT + tokenizer.decode(made.tokens[0].tolist())


if __name__ == "__main__":
  training.keep_freed_memory()
  try:
    main()
  except KeyboardInterrupt:
    print("stopped; the same command with --resume goes on from the last checkpoint")
    sys.exit(130)
  except (ValueError, OSError, training.Diverged) as error:
    if "--traceback" in sys.argv:
      raise
    sys.exit(f"error: {error}")
