"""Verbs that measure and show: diagnose, track, correlate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import remend
from remend.cli.show import print_line, show_diagnosis, show_track
from remend.errors import InputError

NewDirectory = Annotated[str, typer.Option(help="A new directory.")]


def diagnose(
    reference: Annotated[str, typer.Option(help="The healthy model: a directory, GGUF file, hub id, smollm2.")],
    student: Annotated[list[str], typer.Option(help="A damaged or recovered model, or a run's directory; repeatable.")],
    out: NewDirectory,
    data: Annotated[str | None, typer.Option(help="Prompts: JSON lines or a datasets id; by default bundled.")] = None,
    rows: Annotated[int | None, typer.Option(help="Prompts, one row each; by default 256 (GPU: 1,024).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of the reference's answers.")] = 32,
    sites: Annotated[str, typer.Option(help="Of residual, attention, mlp, with commas between.")] = "residual",
    layer_map: Annotated[
        str | None, typer.Option(help="The reference's layer of each of the student's: 0,1,4.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of rows, resampling and random weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps.")] = "auto",
    cache: Annotated[str | None, typer.Option(help="Where the reference's answers and rows are kept.")] = None,
) -> None:
    """Where the damage sits: a student against its healthy reference, layer by layer and token by token."""
    rest: dict[str, Any] = {"data": data, "rows": rows, "max_new_tokens": max_new_tokens, "seed": seed}
    rest |= {"sites": [site.strip() for site in sites.split(",") if site.strip()], "device": device, "cache": cache}
    done = remend.diagnose(reference, student, out, layer_map=_numbers(layer_map), **rest)
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


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'layer map "{text}" is no list of numbers like 0,1,2,5') from None


def add_to(app: typer.Typer) -> None:
    """Put the verbs of this module into the command line."""
    for verb in (diagnose, track, correlate, report):
        app.command()(verb)
