"""Bytes that each of four processes reads of a checkpoint whose shards it loads.

    python experiments/load_shards.py --out experiments/results [--layers 18]

Writes a synthetic Llama checkpoint in bfloat16 (2 GB by default). Four real processes with a device
each then load it with `from_pretrained(shardings=training.model_shardings(mesh))`. What each
asked of the file is what the kernel counted for it (`rchar` of /proc/self/io), headers and JSON
included.
"""

import argparse
import datetime
import json
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from load_memory import make
from processes import Processes
from reporting import write

from pelt_jax import models, training

MESHES = ("fsdp=4", "model=4", "fsdp=2,model=2")
PROCESSES, ALLOWED = 4, 0.3  # of the file


def asked() -> int:
  """Bytes that this process has asked to read so far (Linux)."""
  lines = pathlib.Path("/proc/self/io").read_text().splitlines()
  return int(dict(line.split(": ") for line in lines)["rchar"])


def child(folder: str) -> list[dict]:
  """Loads the checkpoint on each mesh."""
  training.initialize_distributed()
  found = []
  for text in MESHES:
    where = training.model_shardings(training.make_mesh(text))
    where(*tiny())  # what is imported on the first call is no part of the checkpoint
    before, began = asked(), time.perf_counter()
    _, params = models.from_pretrained(folder, dtype=jnp.bfloat16, shardings=where)
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    held = sum(x.addressable_data(0).nbytes for x in leaves)
    seconds = time.perf_counter() - began
    found.append({"mesh": text, "read": asked() - before, "held": held, "seconds": seconds})
    del params, leaves
  return found


def tiny() -> tuple:
  sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
  model = models.from_config({"model_type": "llama", "num_hidden_layers": 1} | sizes)
  return model, jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]


def as_markdown(found: dict) -> str:
  rows = [
    "| {mesh} | {most:.1f} | {share:.3f} | {held:.1f} | {seconds:.1f} |".format(**row)
    for row in found["meshes"]
  ]
  return "\n".join(
    [
      f"# Loading by shards: a checkpoint of {found['file'] / 1e9:.2f} GB, four processes\n",
      f"{found['date']}, jax {found['jax']}, Python {found['python']}, "
      f"{found['layers']} layers. Read: by the process that read most, as the kernel counted.\n",
      "| mesh | MB read | of the file | MB held | seconds |",
      "|---|---|---|---|---|",
      *rows,
      "",
    ]
  )


def main(argv: list[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, default=18)
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--child", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.child:
    print(json.dumps(child(args.child)))
    return {}
  with tempfile.TemporaryDirectory() as folder:
    make(pathlib.Path(folder), args.layers)
    file = sum(f.stat().st_size for f in pathlib.Path(folder).glob("*.safetensors"))
    jobs = Processes([__file__, "--child", folder], PROCESSES)
    codes, texts = jobs.wait(), jobs.texts()
  for code, text in zip(codes, texts, strict=True):
    if code:
      raise RuntimeError(text)
  of_each = [json.loads(text.splitlines()[-1]) for text in texts]
  meshes = []
  for rows in zip(*of_each, strict=True):
    reads = [row["read"] for row in rows]
    summed = {
      "mesh": rows[0]["mesh"],
      "read": reads,
      "most": max(reads) / 1e6,
      "share": max(reads) / file,
      "held": max(row["held"] for row in rows) / 1e6,
      "seconds": max(row["seconds"] for row in rows),
    }
    meshes.append(summed)
  found = {
    "date": datetime.date.today().isoformat(),
    "jax": jax.__version__,
    "python": sys.version.split()[0],
    "layers": args.layers,
    "file": file,
    "meshes": meshes,
  }
  print(as_markdown(found))
  if args.out:
    write(args.out / "load_shards.json", json.dumps(found, indent=1) + "\n")
    write(args.out / "load_shards.md", as_markdown(found))
  if not all(row["share"] <= ALLOWED for row in meshes):
    raise SystemExit(f"a process read more than {ALLOWED} of the file")
  return found


if __name__ == "__main__":
  main()
