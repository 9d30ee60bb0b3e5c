"""How the help reads: plain lines under headings. No name is cut, no mark is eaten, and a text has the line's width."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

NAMES = 24
"""Characters for the names of options. A longer one has a line to itself."""


def _write(formatter: Any, rows: Iterator[tuple[str, tuple[str, str]]]) -> None:
    """Rows of a name and a text, each below its heading; headings in the order in which they first come."""
    headed = dict[str, list[tuple[str, str]]]()
    for heading, row in rows:
        headed.setdefault(heading, []).append(row)
    for heading, below in headed.items():
        with formatter.section(heading):
            formatter.write_dl(below, col_max=NAMES)


def _parameters(command: Any, ctx: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    for parameter in command.get_params(ctx):
        if record := parameter.get_help_record(ctx):
            yield parameter.rich_help_panel or f"{parameter.param_type_name.capitalize()}s", record


class Verb(TyperCommand):
    """A verb whose options stand below the headings that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """See click."""
        _write(formatter, _parameters(self, ctx))


class Verbs(TyperGroup):
    """A group whose verbs stand below the headings that they name, each with the whole first paragraph of its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """See click."""
        _write(formatter, _parameters(self, ctx))
        _write(formatter, self._verbs(ctx))

    def _verbs(self, ctx: Any) -> Iterator[tuple[str, tuple[str, str]]]:
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                about = " ".join(inspect.cleandoc(command.help or "").partition("\n\n")[0].split())
                yield command.rich_help_panel or "Commands", (name, about)
