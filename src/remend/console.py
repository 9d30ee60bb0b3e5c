"""Progress on standard error: bars on a terminal, one line a stage elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def warn(text: str) -> None:
    """Tell the user something that stops nothing."""
    console.print(f"[yellow]warning[/]: {text}", soft_wrap=True)


class Advance(Protocol):
    """Move the bar on by `count`; `note` is shown beside it."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """See the class."""
        ...


@contextmanager
def stage(title: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
    """Show that `title` is under way, with a bar of `total` units where that is known."""
    if not console.is_terminal:
        console.print(title)
        yield lambda count=1, note="": None
        return
    known = [BarColumn(bar_width=28), MofNCompleteColumn(), TimeRemainingColumn()] if total else [SpinnerColumn("line")]
    columns = [TextColumn("{task.description}"), *known, TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            bars.update(task, advance=count, note=note)

        yield advance
