"""The verb plan: what fits where, before a file is there."""

from __future__ import annotations

from typing import Annotated

import typer

import remend
from remend.cli.show_plan import show_plan


def plan(
    shape: Annotated[
        str | None, typer.Option(help="A known model, such as Qwen2.5-7B; a wrong name lists all.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Parameters instead: 7b, 1.5b, 135m; the nearest shape.")] = None,
    gpu: Annotated[float | None, typer.Option(help="GB (10⁹ bytes) of one GPU.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of a CPU's memory, in place of a GPU's.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs that share the prompts of a step.")] = 1,
    format: Annotated[str, typer.Option(help="The student's grid; dense for one that is held to nothing.")] = (
        "int4-g64"
    ),
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Prompts of a micro-batch; a step has 8.")] = 8,
    repair_samples: Annotated[int, typer.Option(help="Answers that repair is fitted to.")] = 600,
) -> None:
    """Tell what a recovery would hold in memory: by phase and kind, for each way of training, and what fits."""
    show_plan(
        remend.plan(
            shape=shape,
            params=params,
            gpu=gpu,
            memory=memory,
            gpus=gpus,
            format=format,
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            repair_samples=repair_samples,
        )
    )


def add_to(app: typer.Typer) -> None:
    """Put the verb of this module into the command line."""
    app.command()(plan)
