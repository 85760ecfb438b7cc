"""Fine-tunes a model with one method and reports what it gained, cost and forgot.

  python experiments/finetune.py                      # the demo: no arguments, no downloads
  python experiments/finetune.py --model MiniLM/ --task classification --method lora \
    --set rank=8 --train trec.train --eval trec.test --out runs/trec

Writes into --out: adapter/ (what was trained), report.json, report.md, loss.png, checkpoints/.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from options import (
  HEAD,
  RATES,
  WRITE,
  build_method,
  check_arguments,
  check_mesh,
  parse,
  quantizing,
  ratio_of,
  run_options,
  scheduled,
  starts_from,
)
from reporting import as_markdown, plot, plot_ranks, show, write

import pelt_jax as pelt
from pelt_jax import models, training

STOPPED = 143  # what a shell says of a process that SIGTERM ended: the run is not finished
SHOWN = 5  # of the answers, in the report
# These are noise until they are trained.
NOISE = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "mam", "unipelt")
WARMUP, DECAY, CLIP = 0.06, 0.01, 1.0  # of steps; of weights; of the gradient's norm
OUTPUTS = ("adapter", "checkpoints", "report.json", "report.md", "loss.png", "ranks.png")


def main(argv: list[str] | None = None) -> dict:
  started = time.perf_counter()
  args = parse(argv, __doc__)
  demo = args.model == "demo"
  check_arguments(args, demo)
  if args.distributed:
    training.initialize_distributed()
  chief = jax.process_index() == 0
  method = build_method(args)  # first: a wrong option should not cost a minute of loading
  quantizer = quantizing(args, method)
  template, asks = args.template, args.verbalizer is not None
  mesh, devices = check_mesh(args), jax.device_count()
  if mesh is not None and mesh.size < devices:
    if args.distributed:
      raise ValueError(
        f"--mesh {args.mesh}: expected all {devices} devices of {jax.process_count()} processes to "
        "be in it"
      )
    if not args.quiet:
      print(f"--mesh {args.mesh} uses {mesh.size} of {devices} devices", flush=True)
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
    task="cloze" if asks else args.task,
    num_labels=None if asks else len(labels) or None,
    dtype=jnp.dtype(args.dtype),
    scan=args.scan,
    remat=args.remat,
    transform=quantizer,
    shardings=None if mesh is None else training.model_shardings(mesh),
    key=jax.random.key(args.seed),
  )
  tokenizer = tokenizer or training.load_tokenizer(model.config.source)
  limit = model.config.max_position_embeddings
  if model.config.model_type == "t5":
    limit = None  # its positions are relative

  masked = isinstance(model, models.BertForMaskedLM | models.RobertaForMaskedLM)
  if masked and tokenizer.mask is None:
    raise ValueError(f"--verbalizer: the tokenizer of {args.model} names no mask_token")
  mask = tokenizer.mask if masked else False
  words = training.verbalizer(args.verbalizer, labels, tokenizer, template) if asks else None

  # Method: nodes inside the params.
  if init := starts_from(args):
    encoded = lambda text: tokenizer.encode(text).ids
    of_labels = words or [encoded(label) for label in labels]
    given = of_labels if init == "labels" else encoded(args.init_text)
    if template and init == "text" and len(given) > template.virtual:
      raise ValueError(
        f"--init-text: {len(given)} tokens, and the template has {template.virtual} slots"
      )
    method = build_method(args, given)
  if args.adapters:
    method = build_method(args, members=read_members(args, source))
  ids = jnp.zeros((args.batch, 8), jnp.int32)
  sites = pelt.sites(model, ids, jnp.ones_like(ids))
  # A quantizer that is the whole method left its nodes with the codes.
  came = quantizer is method
  params = base if came else method.init(jax.random.key(args.seed), base, sites)
  params = training.masters(params)
  virtual = pelt.virtual_tokens(params)
  if limit is not None and hasattr(model, "learned_positions"):
    limit = model.learned_positions - training.positions_taken(params)

  options = {"length": args.length, "limit": limit, "placement": args.placement}

  def encode(examples, task=args.task, virtual=virtual):
    written = template and (template if virtual else template.plain)
    return training.encode(
      examples,
      tokenizer,
      task,
      labels=labels,
      virtual=virtual,
      template=written,
      mask=mask,
      **options,
    )

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
  place, placing, gathered = None, {}, None
  if mesh is not None:
    jax.set_mesh(mesh)
    specs = training.base_specs(sites, mesh)
    gathered = pelt.gathered(params, specs, mesh)
    params = jax.device_put(params, pelt.shardings(params, specs, mesh))
    place = lambda batch: training.place_batch(batch, mesh)
    placing["out_shardings"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  if hasattr(model, "pooled_only") and not model.scan:
    model = model.clone(pooled_only=not means_over_rows(params))
  apply = pelt.bypass(model.apply, gathered=gathered)
  if words is not None:
    apply = training.cloze(apply, words)

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
  rates = {"backbone": RATES["full"][args.task], HEAD: args.head_lr}
  if ratio := ratio_of(args):
    rates |= {"lora_b": ratio * args.lr, "lora_embedding": 1e-6}  # LoRA+, as in pelt.lora_plus
  groups = {g: optax.scale(rates[g] / args.lr) for g in set(rates) & set(labels_of(params))}
  if groups:  # trained beside the method, each at its own rate
    groups["trainable"] = optax.identity()
    tx = optax.chain(tx, optax.multi_transform(groups, pelt.labels))
  if args.paged:
    tx = pelt.paged(tx)
  if scheduled(args):
    method = build_method(args, steps=steps)
  loss = training.LOSSES[args.task]
  train = training.train_step(apply, loss, tx, method, clip=CLIP, accumulate=args.accumulate)
  if mesh is not None:
    train = training.on_mesh(train, mesh, moments=args.moments)
  if args.overwrite:  # not before everything was found to be in order
    for name in OUTPUTS if chief else ():
      path = out / name
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if args.distributed:  # nobody looks for checkpoints before
      multihost_utils.sync_global_devices("overwritten")
  same = run_options(args, steps) | {"contents of the files": fingerprint(train_rows, eval_rows)}
  checkpoints = training.Checkpoints(out / "checkpoints", same)
  if args.resume and chief and not args.quiet:
    last, where = checkpoints.latest(), out / "checkpoints"
    found = (
      f"no checkpoint in {where}: starting anew" if last is None else f"resuming at step {last}"
    )
    print(found, flush=True)
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
  kept = pelt.fold(done.params)  # what made prompts and prefixes is in checkpoints/
  allotted = pelt.ranks(done.params) if args.method == "adalora" else None
  if allotted:
    kept = pelt.shrink(kept)
  pelt.save(out / "adapter", kept)  # all take part, the chief writes
  if not chief:
    return {}
  if labels:
    write(out / "adapter" / "labels.json", json.dumps(labels, indent=2) + "\n")
  if template:
    written = {"template": template.source, "verbalizer": args.verbalizer}
    write(out / "adapter" / "template.json", json.dumps(written, indent=2) + "\n")
  count, left = pelt.count(done.params, sites), pelt.count(kept, sites)
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
      **{name: getattr(count, name) for name in ("trainable", "head", "total")},
      **{name: getattr(left, name) for name in ("stored", "changed", "rank")},
    },
    "ranks": allotted,
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
    "settings": run_options(args, steps)
    | {name: getattr(args, name) for name in ("columns", "write", "beams", "new_tokens")},
    "scores": {"before": before, "after": after, "during": done.history.evaluations},
    "truncated": {"train": train_rows.truncated, "eval": eval_rows.truncated},
    "sample": sample or None,
    "writing": as_report(args, write_answers, writing) if args.write else None,
  }
  plot(out / "loss.png", report)
  if allotted:
    plot_ranks(out / "ranks.png", allotted)
  write(out / "report.md", as_markdown(report))
  write(out / "report.json", json.dumps(report, indent=2) + "\n")  # last: it says all is there
  if not args.quiet:
    show(report, out)
  return report


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


def means_over_rows(params) -> bool:
  """Whether gates read all tokens of a row, in the last layer too."""
  gate = lambda x: isinstance(x, pelt.nodes.MeanGate)
  return any(gate(x) and x.pool == "mean" for x in jax.tree.leaves(params, is_leaf=gate))


def labels_of(params: dict) -> list[str]:
  """The groups of the arrays."""
  return jax.tree.leaves(pelt.labels(params))


def read_members(args: argparse.Namespace, source: str) -> dict[str, dict]:
  """Params with the adapters of other runs, each over a model with that run's head."""
  members = {}
  for name, folder in args.adapters.items():
    file, beside = folder / "labels.json", folder.parent / "report.json"
    labels = json.loads(file.read_text()) if file.is_file() else None
    task = json.loads(beside.read_text())["task"] if beside.is_file() else args.task
    _, base = models.from_pretrained(
      source,
      task=task,
      num_labels=labels and len(labels),
      dtype=jnp.dtype(args.dtype),
      scan=args.scan,
    )
    members[name] = pelt.load(folder, base)
  return members


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


