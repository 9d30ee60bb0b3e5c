"""What `remend plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from remend.console import PlainConsole

if TYPE_CHECKING:
    from remend.recovery.what_fits import Way, WhatFits


def show_plan(result: WhatFits) -> None:
    """The model, bytes by phase and by kind for each way of training, and what fits."""
    console, told, wish = PlainConsole(), PlainConsole(soft_wrap=True), result.wish
    size = wish.shape.size
    if result.taken:
        told.print(f"note: {result.taken}")
    held = f"on the grid {wish.format.name}" if wish.format else "held to nothing"
    told.print(
        f"{wish.shape.name}: {size.parameters / 1e9:.2f} billion parameters, {size.layers} layers, width {size.width}, "
        f"vocabulary {size.vocabulary:,}. The student is {held}."
    )
    repair = f", repair on {wish.samples} answers" if wish.format else ""
    told.print(
        f"A step of 8 prompts of up to {wish.prompt} tokens, with answers of up to {wish.answer}; {wish.batch} prompts "
        f"a micro-batch{repair}."
    )
    where = (
        f"one GPU of {wish.capacity / 1e9:g} GB" if wish.device == "cuda" else f"{wish.capacity / 1e9:g} GB of memory"
    )
    console.print(f"\nGB (10⁹ bytes) by phase, on {where}, with the defaults:")
    console.print(_by_phase(result.asked))
    console.print("GB by kind, in the fullest phase of each:")
    console.print(_by_kind(result.asked))
    for line in _verdict(result, where):
        told.print(line)


def _title(way: Way) -> str:
    return "adapter" if way.train == "adapter" else f"train: {way.train}"


def _by_phase(ways: Sequence[Way]) -> Table:
    table = Table("phase", *(_title(way) for way in ways), box=box.SIMPLE_HEAD)
    phases = dict.fromkeys(phase for way in ways for phase in way.phases)
    for phase in (p for p in phases if p not in ("baseline", "saving")):
        table.add_row(phase, *(_size(way.phases.get(phase, 0)) for way in ways))
    table.add_row("fits", *("yes" if way.fits else "no" for way in ways))
    return table


def _by_kind(ways: Sequence[Way]) -> Table:
    from remend.recovery.footprint import KINDS

    table = Table("kind", *(_title(way) for way in ways), box=box.SIMPLE_HEAD)
    table.add_row("(phase)", *(way.fullest for way in ways))
    for kind in KINDS:
        sizes = [way.by_phase[way.fullest].get(kind, 0) for way in ways]
        if any(sizes):
            table.add_row(kind, *map(_size, sizes))
    return table


def _verdict(result: WhatFits, where: str) -> list[str]:
    """Which settings fit, or what would."""
    wish, lines = result.wish, list[str]()
    for way in result.found:
        how = f" with {', '.join(way.settings)}" if way.settings else " as it is"
        beside = f" The machine's memory holds {_size(way.host)} GB of moments." if way.host else ""
        if way.fits:
            lines.append(f"{_title(way)} fits {where}{how}: {_size(way.peak)} GB at most, in {way.fullest}.{beside}")
        else:
            even = f", even with {', '.join(way.settings)}" if way.settings else ""
            lines.append(f"{_title(way)} does not fit {where}{even}: {_size(way.peak)} GB in {way.fullest}.{beside}")
    if alone := result.repair:
        fits = "fits" if alone.fits else "does not fit"
        how = ", ".join(alone.settings)
        lines.append(
            f"A repair alone, block by block ({how}), {fits}: {_size(alone.peak)} GB at most, in {alone.fullest}."
        )
    if wish.gpus > 1:
        lines.append(
            f"{wish.gpus} GPUs share the prompts of a step; each holds both models and all that is trained, so more "
            f"GPUs don't make a model fit. The machine's memory passes both models on {wish.gpus} times."
        )
    if wish.device == "cuda":
        lines.append("A twentieth of a GPU is left for its driver and the allocator. These are sums on paper.")
    if result.advice:
        lines.append("What would fit:")
        lines += [f"  {text}" for text in result.advice]
    return lines


def _size(count: int) -> str:
    """GB."""
    return f"{count / 1e9:.1f}" if count else ""
