"""What the real runs share: methods with their options and rates, tasks with their files."""

import dataclasses
import pathlib

import options

VIRTUAL = 10  # tokens of a prompt, rows of a prefix


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A method of the main job with its options."""

  method: str
  options: tuple[str, ...] = ()

  @property
  def room(self) -> int:
    """Positions that virtual tokens take on top of the text's."""
    return VIRTUAL * (self.method in options.VIRTUAL)

  def arguments(self) -> list[str]:
    """For the main job."""
    return ["--method", self.method, *(part for o in self.options for part in ("--set", o))]


LENGTH = f"length={VIRTUAL}"
PROMPTS = {
  name: Recipe(name, (LENGTH,))
  for name in ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2")
}
ADAPTERS = {
  "houlsby": Recipe("adapter", ("style=houlsby", "reduction=16")),
  "pfeiffer": Recipe("adapter", ("style=pfeiffer", "reduction=16")),
  "parallel": Recipe("adapter", ("style=scaled_parallel", "reduction=2")),
  "mam": Recipe("mam", (LENGTH, "bottleneck=192", "hidden=512")),
  "unipelt": Recipe("unipelt", (LENGTH, "rank=8", "reduction=16", "hidden=512")),
}
# A row of the unified view's table that no paper has.
NEW = {
  "gated_parallel": Recipe(
    "design",
    ("form=relu", "insertion=parallel", "representation=ffn", "composition=gated", "size=192"),
  )
}
# torch PEFT's prompts start from tokens of the whole vocabulary, here of MiniLM's.
WHOLE = {"prompt_tuning_whole": Recipe("prompt_tuning", (LENGTH, "vocabulary=30522"))}
PLAIN = {name: Recipe(name) for name in ("lora", "full", "bitfit")}
# LoRA on every linear layer, over floats, over 4-bit codes, and trained for a merge into them.
QUANTIZED = {
  "lora_all": Recipe("lora", ("rank=8", "alpha=8", "targets=all-linear")),
  "qlora": Recipe("qlora", ("rank=8", "alpha=8")),
  "qlora_merge_aware": Recipe("qlora", ("rank=8", "alpha=8", "merge_aware=true")),
}
# Those beside LoRA that change every linear layer; AdaLoRA ends with the budget of lora_all.
ALL = "targets=all-linear"
FAMILY = {
  "adalora": Recipe("adalora", ("rank=12", "target_rank=8", ALL)),
  "lora_plus": Recipe("lora", ("rank=8", ALL, "ratio=16")),
  "ia3": Recipe("ia3"),
  "vera": Recipe("vera", ("rank=256", ALL)),
} | {
  name: Recipe(name, ("rank=8", ALL))
  for name in ("dora", "pissa", "olora", "lora_fa", "loha", "lokr", "miss", "hira")
}
RECIPES = FAMILY | QUANTIZED | PLAIN | PROMPTS | WHOLE | ADAPTERS | NEW


def rates(name: str, task: str) -> tuple[float, float]:
  """Peak learning rates of a method and of its head, those of the main job."""
  method = RECIPES[name].method
  rate = options.RATES.get(method, options.OTHER_RATES)[task]
  return rate, options.HEAD_RATES.get(method, {}).get(task, rate)


def tasks(data: pathlib.Path) -> dict[str, list[str]]:
  """The main job's arguments for data sets of small texts, by name; `data` holds their folders."""
  files = {
    "sst2": ("classification", "sst2/train.tsv", "sst2/test.tsv"),
    "trec": ("classification", "trec/TREC.train.all", "trec/TREC.test.all"),
    "wnut17": ("tagging", "wnut17/wnut17train.conll", "wnut17/emerging.test.annotated"),
  }
  more = {"sst2": ["--columns", "text,label"]}
  return {
    name: ["--task", task, "--train", f"{data}/{train}", "--eval", f"{data}/{test}"]
    + more.get(name, [])
    for name, (task, train, test) in files.items()
  }


LENGTHS = {"sst2": 64, "trec": 32, "wnut17": 96}  # of texts, in tokens