PROMPT = 'The "with" statement '


def continuation(apply, params, tokenizer, virtual) -> str:
  """What the model writes after a prompt: drawn, since a small model's likeliest bytes repeat."""
  ids = jnp.array([[*virtual, tokenizer.bos, *tokenizer.encode(PROMPT).ids]], jnp.int32)
  made = training.generate(
    apply, params, ids, max_new_tokens=120, temperature=0.5, key=jax.random.key(0)
  )
  return PROMPT + tokenizer.decode(made.tokens[0].tolist())


def fail(message: str) -> None:
  """Ends the process; one of several at once, or it would wait for those that are gone."""
  message = message.replace("; lower rank", "; lower rank (--set rank=N)")
  if jax.distributed.is_initialized():
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
  sys.exit(f"error: {message}")


if __name__ == "__main__":
  training.keep_freed_memory()
  try:
    main()
  except KeyboardInterrupt:
    print("stopped; the same command with --resume goes on from the last checkpoint")
    sys.exit(130)
  except training.Interrupted as stop:
    print(f"{stop} (the same command with --resume does)")
    sys.exit(STOPPED)
  except (ValueError, OSError, training.Diverged, jax.errors.JaxRuntimeError) as error:
    # Who is lost shows in a step, as the runtime's error, or between steps, as a ValueError.
    lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    if "--traceback" in sys.argv or (lost and not jax.distributed.is_initialized()):
      raise
    if lost:
      first = str(error).splitlines()[0]
      fail(f"{first}\nIf a process was lost, start all of them again, with --resume")
    fail(str(error))
