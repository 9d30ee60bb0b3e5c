"""Verbs that measure, grade and compare: diagnose, track, correlate, report, eval, compare, study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import remend
from remend.cli.from_settings import Values, command, options_of, parameter
from remend.cli.show import print_line, show_diagnosis, show_scores, show_track
from remend.console import PlainConsole
from remend.diagnosis.settings import DiagnoseSettings
from remend.errors import InputError
from remend.evaluation.settings import EvaluateSettings, parse_data, parse_tasks

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let a model directory run its own Python.")]
MODEL = "A directory, GGUF file, hub id[@revision], smollm2, or a run."
TASK = "Names with commas between; lm-eval:NAME is lm-evaluation-harness."
DATA = "Rows: JSON lines or a datasets id; TASK=FILE for one of several tasks; repeatable."
GRADED = (
    parameter("model", str, typer.Argument(help=MODEL)),
    parameter("task", list[str], typer.Option(help=TASK)),
    parameter("out", str, typer.Option(help="A new .json file; answers are kept beside it as they come.")),
    parameter("data", list[str] | None, typer.Option(help=DATA), None),
)


def _diagnose(_: Values, given: Values) -> None:
    reference, students, out = given.pop("reference"), given.pop("student"), given.pop("out")
    done = remend.diagnose(reference, students, out, **given)
    if done:  # beside the main process there is nothing to show
        show_diagnosis(reference, students, out, done)


def report(
    paths: Annotated[list[str], typer.Argument(help="Directories of recoveries or diagnoses.")],
    out: Annotated[str | None, typer.Option(help="A new directory, for a page that compares several.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Serve the page of a run under way on this machine.")] = False,
) -> None:
    """Regenerate the HTML report of a run or a diagnosis, or write one page that compares several."""
    if watch:
        from remend.report.watch import watch as serve

        if len(paths) != 1 or out:
            raise InputError("--watch takes one run's directory and no --out: it writes nothing")
        serve(paths[0], print_line)
        return
    from remend.report import report as write

    print_line(str(write(paths, Path(out) if out else None)))


def track(
    run: Annotated[str, typer.Argument(help="A recovery's directory.")],
    trust_remote_code: Trust = False,
) -> None:
    """Measure how well a recovery's layers are aligned with the reference, over its checkpoints."""
    show_track(remend.track(run, trust_remote_code=trust_remote_code))


def correlate(
    runs: Annotated[list[str], typer.Argument(help="Recoveries with a track.jsonl, or a folder of a study's records.")],
    out: Annotated[str | None, typer.Option(help="Also write correlation.json into this new directory.")] = None,
    permutations: Annotated[int, typer.Option(help="Number of permutations for the p-values.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed for permutations and bootstrap.")] = 0,
) -> None:
    """Relate recovery to alignment over checkpoints and runs: within runs and between them."""
    from remend.studies.correlate import correlate as relate
    from remend.studies.correlate import lines

    for line in lines(relate(runs, out, permutations=permutations, seed=seed)):
        print_line(line)


def _evaluate(fixed: Values, given: Values) -> None:
    from remend.evaluation.results import raised_note

    out, names = fixed["out"], parse_tasks(",".join(fixed["task"]))
    done = remend.evaluate(fixed["model"], names, out, data=parse_data(fixed["data"]), **given)
    show_scores(out, done)
    raised = [raised_note(part) for part in done.get("results", [done]) if part.get("raised")]
    if raised:
        raise InputError("\n".join(f"{note}. The other grades hold, and {out} has them all" for note in raised))


def compare(
    files: Annotated[list[str], typer.Argument(help="Results of remend eval: reference, degraded, recovered …")],
    name: Annotated[list[str] | None, typer.Option(help="A name for each file, in order; repeatable.")] = None,
    out: Annotated[str | None, typer.Option(help="Also write this new file: .json or .md.")] = None,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed for the bootstrap.")] = 0,
) -> None:
    """Compare graded results item by item: what was lost, what was won back, what these items can't detect."""
    from remend.evaluation.compare import compare as pair
    from remend.evaluation.compare import require_target, save, table

    if out:
        require_target(Path(out))
    comparison = pair(files, names=name or None, level=level, seed=seed)
    if out:
        save(comparison, Path(out))
    PlainConsole().print(table(comparison))


def study(
    path: Annotated[
        str,
        typer.Argument(help="A YAML file, or tiny, small, full, paper-small, paper.", metavar="STUDY.yaml|NAME"),
    ],
    out: Annotated[str, typer.Option(help="The study's directory: a new one, or the one that it was begun in.")],
    jobs: Annotated[int, typer.Option(help="Cells at once, each in a process of its own.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell cells and cost; write nothing.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Cells to run: int3-g64, int3-g64/sft/0, '*/*/0'; repeatable.")
    ] = None,
    records: Annotated[
        str | None,
        typer.Option("--from", help="A folder of records of finished cells; these count as done, without weights."),
    ] = None,
    trust_remote_code: Trust = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let tasks run code where the study says allow_code.")
    ] = False,
) -> None:
    """Degradations x methods x tasks x seeds as a grid of recoveries, compared on one page; rerun to resume."""
    from remend.studies.study import lines

    results = remend.study(
        path,
        out,
        jobs=jobs,
        dry_run=dry_run,
        only=only,
        records=records,
        trust_remote_code=trust_remote_code,
        allow_code=allow_code,
    )
    for line in lines(results):
        print_line(line)
    if results.get("failed_now"):
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Put the verbs of this module into the command line."""
    options = options_of(DiagnoseSettings, renamed={"students": "student"}, also={"reference": "teacher"})
    about = "Show where the damage sits, layer by layer and token by token: a student against its healthy reference."
    app.command("diagnose")(command((), options, _diagnose, about))
    for verb in (track, correlate, report):
        app.command()(verb)
    options = options_of(EvaluateSettings, only=[name for name in EvaluateSettings.model_fields if name != "data"])
    about = "Grade a model on tasks; every answer is kept with its grade and the reason. Rerun to resume."
    app.command("eval")(command(GRADED, options, _evaluate, about))
    app.command()(compare)
    app.command()(study)
