"""Progress on standard error: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.progress import Task as Bar
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from remend.errors import printable


class PlainConsole(Console):
    """A console that takes no text for markup, and lets nothing through that would steer the terminal.

    Names, ids and answers come from files and models: a `[` in them is a bracket, and an escape code is none.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich: every text that is printed comes through here, before its colours are added."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


_beside = os.environ.get("RANK", "0") != "0"
"""Of several processes the first one speaks."""

console = PlainConsole(stderr=True, quiet=_beside)
"""What `--quiet` silences: progress and remarks."""

_warnings = PlainConsole(stderr=True, quiet=_beside)
_phases: list[str] = []
"""The phases of the command that is under way, and the one that it is in, as `phases` and `phase` set them."""
_phase: list[str] = []


def warn(text: str) -> None:
    """Tell the user something that stops nothing."""
    _warnings.print(Text("warning", style="yellow").append(f": {text}", style="default"), soft_wrap=True)


@contextmanager
def phases(names: Sequence[str]) -> Iterator[None]:
    """While this lasts, each stage says in which of these phases it is: 2/5 and so on, as `phase` sets it."""
    _phases[:] = names
    try:
        yield
    finally:
        _phases.clear()
        _phase.clear()


def phase(name: str) -> None:
    """The stages that follow belong to this phase. It says nothing where no phases are named."""
    _phase[:] = [name]


class Advance(Protocol):
    """Move the bar on by `count`; `note` is shown beside it."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """See the class."""
        ...


@contextmanager
def stage(title: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
    """Show that `title` is under way, with a bar of `total` units where that is known.

    A finished stage leaves one line: its title, how long it took, and its last note.
    """
    if _phase and _phase[0] in _phases:
        title = f"{_phases.index(_phase[0]) + 1}/{len(_phases)} {title}"
    if not console.is_terminal or console.quiet:
        console.print(title, markup=False, soft_wrap=True)
        yield lambda count=1, note="": None
        return
    # the title gives way where the line is too short: the figures are what changes
    name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    note_column = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True))
    known = [BarColumn(bar_width=10), TaskProgressColumn(), _Left()] if total else [SpinnerColumn("line")]
    began, last = time.monotonic(), ""
    with Progress(name, *known, note_column, console=console, transient=True, expand=True) as bars:
        task = bars.add_task(title, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal last
            last = note
            bars.update(task, advance=count, note=note)

        yield advance
    line = "  ".join(part for part in (title, duration(time.monotonic() - began), last) if part)
    console.print(line, markup=False, soft_wrap=True)


class _Left(ProgressColumn):
    """How long the rest takes."""

    def get_default_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Bar) -> Text:
        left = task.time_remaining
        return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")


def duration(seconds: float) -> str:
    """12 s, 3:05 min, 1:02:03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
