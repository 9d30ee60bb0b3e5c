"""Verbs that measure and show: diagnose, track, correlate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import remend
from remend.cli.from_settings import Values, command, options_of
from remend.cli.show import print_line, show_diagnosis, show_track
from remend.diagnosis.settings import DiagnoseSettings


def _diagnose(_: Values, given: Values) -> None:
    out = given["out"]
    done = remend.diagnose(given.pop("reference"), given.pop("student"), given.pop("out"), **given)
    if done:  # beside the main process there is nothing to show
        show_diagnosis(out, done)


def report(
    paths: Annotated[list[str], typer.Argument(help="Directories of recoveries or diagnoses.")],
    out: Annotated[str | None, typer.Option(help="A new directory, for a page that compares several.")] = None,
) -> None:
    """Write the page of a run or a diagnosis anew, or one page that compares several."""
    from remend.report import report as write

    print_line(str(write(paths, Path(out) if out else None)))


def track(run: Annotated[str, typer.Argument(help="A recovery's directory.")]) -> None:
    """Measure how well a recovery's layers are aligned with the reference, over its checkpoints."""
    show_track(remend.track(run))


def correlate(
    runs: Annotated[list[str], typer.Argument(help="Recoveries with a track.jsonl (diagnose_every, remend track).")],
    out: Annotated[str | None, typer.Option(help="Also write correlation.json into this new directory.")] = None,
    permutations: Annotated[int, typer.Option(help="Of the p-values.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of permutations and resampling.")] = 0,
) -> None:
    """Relate recovery to alignment over checkpoints and runs: within runs and between them."""
    from remend.studies.correlate import correlate as relate
    from remend.studies.correlate import lines

    for line in lines(relate(runs, out, permutations=permutations, seed=seed)):
        print_line(line)


def add_to(app: typer.Typer) -> None:
    """Put the verbs of this module into the command line."""
    options = options_of(DiagnoseSettings, renamed={"students": "student"})
    about = "Where the damage sits: a student against its healthy reference, layer by layer and token by token."
    app.command("diagnose")(command((), options, _diagnose, about))
    for verb in (track, correlate, report):
        app.command()(verb)
