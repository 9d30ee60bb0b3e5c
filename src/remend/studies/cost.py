"""What a study will cost: steps, tokens and hours of each cell, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from remend.files.atomic import JsonObject, JsonRow
from remend.files.reading import read_object
from remend.studies.cell import OUTCOME, completion_tokens, steps_for
from remend.studies.grid import Cell, Study
from remend.studies.power import planned

Figure = tuple[float | None, str]
"""Hours, None where nothing is known, and where the figure is from."""


def estimate(study: Study, out: Path, cells: Sequence[Cell], finished: Set[str] = frozenset()) -> JsonObject:
    """The cost of cells; `finished` are the names of those that a run would leave as they are.

    Steps are planned from the length limit of completions until the group's untrained cell has told how long they are,
    so that there can be more of them. Hours are measured where cells of the method have ended, else they come from
    the study's `speed`.

    Returns:
        dry_run True; cells: name, steps, tokens, hours, basis, done; total; power, see remend.studies.power; notes.
    """
    measured = _measured(study, out)
    rows: list[JsonObject] = []
    for cell in cells:
        done = cell.name in finished
        tokens = study.budget.tokens if cell.method.steps else 0
        hours, basis = _hours(study, cell, tokens, measured)
        row = {"name": cell.name, "method": cell.method.name, "steps": _steps(study, out, cell), "tokens": tokens}
        rows.append({**row, "hours": hours, "basis": "done before" if done else basis, "done": done})
    left = [row for row in rows if not row["done"]]
    known = [row["hours"] for row in left]
    total = {
        "cells": len(rows),
        "trained": sum(row["tokens"] > 0 for row in rows),
        "done": len(rows) - len(left),
        "steps": sum(row["steps"] for row in left),
        "tokens": sum(row["tokens"] for row in left),
        "hours": None if any(hours is None for hours in known) else sum(known),
    }
    told: JsonObject = {"cells": rows, "total": total, "power": planned(study), "notes": _notes(study, rows)}
    return {"dry_run": True, "study": study.name, **told}


def _steps(study: Study, out: Path, cell: Cell) -> int:
    if not cell.method.steps:
        return 0
    config, mean = study.draft(cell), {}
    idle = out / "cells" / Cell(cell.group, study.none, study.spec.seeds[0]).name
    if (idle / OUTCOME).is_file() and not cell.method.labelled:
        mean = completion_tokens({}, idle, None)
    return steps_for(config, study.budget.tokens, mean)


def _measured(study: Study, out: Path) -> dict[tuple[str, str], list[float]]:
    """Seconds of the cells that have ended, by model and method."""
    spent: dict[tuple[str, str], list[float]] = {}
    for cell in study.cells:
        path = out / "cells" / cell.name / OUTCOME
        if path.is_file():
            seconds = read_object(path)["seconds"]
            spent.setdefault((cell.group.model, cell.method.name), []).append(sum(seconds.values()))
    return spent


def _hours(study: Study, cell: Cell, tokens: int, measured: Mapping[tuple[str, str], Sequence[float]]) -> Figure:
    known = measured.get((cell.group.model, cell.method.name))
    if known:
        return sum(known) / len(known) / 3600, f"measured by {len(known)} cell{'s' * (len(known) != 1)}"
    speed = study.speed
    if speed is None or (cell.method.steps and cell.method.base not in speed.tokens_per_second):
        return None, "nothing: speed has no figure for it"
    parameters = study.parameters_of(cell.group.model)
    scale = parameters / speed.parameters if parameters else 1.0
    seconds = 60 * speed.overhead_minutes
    if tokens:
        seconds += tokens / speed.tokens_per_second[cell.method.base]
    size = "" if scale == 1 else f", times {scale:.2g} for its size"
    return scale * seconds / 3600, f"speed of {speed.device}{size}"


def _notes(study: Study, rows: Sequence[JsonRow]) -> list[str]:
    kinds = ", ".join(dict.fromkeys(spec.kind for spec in study.degradations.values()))
    students = len({cell.group.student for cell in study.cells})
    notes = [f"beside the cells, degraded students are made once, {students} in all ({kinds})"]
    if any(row["tokens"] and not row["done"] for row in rows):
        notes.append("steps are planned from max_new_tokens until completions have been measured, and may be more")
    unknown = [name for name in study.models if study.parameters_of(name) is None]
    if unknown and study.speed:
        notes.append(f"the size of {', '.join(unknown)} is not known; hours are those of speed.parameters. Give models")
    return notes
