"""Memory that a quantized load takes at its peak, beside what it leaves.

    python experiments/load_memory.py --out experiments/results [--layers 18]

Writes a synthetic Llama checkpoint in bfloat16 (2 GB by default), loads it in a process of its own
with `from_pretrained(transform=pelt.nf4(double_quant=True))`, and compares the process's peak with
what the arrays take, the two largest tensors in float32, and what the process had before.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from reporting import write

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax._walk import walk
from pelt_jax.models._load import abstract_params
from pelt_jax.models._shards import insert

CONFIG = {
  "model_type": "llama",
  "vocab_size": 32000,
  "hidden_size": 2048,
  "intermediate_size": 5632,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "tie_word_embeddings": False,
}


def make(folder: pathlib.Path, layers: int, **sizes: int) -> None:
  """A checkpoint of random numbers."""
  model = models.from_config(CONFIG | sizes | {"num_hidden_layers": layers}, dtype=jnp.bfloat16)
  block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
  params: dict = {}
  for path, leaf in walk(abstract_params(model)):
    insert(params, path, np.resize(block, leaf.shape))
  models.save_pretrained(folder, model, params)


def peak() -> int:
  """The process's largest resident memory so far, in bytes (Linux)."""
  # Not getrusage's: that of a child starts from what its parent held.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def load(folder: str) -> tuple[int, float]:
  """Bytes of the arrays of a quantized load, and its seconds."""
  began = time.perf_counter()
  method = pelt.nf4(double_quant=True)
  _, params = models.from_pretrained(folder, dtype=jnp.bfloat16, scan=False, transform=method)
  leaves = jax.block_until_ready(jax.tree.leaves(params))
  return sum(x.nbytes for x in leaves), time.perf_counter() - began


def child(small: str, large: str) -> dict:
  load(small)  # what libraries, programs and the compiler take
  before = peak()
  size, seconds = load(large)
  return {"baseline": before, "arrays": size, "peak": peak(), "seconds": seconds}


def main(argv: list[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, default=18)
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.child:
    found = child(*args.child)
    print(json.dumps(found))
    return found
  with tempfile.TemporaryDirectory() as folder:
    small, large = (pathlib.Path(folder) / name for name in ("small", "large"))
    make(
      small,
      1,
      vocab_size=256,
      hidden_size=128,
      intermediate_size=256,
      num_attention_heads=2,
      num_key_value_heads=2,
    )
    make(large, args.layers)
    file = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    command = [sys.executable, __file__, "--child", str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  found = json.loads(done.stdout.splitlines()[-1])
  largest = 4 * CONFIG["vocab_size"] * CONFIG["hidden_size"]  # embedding and head
  found |= {"file": file, "two_largest": 2 * largest, "layers": args.layers}
  found["allowed"] = found["baseline"] + found["arrays"] + found["two_largest"]
  print(json.dumps(found, indent=1))
  if args.out:
    today = datetime.date.today().isoformat()
    settings = {"date": today, "jax": jax.__version__, "python": sys.version.split()[0]}
    write(args.out / "load_memory.json", json.dumps(settings | found, indent=1) + "\n")
  return found


if __name__ == "__main__":
  main()
