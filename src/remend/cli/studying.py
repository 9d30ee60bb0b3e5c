"""The verb study."""

from __future__ import annotations

from typing import Annotated

import typer

import remend
from remend.cli.show import print_line


def study(
    path: Annotated[str, typer.Argument(help="A YAML file, or tiny, small, full, paper.", metavar="STUDY.yaml|NAME")],
    out: Annotated[str, typer.Option(help="The study's directory: a new one, or the one that it was begun in.")],
    jobs: Annotated[int, typer.Option(help="Cells at once, each in a process of its own.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell cells and cost; write nothing.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Cells to run: int3-g64, int3-g64/sft/0, '*/*/0'; repeatable.")
    ] = None,
) -> None:
    """Degradations x methods x tasks x seeds as a grid of recoveries, compared on one page; goes on where it was."""
    from remend.studies.study import lines

    results = remend.study(path, out, jobs=jobs, dry_run=dry_run, only=only)
    for line in lines(results):
        print_line(line)
    if results.get("failed_now"):
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Put the verb into the command line."""
    app.command()(study)
