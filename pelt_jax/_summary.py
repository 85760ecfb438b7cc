"""A table of what a method added, for people."""

import collections
import math
import re
from typing import Any

from pelt_jax._node import Node, Weight
from pelt_jax._site import Site
from pelt_jax._tree import _label, count
from pelt_jax._walk import map_arrays, walk


def summary(params: dict, sites: tuple[Site, ...] | None = None) -> None:
  """Prints what was added where, how much of it trains, and the totals.

  Layers that differ only by their number share a row. Needs `rich`; renders as HTML in a notebook.

  Args:
    params: params with nodes.
    sites: what `pelt.sites` returned; with them the head is counted apart.

  Raises:
    ImportError: if rich is not installed.
    ValueError: if params hold no nodes.
  """
  try:
    from rich.console import Console
    from rich.table import Table
  except ImportError as error:
    raise ImportError('summary needs rich: pip install "pelt_jax[train]"') from error
  rows: dict[tuple, collections.Counter] = collections.defaultdict(collections.Counter)
  for path, node in walk(params):
    if isinstance(node, Node):
      where = re.sub(r"(?<=/)\d+(?=/)|(?<=_)\d+(?=/)", "*", path)
      shape = tuple(node.shape) if isinstance(node, Weight) else ()
      row = rows[where, _names(node), shape]
      row["sites"] += 1
      row["trainable"] += _trainable(node)
      row["rank"] = max(row["rank"], node.rank() if isinstance(node, Weight) else 0)
  if not rows:
    raise ValueError("params hold no nodes; was the adapter merged already?")
  total = count(params, sites)
  share = 100 * (total.trainable + (total.head or 0)) / max(total.total, 1)
  table = Table(title="Trainable additions", caption_justify="left")
  for name in ("path", "node", "leaf"):
    table.add_column(name, overflow="fold")
  for name in ("sites", "rank", "trainable"):
    table.add_column(name, justify="right")
  for (where, names, shape), row in rows.items():
    leaf = " x ".join(map(str, shape)) or "-"
    rank = str(row["rank"] or "-")
    table.add_row(where, names, leaf, str(row["sites"]), rank, f"{row['trainable']:,}")
  head = "" if total.head is None else f", head {total.head:,}"
  table.caption = (
    f"trainable {total.trainable:,}{head} of {total.total:,} ({share:.2f} %); "
    f"stored {total.stored:,}; changed {total.changed:,}; {total.bytes / 2**20:.2f} MiB"
  )
  Console().print(table)


def _names(node: Any) -> str:
  """The node's class and those inside it."""
  names = [type(node).__name__]
  for _, value in node.children():
    for inner in value if type(value) is tuple else (value,):
      if isinstance(inner, Node):
        names.append(_names(inner))
  return " > ".join(names) if len(names) < 3 else f"{names[0]}({', '.join(names[1:])})"


def _trainable(node: Node) -> int:
  sizes: list[int] = []

  def visit(kind: str, group: str | None, x: Any, path: str) -> None:
    if _label(kind, group) != "frozen":
      sizes.append(math.prod(x.shape))

  map_arrays(visit, node)
  return sum(sizes)
