"""Verbs about tasks' results: eval, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import remend
from remend.cli.show import show_scores
from remend.errors import InputError


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory, GGUF file, hub id[@revision], smollm2, or a run.")],
    task: Annotated[list[str], typer.Option(help="Names with commas between; lm-eval:NAME is lm-evaluation-harness.")],
    out: Annotated[str, typer.Option(help="A new .json file; answers are kept beside it as they come.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Rows: JSON lines or a datasets id; TASK=FILE for one of several tasks.")
    ] = None,
    engine: Annotated[str, typer.Option(help="hf (transformers) or vllm.")] = "hf",
    grader: Annotated[
        str | None, typer.Option(help="paper (default) grades as the authors do, robust what was meant, both.")
    ] = None,
    how: Annotated[str, typer.Option(help="generate, or choices: log-likelihood of the answer letters.")] = "generate",
    samples: Annotated[int, typer.Option(help="Answers a row: 1 is greedy, more are drawn and give pass@k.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; by default by task.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows a task, the first ones.")] = None,
    seed: Annotated[int, typer.Option(help="Of drawn answers and of the test against chance.")] = 0,
    batch_rows: Annotated[int | None, typer.Option(help="Rows at once, at most.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    include: Annotated[str | None, typer.Option(help="A directory with lm-eval task files (YAML) of your own.")] = None,
    allow_code: Annotated[bool, typer.Option(help="Let lm-eval tasks run code that the model writes.")] = False,
) -> None:
    """Grade a model on tasks; every answer is kept with its grade and the reason. Again, it goes on."""
    from remend.evaluation.results import raised_note
    from remend.evaluation.settings import parse_data, parse_tasks

    rest: dict[str, Any] = {"data": parse_data(data), "engine": engine, "grader": grader, "how": how}
    rest |= {"samples": samples, "max_new_tokens": max_new_tokens, "limit": limit, "seed": seed}
    rest |= {"batch_rows": batch_rows, "device": device, "dtype": dtype, "include": include, "allow_code": allow_code}
    done = remend.evaluate(model, parse_tasks(",".join(task)), out, **rest)
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
    found = pair(files, names=name or None, level=level, seed=seed)
    if out:
        save(found, Path(out))
    Console(highlight=False).print(table(found))


def add_to(app: typer.Typer) -> None:
    """Put the verbs of this module into the command line."""
    app.command("eval")(evaluate)
    app.command()(compare)
