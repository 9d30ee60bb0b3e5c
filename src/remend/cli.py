"""The command line: parses, calls one function a verb, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import remend
from remend.errors import RemendError

app = typer.Typer(
    help="Bring a degraded language model back, with its own healthy past as the teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
degrade = typer.Typer(help="Make a damaged student from a healthy model.", no_args_is_help=True)
app.add_typer(degrade, name="degrade")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe file, then key=value …", metavar="[RECIPE.yaml] [KEY=VALUE]…")
]
Student = Annotated[str | None, typer.Option(help="The damaged model: a directory, GGUF file, hub id[@revision].")]
Teacher = Annotated[
    str | None, typer.Option(help="The healthy reference, named likewise; smollm2 is the embedded model.")
]
Data = Annotated[str | None, typer.Option(help="Training prompts: JSON lines with a prompt, or a datasets id.")]
Out = Annotated[str | None, typer.Option(help="A new directory for everything that is written.")]


@app.command()
def demo(
    out: Out = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the recovery.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of rollouts and order.")] = 0,
    model: Annotated[str, typer.Option(help="The healthy model to start from.")] = "smollm2",
) -> None:
    """Quantize a real model to 3 bits so that it babbles, bring it back, and show the difference."""
    from remend.flows.demo import STEPS

    show(remend.demo(out, model=model, steps=STEPS if steps is None else steps, seed=seed))


@app.command()
def recover(
    words: Overrides = None,
    student: Student = None,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    resume: Annotated[str | None, typer.Option(help="Continue the interrupted run in this directory.")] = None,
) -> None:
    """Recover a degraded student: remend recover RECIPE.yaml [key=value …], or with the four options."""
    recipe, overrides = _arguments(words, student=student, teacher=teacher, data=data, out=out)
    show(remend.recover(recipe, resume=resume, **overrides))


@app.command()
def check(
    words: Overrides = None, student: Student = None, teacher: Teacher = None, data: Data = None, out: Out = None
) -> None:
    """Check a recipe without training: every problem and warning at once."""
    recipe, overrides = _arguments(words, student=student, teacher=teacher, data=data, out=out)
    found = remend.check(recipe, **overrides)
    console = Console(highlight=False, soft_wrap=True)
    for warning in found.warnings:
        console.print("warning:", warning, markup=False)
    found.raise_problems()
    held = f"; held to {found.grid}" if found.grid else ""
    console.print(
        f"ok: {len(found.train)} training and {len(found.held_out)} held-out prompts, "
        f"{found.parameters / 1e6:.1f}M parameters, {found.shared} shared token ids{held}"
    )


@degrade.command()
def quantize(
    model: Annotated[str, typer.Argument(help="The healthy model.")],
    out: Annotated[str, typer.Option(help="A new directory.")],
    format: Annotated[str, typer.Option(help="intB-gG[-sym|-asym], B of 2 3 4 8, G of 32 64 128.")] = "int3-g64",
    method: Annotated[str, typer.Option(help="How weights are put on the grid: rtn.")] = "rtn",
) -> None:
    """Quantize every linear layer of the decoder onto a grid."""
    done = remend.quantize(model, out, format=format, method=method)
    print_line(
        f"{out}: {done['matrices']} matrices on {done['format']} ({done['method']}), "
        f"{done['bits_per_weight']:g} bits a weight as packed, {done['seconds']:.1f} s"
    )


@app.command()
def version() -> None:
    """Print the version."""
    print_line(remend.__version__)


def print_line(text: str) -> None:
    """One line on standard output, as it is."""
    sys.stdout.write(text + "\n")


def show(result: Any) -> None:
    """The result's table, samples and paths."""
    from remend.report.recovery import table, verdict

    console, summary = Console(highlight=False), result.summary
    for sample in result.samples():
        console.rule(style="dim")
        console.print(sample["prompt"], style="bold", markup=False)
        for name, style in (("reference", "cyan"), ("degraded", "red"), ("recovered", "green")):
            console.print(f"[{style}]{name:>9}[/]  ", end="")
            console.print(sample[name].strip() or "(nothing)", markup=False)
    grid = Table("on held-out prompts", "degraded", "recovered", "gap closed", title_justify="left")
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in table(summary):
        grid.add_row(row["label"], row["degraded"], row["recovered"], row["gap"])
    console.print(grid)
    console.print(verdict(summary), style="bold")
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"{summary['steps']} steps, {summary['tokens_trained']} tokens, {summary['seconds']:.0f} s, "
        f"peak memory {summary['peak_rss_mib']} MiB"
    )
    for name, path in (("model", result.model), ("report", result.report), ("summary", result.out / "summary.json")):
        console.print(f"{name:>7}  {path}", soft_wrap=True)


def _arguments(words: list[str] | None, **options: str | None) -> tuple[Path | None, dict[str, Any]]:
    from remend.config import parse_overrides

    words = list(words or [])
    recipe = Path(words.pop(0)) if words and "=" not in words[0] else None
    return recipe, {**parse_overrides(words), **{k: v for k, v in options.items() if v is not None}}


def main() -> None:
    """Entry point: errors that a user can mend are printed without a traceback, with exit code 2."""
    try:
        app()
    except RemendError as error:
        for line in str(error).split("\n"):
            sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; remend recover --resume DIR continues from the last checkpoint\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
