"""The page of a recovery that is under way: how far it is, and what was measured so far."""

from __future__ import annotations

import time
from pathlib import Path

from remend.files.atomic import JsonObject, JsonRow
from remend.files.reading import read_object
from remend.files.run_directory import MANIFEST, METRICS, RECIPE, REPAIR, SUMMARY, TIMING, RunDirectory, planned_steps
from remend.report.page import Code, Page, Section, Tile
from remend.report.recovery import recovery_page, title
from remend.report.training import figures
from remend.report.words import number, percent

REFRESH = 5
"""Seconds after which the page of a run under way is loaded again."""

QUIET = 900
"""Seconds without a change after which the page says that the run may have stopped."""


def page_now(run: Path) -> Page:
    """The whole page of a complete run, else what is known by now.

    Raises FileError for a file that can't be read.
    """
    files, manifest = RunDirectory(run), read_object(run / MANIFEST)
    summary = read_object(run / SUMMARY) if (run / SUMMARY).is_file() else None
    if summary and files.complete:
        return recovery_page(run, summary)
    steps = planned_steps(manifest)
    known, rows = _known(files), files.rows(METRICS)
    training = figures(files, known, manifest)
    recipe = (run / RECIPE).read_text(encoding="utf-8").rstrip("\n")
    return Page(
        title=title(manifest),
        verdict=_verdict(known, rows, steps),
        about=f"This run is under way; the page loads itself again every {REFRESH} seconds. What it shows was measured "
        "during training, and not on the saved model.",
        sections=[
            Section("Training", "training", training),
            Section("The recipe", "recipe", [Code(recipe, folded=RECIPE)]),
        ],
        warnings=_quiet(run),
        tiles=_tiles(files, known, rows, steps),
        refresh=REFRESH,
    )


def _known(files: RunDirectory) -> JsonObject:
    """What a summary will say, as far as it is known: the damage, repair, and the streams before training."""
    known: JsonObject = {}
    baseline, repair, sides = (files.path / name for name in ("baseline.json", REPAIR, "streams-baseline.json"))
    if baseline.is_file():
        sums = read_object(baseline)["on_reference"]
        known["degraded"] = {"kl": sum(s["kl"] for s in sums) / sum(s["tokens"] for s in sums)}
    if repair.is_file():
        known["repair"] = read_object(repair)
    if sides.is_file():
        known["streams"] = {name: {"before": before} for name, before in read_object(sides).items()}
    return known


def _last(rows: list[JsonObject], key: str) -> JsonRow:
    """The last row that has a value, with its step; empty where there is none."""
    return next((row for row in reversed(rows) if key in row), {})


def _share(known: JsonRow, kl: float | None) -> float | None:
    before: float = known.get("degraded", {}).get("kl", 0.0)
    return None if kl is None or before <= 0.001 else 1 - kl / before


def _latest(known: JsonRow, rows: list[JsonObject]) -> tuple[float | None, str]:
    """The last held-out KL, and when it was measured."""
    if evaluated := _last(rows, "eval/kl"):
        return evaluated["eval/kl"], f"after step {evaluated['step']}"
    if known.get("repair", {}).get("kept"):
        return known["repair"]["kl"], "after repair"
    return known.get("degraded", {}).get("kl"), "before anything was done"


def _verdict(known: JsonRow, rows: list[JsonObject], steps: int) -> str:
    trained = _last(rows, "loss")
    kl, when = _latest(known, rows)
    where = f"Step {trained['step']} of {steps}" if trained else "Before the first step"
    if kl is None:
        return f"{where}: the degraded model is not measured yet."
    share = _share(known, kl)
    so_far = "" if share is None else f", {percent(share)} of the gap closed so far"
    return f"{where}: held-out KL {number(kl)} {when}{so_far}."


def _tiles(files: RunDirectory, known: JsonRow, rows: list[JsonObject], steps: int) -> list[Tile]:
    trained, seconds = _last(rows, "loss"), files.step_seconds()
    done = int(trained.get("step", 0))
    tiles = [Tile("Step", f"{done} of {steps}", percent(done / steps) if steps else "")]
    if seconds:
        left = (steps - done) * sum(seconds.values()) / len(seconds)
        tiles.append(
            Tile("Time left for the steps", _clock(left), f"{sum(seconds.values()) / len(seconds):.1f} s a step")
        )
    kl, when = _latest(known, rows)
    if kl is not None:
        tiles.append(Tile("Held-out KL", number(kl), when))
        if (share := _share(known, kl)) is not None:
            tiles.append(Tile("KL gap closed so far", percent(share), "no interval yet"))
    if trained:
        tiles.append(Tile("Loss", number(trained["loss"]), "of the last step"))
    return tiles


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"


def _quiet(run: Path) -> list[str]:
    """A warning where the files have not changed for long."""
    files = [path for name in (METRICS, TIMING, MANIFEST) if (path := run / name).is_file()]
    since = time.time() - max(path.stat().st_mtime for path in files)
    if since < QUIET:
        return []
    return [f"nothing was written for {_clock(since)}; if the run has stopped: remend recover --resume {run}"]
