"""What a run of the main job writes: files, a picture, a table."""

import os
import pathlib
import re


def write(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


def plot(path: pathlib.Path, report: dict) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  axes.plot(*zip(*report["loss"], strict=True), linewidth=1, label="training")
  held_out = [(step, scores["loss"]) for step, scores in report["scores"]["during"]]
  axes.plot(
    *zip((0, report["scores"]["before"]["loss"]), *held_out, strict=True), "o-", label="eval"
  )
  axes.set(xlabel="step", ylabel="loss", title=f"{report['method']} on {report['task']}")
  axes.legend()
  save_figure(figure, path)


def plot_ranks(path: pathlib.Path, ranks: dict) -> None:
  """A heat map of the ranks: layers from left to right, a row for each kind of matrix."""
  import numpy as np
  from matplotlib.figure import Figure

  cells: dict[str, dict[int, int]] = {}
  for at, rank in ranks.items():
    number = re.search(r"(?<=/)\d+(?=/)|(?<=_)\d+(?=/)", at)
    kind = at if number is None else at[number.end() + 1 :]
    layers = rank if isinstance(rank, list) else [rank]
    first = int(number[0]) if number else 0
    cells.setdefault(kind.removesuffix("/kernel"), {}).update(enumerate(layers, first))
  width = 1 + max(layer for row in cells.values() for layer in row)
  table = np.array([[row.get(i, np.nan) for i in range(width)] for row in cells.values()])
  figure = Figure(figsize=(2.5 + 0.45 * width, 1 + 0.4 * len(cells)), layout="constrained")
  axes = figure.subplots()
  image = axes.imshow(table, cmap="viridis", vmin=0, aspect="auto")
  for (y, x), rank in np.ndenumerate(table):
    if not np.isnan(rank):
      shade = "white" if rank < 0.6 * np.nanmax(table) else "black"
      axes.text(x, y, int(rank), ha="center", va="center", color=shade, fontsize=7)
  axes.set(xlabel="layer", xticks=range(width), yticks=range(len(cells)), title="rank")
  axes.set_yticklabels(cells, fontsize=7)
  figure.colorbar(image)
  save_figure(figure, path)


def as_names(settings: dict) -> dict:
  """Settings with files and folders by their names alone."""
  shorter = {k: pathlib.Path(settings[k]).name for k in ("model", "train", "eval")}
  return settings | shorter


def save_figure(figure, path: pathlib.Path) -> None:
  temporary = path.with_name(f".{path.name}.tmp")
  figure.savefig(temporary, format="png", dpi=120)
  os.replace(temporary, path)


def rows_of(report: dict) -> list[tuple[str, str]]:
  """The report as lines of a table."""
  metric, counts, flops = report["metric"], report["parameters"], report["flops"]
  before, after = report["scores"]["before"], report["scores"]["after"]
  rows = [(name, f"{before[name]:.4f} → {after[name]:.4f}") for name in after]
  rows.sort(key=lambda row: row[0] != metric["name"])
  if report["forgetting"]:
    rows.append(
      ("loss on general text", "{before:.4f} → {after:.4f}".format(**report["forgetting"]))
    )
  if report["writing"]:
    first, last = (report["writing"]["scores"][when] for when in ("before", "after"))
    for name, digits in (("bleu", 2), ("rouge_1", 4), ("rouge_2", 4), ("rouge_l", 4)):
      change = f"{first[name]:.{digits}f} → {last[name]:.{digits}f}"
      rows.append((f"{name}, {report['writing']['prompts']} answers", change))
  share = counts["trainable"] / counts["total"]
  rows.append(("trainable", f"{counts['trainable']:,} of {counts['total']:,} ({share:.2%})"))
  if ranks := report["ranks"]:
    each = [r for rank in ranks.values() for r in (rank if isinstance(rank, list) else [rank])]
    line = f"{sum(each):,} in {len(each)} matrices, {min(each)} to {max(each)} each"
    rows.append(("singular values kept", line))
  if counts["head"]:
    rows.append(("head", f"{counts['head']:,}"))
  rows.append(("adapter file", f"{report['bytes']['adapter'] / 1e6:.2f} MB"))
  rows.append(("optimizer state", f"{report['bytes']['optimizer'] / 1e6:.2f} MB"))
  if flops["step"]:
    rows.append(("FLOPs per step", f"{flops['step']:.3g}"))
  if report["time"]["step_ms"]:
    rows.append(("step", f"{report['time']['step_ms']:.1f} ms"))
  rows.append(("compiling", f"{report['time']['compile_s']:.1f} s"))
  rows.append(("total", f"{report['time']['total_s']:.1f} s"))
  for which in ("train", "eval"):
    if report["truncated"][which]:
      rows.append((f"{which} examples cut", f"{report['truncated'][which]:,}"))
  return rows


def as_markdown(report: dict) -> str:
  title = f"# {report['method']} on {report['task']}, {report['steps']} steps\n"
  table = "\n".join(f"| {name} | {value} |" for name, value in rows_of(report))
  settings = "\n".join(f"- {k}: {v}" for k, v in report["settings"].items() if v is not None)
  text = f"{title}\n| | before → after |\n|---|---|\n{table}\n\n## Settings\n\n{settings}\n"
  if report["sample"]:
    before, after = report["sample"]
    text += f"\n## Sample, before\n\n```\n{before}\n```\n\n## Sample, after\n\n```\n{after}\n```\n"
  if report["writing"]:
    text += "\n## Answers to held-out prompts\n"
    for answer in report["writing"]["texts"]:
      lines = [f"- {name}: {quoted(answer[name])}" for name in ("reference", "before", "after")]
      text += "\n".join(["\n" + quoted(answer["prompt"]), "", *lines, ""])
  ranks = "\n![ranks](ranks.png)\n" if report["ranks"] else ""
  return text + "\n![loss](loss.png)\n" + ranks


def quoted(text: str) -> str:
  """The text in one line, as code."""
  return "`" + " ⏎ ".join(text.replace("`", "'").split("\n")) + "`"


def show(report: dict, out: pathlib.Path) -> None:
  from rich.console import Console
  from rich.table import Table

  console = Console()
  table = Table("", "before → after", title=f"{report['method']} on {report['task']}")
  for row in rows_of(report):
    table.add_row(*row)
  console.print(table)
  for name, text in zip(("before", "after"), report["sample"] or (), strict=False):
    console.print(f"sample {name}:", style="bold")
    console.print(text, markup=False, highlight=False)
  console.print(f"written to {out}")
