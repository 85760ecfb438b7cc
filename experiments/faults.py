"""What becomes of a run of several processes when something breaks.

    python experiments/faults.py --out experiments/results

The main job trains a small model in one process, undisturbed. Then in one, two and four real
processes on this machine: they are killed, ended by SIGTERM, one of them is lost, the disk fills
up, a checkpoint is truncated or a part of it deleted. Each run is started again with --resume, on
another number of processes where that makes sense, and its losses are compared with those of the
undisturbed run. The full disk is a small tmpfs, which takes root.
"""

import argparse
import contextlib
import datetime
import json
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tokenizers
from processes import Processes
from reporting import write

from pelt_jax import models

MODEL = {
  "model_type": "llama",
  "vocab_size": 259,
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
  "initializer_range": 0.05,
}
ROWS, BATCH, EPOCHS = 24, 8, 20
INTERVAL = ROWS // BATCH  # steps from one checkpoint to the next: an epoch
STEPS = INTERVAL * EPOCHS
MESHES = {1: None, 2: "fsdp=2", 4: "fsdp=2,model=2"}
TOLERANCE = 1e-5  # relative; sums in another order


def tokenizer() -> tokenizers.Tokenizer:
  """Bytes, without merges."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE({token: i for i, token in enumerate([*alphabet, "</s>"])}, [])
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(["</s>"])
  return made


class Run(Processes):
  """The job's processes, and where they write."""

  def __init__(self, out: pathlib.Path, *args, **settings: str):
    self.out = out
    super().__init__(*args, **settings)


