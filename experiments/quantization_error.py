"""What 4-bit code books lose: mean |w - w'| and mean (w - w')^2, on normal numbers and a model.

    python experiments/quantization_error.py [--model FOLDER] [--out experiments/results]

Blocks of 64 numbers share a scale, their largest magnitude. The row min–max is no code book: its
blocks have a zero point beside the scale. Writes quantization_error.json and .md.
"""

import argparse
import datetime
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from reporting import write

import pelt_jax as pelt
from pelt_jax.quantization import CODE_BOOKS, quantize

BLOCK, NUMBERS = 64, 1 << 24


def min_max(x: np.ndarray) -> np.ndarray:
  """Sixteen even steps from each block's least number to its largest."""
  blocks = x.reshape(-1, BLOCK)
  low = blocks.min(1, keepdims=True)
  step = (blocks.max(1, keepdims=True) - low) / 15
  step = np.where(step > 0, step, 1)
  return (low + step * np.round((blocks - low) / step)).reshape(x.shape)


WAYS = {name: {"book": name} for name in CODE_BOOKS} | {
  "nf4, double quantization": {"book": "nf4", "double_quant": True}
}


def errors(x: np.ndarray) -> dict[str, dict[str, float]]:
  """By way of quantizing; x is (n,), blocks run along it."""
  found = {}
  for name, options in WAYS.items():
    kernel = jnp.asarray(x)[:, None]
    there = np.asarray(quantize(kernel, block=BLOCK, **options).materialize())[:, 0]
    found[name] = there
  found["int4 min–max"] = min_max(x)
  return {
    name: {
      "l1": float(np.abs(y - x).mean(dtype=np.float64)),
      "mse": float(np.square(y - x).mean(dtype=np.float64)),
    }
    for name, y in found.items()
  }


def of_model(folder: str) -> dict[str, dict[str, float]]:
  """Over all linear layers, each divided by its standard deviation."""
  _, params = pelt.models.from_pretrained(folder, task="encoder")
  kernels = [
    np.asarray(value).T.reshape(-1)
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]
    if "kernel" in jax.tree_util.keystr(path) and value.ndim == 2
  ]
  return errors(np.concatenate([k / k.std() for k in kernels if k.size % BLOCK == 0]))


def markdown(results: dict) -> str:
  lines = ["# Errors of 4-bit code books\n"]
  lines.append(
    f"Blocks of {BLOCK}; {NUMBERS:,} normal numbers, seed 0; a model's kernels are divided"
  )
  lines.append("by their standard deviations. NF4 lower by: how much smaller NF4's error is.\n")
  for name, by in results["errors"].items():
    lines += [f"## {name}\n", "| way | mean abs. error | mean squared | NF4 lower by |"]
    lines.append("|---|---|---|---|")
    best = by["nf4"]
    for way, e in by.items():
      gain = " / ".join(f"{1 - best[k] / e[k]:.1%}" for k in ("l1", "mse"))
      lines.append(f"| {way} | {e['l1']:.5f} | {e['mse']:.6f} | {'–' if way == 'nf4' else gain} |")
    lines.append("")
  return "\n".join([*lines, f"{results['date']}; jax {results['jax']}.", ""])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", help="a folder of an encoder, besides normal numbers")
  parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  found = {"N(0, 1)": errors(np.random.default_rng(0).standard_normal(NUMBERS, np.float32))}
  if args.model:
    found[pathlib.Path(args.model).name] = of_model(args.model)
  results = {"errors": found, "date": datetime.date.today().isoformat(), "jax": jax.__version__}
  write(args.out / "quantization_error.json", json.dumps(results, indent=1) + "\n")
  write(args.out / "quantization_error.md", markdown(results))
  print(markdown(results))


if __name__ == "__main__":
  main()
