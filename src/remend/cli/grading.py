"""Verbs about tasks' results: eval, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import remend
from remend.cli.from_settings import Values, command, options_of, parameter
from remend.cli.show import show_scores
from remend.errors import InputError
from remend.evaluation.settings import EvaluateSettings, parse_data, parse_tasks

MODEL = "A directory, GGUF file, hub id[@revision], smollm2, or a run."
TASK = "Names with commas between; lm-eval:NAME is lm-evaluation-harness."
DATA = "Rows: JSON lines or a datasets id; TASK=FILE for one of several tasks."
FIXED = (
    parameter("model", str, typer.Argument(help=escape(MODEL))),
    parameter("task", list[str], typer.Option(help=TASK)),
    parameter("out", str, typer.Option(help="A new .json file; answers are kept beside it as they come.")),
    parameter("data", list[str] | None, typer.Option(help=DATA), None),
)


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
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
) -> None:
    """Compare graded results item by item: what was lost, what was won back, what so few items can't show."""
    from remend.evaluation.compare import compare as pair
    from remend.evaluation.compare import require_target, save, table

    if out:
        require_target(Path(out))
    comparison = pair(files, names=name or None, level=level, seed=seed)
    if out:
        save(comparison, Path(out))
    Console(highlight=False).print(table(comparison))


def add_to(app: typer.Typer) -> None:
    """Put the verbs of this module into the command line."""
    options = options_of(EvaluateSettings, only=[name for name in EvaluateSettings.model_fields if name != "data"])
    about = "Grade a model on tasks; every answer is kept with its grade and the reason. Again, it goes on."
    app.command("eval")(command(FIXED, options, _evaluate, about))
    app.command()(compare)