class Lab:
  """Runs of the same job."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    model = models.from_config(MODEL)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    (folder / "model").mkdir()
    models.save_pretrained(folder / "model", model, params)
    tokenizer().save(str(folder / "model" / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "</s>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    rows = [f"{i}: the cat sat on mat number {i * i}, and then on {7 * i}. " for i in range(ROWS)]
    lines = [{"prompt": row[:12], "completion": row[12:]} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    self.whole = self.finished(self.start("whole", 1))["loss"]

  def start(self, name: str, count: int) -> Run:
    data = str(self.folder / "data.jsonl")
    options = {"model": self.folder / "model", "train": data, "eval": data, "batch": BATCH}
    options |= {"epochs": EPOCHS, "task": "lm", "length": 64, "lr": 0.01}
    options |= {"set": "dropout=0.1", "out": self.folder / name}
    command = ["experiments/finetune.py", "--resume"]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    if count > 1:
      command += ["--mesh", str(MESHES[count]), "--distributed"]
    settings = {
      "PYTHONUNBUFFERED": "1",
      "FORCE_COLOR": "1",
      "TTY_INTERACTIVE": "1",
      "TERM": "xterm",
      "COLUMNS": "160",
    }
    settings["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / "cache")
    settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return Run(self.folder / name, command, count, **settings)

  def finished(self, jobs: Run) -> dict:
    """The report of a run that is left to itself; `first` is the step it started from."""
    codes = jobs.wait()
    if any(codes):
      raise RuntimeError("\n".join(jobs.texts()))
    report = json.loads((jobs.out / "report.json").read_text())
    return report | {"first": resumed(jobs)}

  def difference(self, report: dict) -> float:
    """The largest relative difference of a step's loss from the undisturbed run's."""
    pairs = zip(report["loss"], self.whole, strict=True)
    return max(abs(a - b) / abs(b) for (_, a), (_, b) in pairs)


def shown(jobs: Run) -> list[int]:
  """The steps that the progress bar of the first process showed."""
  return [int(n) for n in re.findall(rf"(\d+)/{STEPS}\b", jobs.texts()[0])] or [0]


def resumed(jobs: Run) -> int | None:
  """The step that the run went on from; None if it was ended before that."""
  text = jobs.texts()[0]
  found = re.search(r"resuming at step (\d+)", text)
  return int(found[1]) if found else 0 if "starting anew" in text else None


def complete(folder: pathlib.Path) -> int:
  """The step of the newest complete checkpoint."""
  return max((int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()), default=0)


def writing(folder: pathlib.Path) -> set[tuple[int, int]]:
  """Checkpoints that are not complete: their steps, and what tells one from the next try."""
  found = set()
  for path in folder.glob("checkpoints/*.orbax-checkpoint-tmp*"):
    with contextlib.suppress(FileNotFoundError):  # it is complete by now
      found.add((int(path.name.partition(".")[0]), path.stat().st_ino))
  return found


def until(jobs: Run, condition: Callable[[], bool], timeout: float = 300) -> None:
  end = time.monotonic() + timeout
  while not condition():
    if time.monotonic() > end or all(job.poll() is not None for job in jobs.jobs):
      raise RuntimeError("the run ended before the fault:\n" + "\n".join(jobs.texts()))
    time.sleep(0.002)


def ended(jobs: Run) -> str:
  """The last line that a process wrote about its end."""
  told = [re.sub(r"\x1b\[[\d;?]*\w", "", text) for text in jobs.texts()]
  lines = [line for text in told for line in text.splitlines()]
  marked = [line for line in lines if line.startswith(("error:", "stopped by"))]
  return marked[-1].replace(f"{jobs.out.parent}/", "") if marked else ""


def row(fault: str, counts: str, happened: str, at: int, report: dict, lab: Lab, **more) -> dict:
  found = {
    "fault": fault,
    "processes": counts,
    "happened": happened,
    "reached": at,
    "resumed_from": report["first"],
    "steps_lost": max(0, at - report["first"]),
    "difference": lab.difference(report),
    **more,
  }
  print(json.dumps(found), flush=True)
  return found


def killed_while_saving(lab: Lab, seed: int) -> dict:
  """Five kills of all processes, each while a checkpoint is written, each time another number."""
  rng, counts = random.Random(seed), (2, 1, 4, 2, 1, 2)
  folder, kills = lab.folder / "killed", []
  for number, count in enumerate(counts[:-1]):
    left = writing(folder)  # by the one before
    jobs, target = lab.start("killed", count), complete(folder) + rng.randint(0, 1) * INTERVAL
    begun = lambda s=target, jobs=jobs, left=left: (
      resumed(jobs) is not None and any(step > s for step, _ in writing(folder) - left)
    )
    until(jobs, begun)
    time.sleep(rng.uniform(0, 0.05))
    saved = complete(folder)
    jobs.kill()
    kills.append({"saved": saved, "reached": max(shown(jobs)), "processes": count})
    if number:
      kills[-2]["resumed_from"] = resumed(jobs)
  report = lab.finished(lab.start("killed", counts[-1]))
  kills[-1]["resumed_from"] = report["first"]
  if any(kill["resumed_from"] < kill["saved"] for kill in kills):
    raise RuntimeError(f"a checkpoint was lost: {kills}")
  lost = max(kill["reached"] - kill["resumed_from"] for kill in kills)
  found = row(
    "kill -9 of all, 5 times, while a checkpoint is written",
    " → ".join(map(str, counts)),
    "no checkpoint that was complete is lost",
    kills[-1]["reached"],
    report,
    lab,
    kills=kills,
    seed=seed,
  )
  return found | {"steps_lost": max(0, lost)}


def signalled(lab: Lab, name: str, number: signal.Signals, before: int, after: int) -> dict:
  """One of several processes gets a signal."""
  jobs = lab.start(name, before)
  until(jobs, lambda: complete(jobs.out) >= 3 * INTERVAL)
  began = time.monotonic()
  jobs.jobs[-1].send_signal(number)
  codes = jobs.wait()
  seconds, at = time.monotonic() - began, max(shown(jobs))
  told = ended(jobs)
  if number == signal.SIGTERM:
    shutil.copytree(jobs.out, lab.folder / "stopped")
    at = complete(jobs.out)  # the step that is saved is the last that was done
    happened, fault = f"all saved step {at} and ended", "SIGTERM to one process"
  else:
    happened = f"the others ended after {seconds:.0f} s with an error"
    fault = "kill -9 of one process, or its loss"
  report = lab.finished(lab.start(name, after))
  happened += f", exit codes {', '.join(map(str, codes))}"
  return row(fault, f"{before} → {after}", happened, at, report, lab, told=told)


def damaged(lab: Lab, fault: str, damage: Callable[[pathlib.Path], None]) -> dict:
  """The newest checkpoint of a stopped run is damaged, then removed as the error asks."""
  name = fault.replace(" ", "-")
  out = lab.folder / name
  shutil.copytree(lab.folder / "stopped", out)
  newest = complete(out)
  arrays = out / "checkpoints" / str(newest) / "arrays"
  damage(max((p for p in arrays.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
  jobs = lab.start(name, 1)
  codes, told = jobs.wait(), ended(jobs)
  if not any(codes) or f"{newest} is damaged" not in told:
    raise RuntimeError(f"{fault} went unnoticed: {codes} {told}")
  shutil.rmtree(out / "checkpoints" / str(newest))
  report = lab.finished(lab.start(name, 2))
  happened = "--resume names the damaged checkpoint and the one before it, which it goes on from "
  return row(
    fault, "2 → 1 → 2", happened + "once the first is removed", newest, report, lab, told=told
  )


def full_disk(lab: Lab) -> dict:
  """The output folder's disk fills up during training."""
  out = lab.folder / "full"
  out.mkdir()
  subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(out)], check=True)
  try:
    jobs, ballast = lab.start("full", 2), out / "ballast"
    until(jobs, lambda: complete(out) >= 3 * INTERVAL)
    size = shutil.disk_usage(out).free
    with contextlib.suppress(OSError):  # as much as goes in
      ballast.write_bytes(bytes(size + (1 << 20)))
    codes, told, at = jobs.wait(), ended(jobs), max(shown(jobs))
    if not any(codes) or "disk is full" not in told:
      raise RuntimeError(f"a full disk went unnoticed: {codes} {told}")
    ballast.unlink()
    report = lab.finished(lab.start("full", 1))
    happened = f"all ended with an error that says so, exit codes {', '.join(map(str, codes))}"
    return row("full disk", "2 → 1", happened, at, report, lab, told=told)
  finally:
    subprocess.run(["umount", "-l", str(out)], check=True)


