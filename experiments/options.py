"""The main job's options: what they are, what fits together, what they default to."""

import argparse
import ast
import collections.abc
import inspect
import json
import math
import pathlib
import types
import typing

import jax

import pelt_jax as pelt
from pelt_jax import training
from pelt_jax._shardings import BATCH_AXES

# Peak learning rates. PEFT methods start from zero change and need larger ones than full training.
RATES = {
  "full": {"classification": 5e-5, "tagging": 5e-5, "lm": 5e-5, "seq2seq": 5e-5},
  "bitfit": {"classification": 2e-3, "tagging": 2e-3, "lm": 1e-3, "seq2seq": 1e-3},
  "lora": {"classification": 2e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4},
  "dora": {"classification": 2e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4},
  "lora_fa": {"classification": 4e-3, "tagging": 4e-3, "lm": 2e-3, "seq2seq": 2e-3},
  "adalora": {"classification": 5e-3, "tagging": 5e-3, "lm": 5e-3, "seq2seq": 5e-3},
  "qlora": {"classification": 2e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4},
  "prompt_tuning": {"classification": 3e-2, "tagging": 3e-2, "lm": 1e-2, "seq2seq": 3e-2},
  "p_tuning": {"classification": 1e-2, "tagging": 1e-2, "lm": 1e-3, "seq2seq": 1e-3},
  "prefix_tuning": {"classification": 2e-4, "tagging": 2e-4, "lm": 2e-4, "seq2seq": 2e-4},
  "p_tuning_v2": {"classification": 7e-3, "tagging": 1e-2, "lm": 5e-3, "seq2seq": 5e-3},
  "adapter": {"classification": 1e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4},
  "adapter_drop": {"classification": 1e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4},
  "mam": {"classification": 5e-4, "tagging": 5e-4, "lm": 5e-4, "seq2seq": 5e-4},
  "unipelt": {"classification": 5e-4, "tagging": 5e-4, "lm": 5e-4, "seq2seq": 5e-4},
  # These start from large parts of W.
  "pissa": {"classification": 5e-4, "tagging": 5e-4, "lm": 2e-4, "seq2seq": 2e-4},
  "olora": {"classification": 5e-4, "tagging": 5e-4, "lm": 2e-4, "seq2seq": 2e-4},
  # How far a step of one size moves a weight differs: vectors and factors of W want larger ones,
  # and MiSS, whose a has entries of 1, smaller ones.
  "ia3": {"classification": 8e-3, "tagging": 8e-3, "lm": 5e-3, "seq2seq": 3e-3},
  "vera": {"classification": 1e-2, "tagging": 1e-2, "lm": 5e-3, "seq2seq": 5e-3},
  "loha": {"classification": 5e-3, "tagging": 5e-3, "lm": 2e-3, "seq2seq": 2e-3},
  "lokr": {"classification": 5e-3, "tagging": 5e-3, "lm": 2e-3, "seq2seq": 2e-3},
  "miss": {"classification": 5e-4, "tagging": 5e-4, "lm": 2e-4, "seq2seq": 2e-4},
  "hira": {"classification": 5e-3, "tagging": 5e-3, "lm": 2e-3, "seq2seq": 2e-3},
}
# An MLP moves all that it makes at once, so it wants small steps, and its head larger ones; an LSTM
# wants larger ones than its head, and so do three small factors.
HEAD_RATES = {
  name: {"classification": 5e-3, "tagging": 5e-3}
  for name in ("prefix_tuning", "p_tuning", "mam", "unipelt")
} | {"adalora": {"classification": 1e-3, "tagging": 1e-3}}
OTHER_RATES = {"classification": 1e-3, "tagging": 1e-3, "lm": 5e-4, "seq2seq": 5e-4}
METHODS = (  # those that this version has
  *("full", "bitfit", "lora", "adalora", "dora", "pissa", "olora", "ia3", "vera", "loha", "lokr"),
  *("qlora", "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "adapter"),
  *("adapter_fusion", "adapter_drop", "mam", "unipelt", "design", "lora_fa", "miss", "hira"),
)
BATCHES = {"classification": 32, "tagging": 32, "lm": 8, "seq2seq": 16}
EPOCHS = {"classification": 3, "tagging": 3, "lm": 1, "seq2seq": 3}
WRITE = {"lm": 0, "seq2seq": 64}  # held-out prompts to answer
VIRTUAL = ("prompt_tuning", "p_tuning")  # those with virtual tokens
# The demo's model is tiny and its task far away: more capacity, larger steps.
DEMO = {"steps": 200, "batch": 16, "length": 128, "lr": 5e-3, "set": ("targets=all-linear",)}


def parse(argv: list[str] | None, about: str | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=about, formatter_class=argparse.RawDescriptionHelpFormatter
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
  add("--adapters", metavar="NAME=DIR,...", help="of other tasks, for --method adapter_fusion")
  add("--epochs", type=int)
  add("--steps", type=int, help="instead of --epochs")
  add("--batch", type=int, help="rows per optimizer step")
  add("--accumulate", type=int, default=1, help="parts of a batch, run one after another")
  add("--placement", default="start", choices=training.PLACEMENTS, help="of virtual tokens")
  add("--template", help="instead: '{p:3} {text} It was {p:3} [MASK].' (classification)")
  add("--verbalizer", help="a word per class for [MASK]: neg=bad,pos=good|great, JSON or its file")
  add("--init-text", metavar="TEXT", help="a prompt starts from these words")
  add("--lr", type=float, help="peak learning rate")
  add("--head-lr", type=float, help="of the head, where it is another")
  add("--length", type=int, help="tokens per row; longer examples are cut")
  add(
    "--write", type=int, help="answer that many prompts of --eval and score the texts (lm, seq2seq)"
  )
  add("--beams", type=int, default=1, help="of the search for answers; 1 is greedy")
  add("--new-tokens", type=int, default=64, help="longest answer")
  add("--seed", type=int, default=0)
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the frozen model")
  add("--quantize", choices=("nf4", "fp4"), help="the frozen linear layers in 4 bits, any method")
  add("--scan", action="store_true", help="compile one layer instead of all")
  add(
    "--remat",
    nargs="?",
    const=True,
    default=False,
    choices=("offload",),
    help="save memory by computing activations again; 'offload': from what the host's memory keeps",
  )
  add("--paged", action="store_true", help="keep the optimizer's large arrays in host memory")
  add("--best", action="store_true", help="keep the best evaluation's adapter, not the last")
  add("--mesh", help="data=2,model=4")
  add(
    "--moments",
    type=lambda text: tuple(text.split(",")),
    default=(),
    help="mesh axes that the optimizer's moments are split over besides: data,fsdp",
  )
  add("--distributed", action="store_true", help="several processes; needs --mesh")
  add("--resume", action="store_true", help="go on where --out stopped")
  add("--overwrite", action="store_true", help="replace what an earlier run left in --out")
  add("--traceback", action="store_true", help="show where an error arose")
  add("--quiet", action="store_true", help="no progress bar, no summary")
  add("--out", help="folder to write (runs/demo for the demo)")
  return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace, demo: bool) -> None:
  """Completes defaults; raises for what cannot work."""
  if demo and args.train is None and args.task != "lm":
    raise ValueError(f"--model demo --task {args.task} needs --train and --eval")
  if not demo or args.train or args.eval:
    missing = [name for name in ("train", "eval") if getattr(args, name) is None]
    if missing:
      raise ValueError(f"--{missing[0]} is missing: training needs a --train and an --eval file")
  check_template(args)
  check_adapters(args)
  if args.placement != "start" and args.method not in VIRTUAL:
    raise ValueError(
      f"--placement {args.placement}: --method {args.method} has no virtual tokens to place"
    )
  if args.write and args.task not in WRITE:
    raise ValueError(
      f"--write: a model of --task {args.task} writes nothing; it needs lm or seq2seq"
    )
  if args.write is None:
    args.write = WRITE.get(args.task, 0)
  if args.general and args.task != "lm":
    raise ValueError("--general compares losses of language models: it needs --task lm")
  if args.quantize and args.method in ("qlora", "full"):
    why = "quantizes by itself: --set book=fp4" if args.method == "qlora" else "trains every weight"
    raise ValueError(f"--quantize {args.quantize}: --method {args.method} {why}")
  if args.quantize and "tune_backbone=true" in (s.lower() for s in args.set):
    raise ValueError(f"--quantize {args.quantize}: --set tune_backbone=true trains every weight")
  if args.out is None:
    if not demo:
      raise ValueError("--out is missing: the folder to write")
    args.out = "runs/demo"
  if args.resume and args.overwrite:
    raise ValueError("--resume and --overwrite exclude each other")
  for name in ("distributed", "moments"):
    if getattr(args, name) and not args.mesh:
      raise ValueError(f"--{name} needs --mesh, such as --mesh data=2,fsdp=4")
  if args.steps and args.epochs:
    raise ValueError("--steps and --epochs exclude each other")
  if args.beams != 1 and not args.write:
    raise ValueError(f"--beams {args.beams}: nothing is written; it goes with --write")
  if args.write < 0:
    raise ValueError(f"--write {args.write}: expected 0 or more prompts")
  for name in (
    "steps",
    "epochs",
    "batch",
    "accumulate",
    "length",
    "lr",
    "head_lr",
    "beams",
    "new_tokens",
  ):
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
  if args.head_lr is None and args.lr is None:
    args.head_lr = HEAD_RATES.get(args.method, {}).get(args.task)
  if args.lr is None:  # of LoRA+, b's rate is above LoRA's and a's below
    args.lr = RATES.get(args.method, OTHER_RATES)[args.task] / (ratio_of(args) or 1) ** 0.5
  if args.batch % args.accumulate:
    raise ValueError(f"--accumulate {args.accumulate} does not divide --batch {args.batch}")


def check_mesh(args: argparse.Namespace) -> jax.sharding.Mesh | None:
  """The mesh of args.mesh; raises for a batch and moments that it cannot share out."""
  if not args.mesh:
    return None
  try:
    mesh = training.make_mesh(args.mesh)
  except ValueError as error:
    raise ValueError(f"--{error}") from error  # "mesh 'data=8' needs 8 devices"
  if unknown := [name for name in args.moments if name not in mesh.shape]:
    raise ValueError(
      f"--moments {','.join(args.moments)}: --mesh {args.mesh} has no {', '.join(unknown)}; take "
      f"some of {','.join(mesh.shape)}"
    )
  sharing = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
  if args.batch // args.accumulate % sharing:
    parts = f" in --accumulate {args.accumulate} parts" if args.accumulate > 1 else ""
    raise ValueError(
      f"--batch {args.batch}{parts} does not divide over the {sharing} devices that share rows in "
      f"--mesh {args.mesh}: take a multiple of {args.accumulate * sharing}"
    )
  return mesh


def check_template(args: argparse.Namespace) -> None:
  """Makes a `Template` of args.template and a dict of args.verbalizer."""
  prompts = args.method in VIRTUAL
  if args.init_text is not None and not args.init_text.strip():
    raise ValueError("--init-text is empty: give the words that the prompt starts from")
  if args.init_text is not None and not prompts:
    raise ValueError(f"--init-text is for {' and '.join(VIRTUAL)}, not for {args.method}")
  if args.template is None:
    if args.verbalizer is not None:
      raise ValueError("--verbalizer needs a --template with [MASK], the place of its words")
    return
  if args.task != "classification":
    raise ValueError(f"--template is for --task classification, not for {args.task}")
  if args.placement != "start":
    raise ValueError("--template says where virtual tokens stand: leave --placement out")
  args.template = training.Template(args.template)
  slots = args.template.virtual
  if bool(slots) != prompts:
    raise ValueError(
      f"--template {args.template.source!r} has slots for {slots} virtual tokens, and --method "
      f"{args.method} makes {'some: write them as {p:3}' if prompts else 'none'}"
    )
  if args.template.blank != (args.verbalizer is not None):
    raise ValueError(
      "--template with [MASK] and --verbalizer go together: the blank is filled by a word per class"
    )
  if args.verbalizer is not None:
    args.verbalizer = read_verbalizer(args.verbalizer)
  if slots and not any(setting.startswith("length=") for setting in args.set):
    args.set = [*args.set, f"length={slots}"]


def check_adapters(args: argparse.Namespace) -> None:
  """Makes a dict of args.adapters, each folder with its labels and task."""
  if (args.method == "adapter_fusion") != (args.adapters is not None):
    raise ValueError("--method adapter_fusion and --adapters NAME=DIR,... go together")
  if args.adapters is None:
    return
  found: dict[str, pathlib.Path] = {}
  for part in args.adapters.split(","):
    name, equals, folder = part.partition("=")
    if not equals or not name or name in found:
      raise ValueError(f"--adapters {args.adapters}: expected NAME=DIR,NAME=DIR, each name once")
    found[name] = pathlib.Path(folder)
    if not found[name].is_dir():
      raise ValueError(f"--adapters: {folder} is no folder of an adapter")
  args.adapters = found


def read_verbalizer(text: str) -> dict[str, str | list[str]]:
  """Words by class, from JSON, its file, or `class=word|word,class=word`."""
  if not text.lstrip().startswith("{"):
    if "=" in text:
      pairs = [part.partition("=") for part in text.split(",")]
      words: dict[str, str | list[str]] = {k.strip(): v.split("|") for k, _, v in pairs}
      if len(words) < len(pairs):
        raise ValueError(f"--verbalizer {text}: a class comes twice; part its words by |")
      return words
    if not pathlib.Path(text).is_file():
      raise ValueError(f"--verbalizer {text}: no such file, and not of the form class=word")
    text = pathlib.Path(text).read_text(encoding="utf-8")
  try:
    words = json.loads(text)
  except ValueError as error:
    raise ValueError(f"--verbalizer: not JSON: {error}") from error
  of_words = lambda v: (
    isinstance(v, str) or (isinstance(v, list) and all(isinstance(w, str) for w in v))
  )
  if not (isinstance(words, dict) and all(map(of_words, words.values()))):
    raise ValueError('--verbalizer: expected {"class": "word" or ["word", ...], ...}')
  return words


UNKNOWN_STEPS = 10**9  # before the data are read
HEAD = "head"  # the group of a head with a rate of its own


def starts_from(args: argparse.Namespace) -> str | None:
  """What a prompt starts from that needs the tokenizer: "text", "labels" or nothing."""
  if args.method not in VIRTUAL:
    return None
  init = next((s.partition("=")[2] for s in args.set if s.startswith("init=")), None)
  if args.init_text is not None and init not in (None, "text"):
    raise ValueError(f"--init-text starts the prompt from a text; --set init={init} from another")
  if init == "text" and args.init_text is None:
    raise ValueError("--set init=text needs the text: pass --init-text")
  if init == "labels" and args.task in WRITE:
    raise ValueError(f"--set init=labels: --task {args.task} has no classes; pass --init-text")
  return "text" if args.init_text is not None else init if init == "labels" else None


def build_method(
  args: argparse.Namespace,
  tokens: typing.Any = None,
  members: dict | None = None,
  steps: int | None = None,
) -> pelt.Transform:
  """The method with its options, and the task's head beside it.

  Without `tokens` (a prompt that starts from words), `members` (adapters to fuse) or `steps` (of a
  method with a schedule) it only checks the other options.
  """
  known = [name for name in METHODS if hasattr(pelt, name)]
  if args.method not in known:
    raise ValueError(f"--method {args.method}: unknown; known are {', '.join(known)}")
  factory = getattr(pelt, args.method)
  settings = [s for s in args.set if ratio_of(args) is None or not s.startswith("ratio=")]
  options = typed_options(args.method, factory, settings)
  if options.get("plus"):
    raise ValueError("--set plus=true: say how much faster b learns instead, --set ratio=16")
  if settings != args.set:
    options["plus"] = True
  if init := starts_from(args):
    stand_in = [[0]] if init == "labels" else [0]
    options |= {"init": init, "tokens": stand_in if tokens is None else tokens}
  if scheduled(args):
    if "steps" in options:
      raise ValueError(f"--set steps={options['steps']}: pass the run's length as --steps")
    options["steps"] = steps or args.steps or UNKNOWN_STEPS
  if args.adapters is not None:
    stand_in = {"bypass": pelt.nodes.After(pelt.nodes.Bottleneck())}
    options["adapters"] = members or dict.fromkeys(args.adapters, stand_in)
  try:
    inspect.signature(factory).bind(**options)
  except TypeError as error:
    raise ValueError(f"--method {args.method}: {error}; pass it as --set NAME=VALUE") from error
  method = factory(**options)
  if args.task not in WRITE and args.method != "full" and args.verbalizer is None:
    head = pelt.train("head", group="trainable" if args.head_lr is None else HEAD)
    parts = [method, head]
    # Trained jointly, the backbone is all that nothing else claimed before.
    method = pelt.chain(*(parts[::-1] if options.get("tune_backbone") else parts))
  return method


def scheduled(args: argparse.Namespace) -> bool:
  """Whether the method has a schedule over the run's steps."""
  return "steps" in inspect.signature(getattr(pelt, args.method)).parameters


def ratio_of(args: argparse.Namespace) -> float | None:
  """LoRA+'s rate of b over that of a, for methods that have these."""
  found = next((s for s in args.set if s.startswith("ratio=")), None)
  factory = getattr(pelt, args.method, None)
  if found is None or factory is None or "plus" not in inspect.signature(factory).parameters:
    return None
  ratio = typed(found, found.partition("=")[2], float)
  if not ratio >= 1:
    raise ValueError(f"--set {found}: expected a number of at least 1")
  return ratio


def quantizing(args: argparse.Namespace, method: pelt.Transform) -> pelt.Transform | None:
  """What turns weights into codes while they are read, so that no whole model is ever held."""
  if args.method == "qlora":
    return method
  return pelt.nf4(book=args.quantize, double_quant=True) if args.quantize else None


def typed_options(method: str, factory, settings: list[str]) -> dict:
  """`KEY=VALUE` texts as the factory's signature wants them."""
  parameters = inspect.signature(factory).parameters
  kinds = typing.get_type_hints(factory)
  more = [n for n, p in parameters.items() if p.kind is p.VAR_KEYWORD]  # checked by the factory
  values = {}
  for setting in settings:
    name, equals, text = setting.partition("=")
    if not equals:
      raise ValueError(f"--set {setting}: expected KEY=VALUE")
    if name in more or (name not in parameters and not more):
      plain = {n: p.default for n, p in parameters.items() if n not in more}
      options = ", ".join(
        n if v is inspect.Parameter.empty else f"{n}={v!r}" for n, v in plain.items()
      )
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
  names = " or ".join(map(named, alternatives))
  raise ValueError(f"--set {setting}: expected {names}")


def named(kind) -> str:
  """What a kind of value is called in a message."""
  if typing.get_origin(kind) is typing.Literal:
    return " or ".join(map(repr, typing.get_args(kind)))
  return {bool: "true or false", type(None): "none"}.get(kind, getattr(kind, "__name__", str(kind)))


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


def run_options(args: argparse.Namespace, steps: int) -> dict:
  """What a resumed run has to share with the one it continues."""
  names = (
    "model",
    "train",
    "eval",
    "task",
    "method",
    "batch",
    "accumulate",
    "lr",
    "head_lr",
    "length",
  )
  names += ("seed", "dtype", "scan", "best", "quantize", "placement", "verbalizer", "init_text")
  template = args.template and args.template.source
  adapters = args.adapters and {name: str(folder) for name, folder in args.adapters.items()}
  return {name: getattr(args, name) for name in names} | {
    "template": template,
    "adapters": adapters,
    "set": sorted(args.set),
    "steps": steps,
  }
