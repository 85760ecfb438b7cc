"""A progress bar that can be switched off."""

import contextlib
from collections.abc import Callable, Iterator

from pelt_jax.training._extras import need


@contextlib.contextmanager
def bar(text: str, total: int, start: int = 0, show: bool = True) -> Iterator[Callable[..., None]]:
  """Shows how far a loop has come.

  Args:
    text: What is going on.
    total: Where it ends.
    start: Where it begins.
    show: False shows nothing.

  Yields:
    `advance(note=None, by=1)`; the note stands behind the bar.
  """
  if not show:
    yield lambda note=None, by=1: None
    return
  rich = need("rich.progress")
  columns = (
    *rich.Progress.get_default_columns(),
    rich.MofNCompleteColumn(),
    rich.TextColumn("{task.fields[note]}"),
  )
  with rich.Progress(*columns) as progress:
    task = progress.add_task(text, total=total, completed=start, note="")

    def advance(note: str | None = None, by: int = 1) -> None:
      progress.update(task, advance=by, **({} if note is None else {"note": note}))

    yield advance
