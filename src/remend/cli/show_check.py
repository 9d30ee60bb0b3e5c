"""What `remend check` prints of a recipe without problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from remend.console import PlainConsole, duration, warn

if TYPE_CHECKING:
    from remend.recovery.forecast import Forecast
    from remend.recovery.plan import Checked, Plan
    from remend.recovery.preview import Piece, ShownPrompt, StreamPreview

OPEN, CLOSE = "⟦", "⟧"
"""Around tokens that are trained on: colours are not everywhere."""

INDENT = 3


def show_check(result: Checked, *, measure: bool = False) -> None:
    """Warnings and notes, what is held, some prompts as the model reads them, figures, and one line that says ok.

    `measure` loads the models for the figures.
    """
    told, console = PlainConsole(soft_wrap=True), PlainConsole()
    for warning in result.warnings:
        told.print("warning:", warning)
    result.raise_problems()
    for note in result.notes:
        told.print("note:", note)
    if result.plan:
        _show_plan(console, result.plan)
        _show_figures(console, result.plan, measure)
    told.print(result.verdict())
    if result.plan:
        for line in result.plan.chosen:
            told.print(line)


def _show_plan(console: PlainConsole, plan: Plan) -> None:
    from remend.recovery.preview import previews

    console.print(_held(plan))
    for preview in previews(plan):
        console.print()
        _show_stream(console, preview, alone=len(plan.prompts.streams) == 1)
    console.print()


def _held(plan: Plan) -> str:
    if plan.facts.adapted:
        return "Held: all weights of the student; an adapter beside them is trained."
    if plan.config.train != "all":
        return f"Held: {plan.constraint}. Nothing else is trained."
    if plan.constraint == "none":
        return "Held: nothing; all weights of the student are trained freely."
    return f"Held: {plan.constraint}. Training keeps the student on it."


def _show_stream(console: PlainConsole, preview: StreamPreview, *, alone: bool) -> None:
    of = "" if alone else f" of stream {preview.name}"
    if preview.prompts is None:
        console.print(f"The reference writes the prompts{of} when the run begins. The model will read them so:")
    else:
        count = len(preview.shown)
        few = "1 of" if count == 1 else f"{count} of"
        console.print(f"{few} {preview.prompts} training prompts{of}, as the model will read them:")
    for number, prompt in enumerate(preview.shown, start=1):
        _show_prompt(console, prompt, number if preview.prompts is not None else None)


def _show_prompt(console: PlainConsole, prompt: ShownPrompt, number: int | None) -> None:
    if number is not None:
        console.print(f"{number}. row {prompt.id}, {_tokens(prompt.tokens)}")
    _show_text(console, prompt.pieces)
    if prompt.answer:
        _show_line(console, Text(f"→ {prompt.answer}", style="green"))
    if any(piece.trained for piece in prompt.pieces):
        _show_line(console, Text(f"→ what stands between {OPEN} and {CLOSE} is trained on", style="green"))
    if prompt.teacher:
        _show_line(console, Text("→ the teacher reads this in its place:", style="green"))
        _show_text(console, prompt.teacher)


def _show_text(console: PlainConsole, pieces: Sequence[Piece]) -> None:
    text, inside = Text(), False
    for piece in pieces:
        if piece.trained != inside:
            text.append(OPEN if piece.trained else CLOSE, style="green")
            inside = piece.trained
        if piece.left_out:
            text.append(f"\n… {_tokens(piece.left_out)} …\n", style="dim")
        else:
            text.append(piece.text, style="bold green" if piece.trained else "")
    if inside:
        text.append(CLOSE, style="green")
    text.rstrip()
    _show_line(console, text)


def _show_line(console: PlainConsole, text: Text) -> None:
    for line in text.wrap(console, console.width - INDENT):
        line.rstrip()
        console.print(Text(" " * INDENT).append_text(line))


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _show_figures(console: PlainConsole, plan: Plan, measure: bool) -> None:
    from remend.recovery.forecast import forecast

    costs = None
    if measure:
        from remend.recovery.measure_speed import measured_costs

        costs = measured_costs(plan)
    ahead = forecast(plan, costs, "a step that was timed now" if measure else "")
    console.print(_training(plan, ahead))
    console.print(_by_phase(ahead))
    console.print(f"Times: {ahead.source}.")
    parts = ", ".join(f"{name} {size_in_words(size)}" for name, size in ahead.memory.parts.items())
    console.print(f"Memory of training: {parts}.")
    if ahead.memory.peak > ahead.free:
        warn(
            f"the run may need {size_in_words(ahead.memory.peak)} of memory, and {size_in_words(ahead.free)} are free. "
            "A smaller batch_size with more gradient_accumulation, gradient_checkpointing: true or an adapter (lora) "
            "needs less"
        )
    console.print()
    _show_files(console, plan, ahead)
    console.print()


def _training(plan: Plan, ahead: Forecast) -> str:
    """How many tokens are trained on, and what is measured on the way."""
    tokens, config = ahead.tokens, plan.config
    total = f"{tokens.total:,} in {'at most ' if plan.ends_early else ''}{_steps(config.steps)}"
    expected = ""
    if ahead.answered is not None:
        expected = f" By earlier runs it will be about {ahead.answered * tokens.total:,.0f}."
    held_out, times = ahead.facts.streams[0].held_out, ahead.facts.evaluations
    between = f", and {times} time{'s' if times > 1 else ''} between" if times else ""
    return (
        f"A step trains on {tokens.answers} answers, at most {tokens.step:,} tokens: {total}.{expected} The longest "
        f"prompt has {tokens.longest} tokens with its answer. {held_out} held-out prompts measure the run before and "
        f"after{between}."
    )


def _by_phase(ahead: Forecast) -> Table:
    table = Table("phase", "time", "memory", box=box.SIMPLE_HEAD)
    for phase, seconds in ahead.seconds.items():
        table.add_row(phase, about(seconds), size_in_words(ahead.memory.phases[phase]))
    free = f"{size_in_words(ahead.memory.peak)} at most; {size_in_words(ahead.free)} are free"
    table.add_row("in all", about(sum(ahead.seconds.values())), free)
    return table


def _show_files(console: PlainConsole, plan: Plan, ahead: Forecast) -> None:
    disk = ahead.disk
    total = size_in_words(disk.total)
    most = total if disk.total < 2**20 else f"up to {total}"
    console.print(f"Written to {plan.config.out}, {most} ({size_in_words(ahead.disk_free)} are free):")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("  model/", f"{size_in_words(disk.model)}: the recovered model, with its card")
    if disk.checkpoints:
        often = "every step" if plan.config.steps_a_checkpoint == 1 else f"every {plan.config.steps_a_checkpoint} steps"
        each = f"at most {disk.checkpoints}, each {size_in_words(disk.checkpoint)}; one {often}"
        table.add_row("  checkpoints/", each)
    if disk.best:
        table.add_row("  best/", f"{size_in_words(disk.best)}: the best weights so far")
    table.add_row("  report.html", "the page to look at; report.md and report.json say the same")
    table.add_row("  summary.json", "what was measured; metrics.jsonl has each step")
    console.print(table)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def about(seconds: float) -> str:
    """A time that is no more exact than an estimate."""
    if seconds < 1:
        return "below 1 s"
    step = 1 if seconds < 20 else 5 if seconds < 120 else 30 if seconds < 3600 else 300
    return f"about {duration(round(seconds / step) * step)}"


def size_in_words(size: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB" if size >= 2**20 else "below 1 MiB"