def as_markdown(found: dict) -> str:
  lines = [
    "| {fault} | {processes} | {happened} | {steps_lost} | {difference:.1e} |".format(**r)
    for r in found["faults"]
  ]
  return "\n".join(
    [
      "# Faults\n",
      f"{found['date']}, jax {found['jax']}, Python {found['python']}. {STEPS} steps, a "
      f"checkpoint every {INTERVAL}. Steps lost are those computed again, as the progress bar "
      "showed them; the difference is the largest of any step's loss from one process without a "
      "fault. "
      f"Without one, two and four processes differ by {max(found['undisturbed'].values()):.1e}.\n",
      "| injected | processes, before → after | what happened | steps lost | difference |",
      "|---|---|---|---|---|",
      *lines,
      "",
    ]
  )


def main(argv: list[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    lab = Lab(pathlib.Path(folder))
    same = {}
    for count in (2, 4):
      same[count] = lab.difference(lab.finished(lab.start(f"same{count}", count)))
      print(f"{count} processes: {same[count]:.1e}", flush=True)
    faults = [
      killed_while_saving(lab, args.seed),
      signalled(lab, "term", signal.SIGTERM, 2, 1),
      signalled(lab, "lost", signal.SIGKILL, 4, 2),
      damaged(lab, "truncated checkpoint", lambda p: p.write_bytes(p.read_bytes()[:-64])),
      damaged(lab, "missing shard of a checkpoint", lambda p: p.unlink()),
      full_disk(lab),
    ]
  found = {
    "date": datetime.date.today().isoformat(),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "steps": STEPS,
    "interval": INTERVAL,
    "undisturbed": same,
    "faults": faults,
  }
  print(as_markdown(found))
  if args.out:
    write(args.out / "faults.json", json.dumps(found, indent=1) + "\n")
    write(args.out / "faults.md", as_markdown(found))
  worst = max(*same.values(), *(fault["difference"] for fault in faults))
  if worst > TOLERANCE:
    raise SystemExit(f"losses differ by {worst:.1e}")
  return found


if __name__ == "__main__":
  main()
