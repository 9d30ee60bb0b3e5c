"""Progress as a terminal of 80 columns shows it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remend import console as progress
from remend.cli.show import print_line


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "console", terminal)
    return written


def test_a_bar_keeps_its_figures_however_long_its_title_is(screen: io.StringIO) -> None:
    with progress.phases(["loading", "training"]):
        progress.phase("training")
        with progress.stage(
            "a title that is much longer than a line of eighty columns, with [/brackets]", 4
        ) as advance:
            advance(2, "held-out KL 0.412  loss 0.975  31 tokens/s")
    lines = re.split(r"\r|\x1b\[\S*?[A-Zhl]|\n", screen.getvalue().rstrip())
    drawn, finished = [line for line in lines if "50%" in line], lines[-1]
    assert drawn
    assert all(len(line.rstrip()) <= 80 and "31 tokens/s" in line and line.startswith("2/2 ") for line in drawn)
    assert finished == (
        "2/2 a title that is much longer than a line of eighty columns, with [/brackets]  0 s  "
        "held-out KL 0.412  loss 0.975  31 tokens/s"
    )


def test_a_stage_outside_of_phases_has_no_number(screen: io.StringIO) -> None:
    progress.phase("training")
    with progress.stage("loading exp[/old]"):
        pass
    assert screen.getvalue().rstrip().endswith("loading exp[/old]  0 s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3723, "1:02:03 h")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_names_are_no_markup_and_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "[/b] [red]x\x1b[31m\x9b0m\u202e:smile: \ud800"
    grid = Table("name[/b]")
    grid.add_row(evil)
    for thing in (evil, grid, Text(evil)):
        progress.PlainConsole().print(thing, soft_wrap=True)
    progress.warn(evil)
    with progress.stage(evil):
        pass
    print_line(evil)
    out, err = capsys.readouterr()
    assert not set(out + err) & {"\x1b", "\x9b", "\u202e", "\ud800"}
    assert out.count("[/b] [red]x?[31m?0m?:smile: ?") == 3
    assert "│ [/b] [red]x?[31m?0m?:smile" in out
    assert err.count("[/b] [red]x?[31m?0m?:smile: ?") == 2
