"""What of a study is finished: one test for a run, for its results and for a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from remend.errors import InputError
from remend.files.atomic import read_json
from remend.studies import tiny_model
from remend.studies.cell import OUTCOME, state_of
from remend.studies.grid import Cell, Study
from remend.studies.made import Made, cell_inputs, is_made, make, student_inputs
from remend.studies.spec import TINY

FINISHED = ("done", "ungraded")
"""States of cells that are not run again."""


def state(study: Study, made: Made, cell: Cell) -> str:
    """As cell.state_of; a cell whose degraded student is not there, or is another by now, is stale or new."""
    place = made.out / "cells" / cell.name
    try:
        if is_made(made.student(cell.group), student_inputs(study, made, cell.group)):
            return state_of(place, cell_inputs(study, made, cell))
    except (InputError, OSError):  # a model or file that is gone
        pass
    return "stale" if place.exists() else "new"


def finished(study: Study, out: Path, cells: Sequence[Cell]) -> set[str]:
    """Names of the cells that a run would leave as they are. Nothing is written into `out`, and nothing trained."""
    if not any((out / "cells" / cell.name / OUTCOME).is_file() for cell in cells):
        return set()
    if any(spec.path == TINY for spec in study.models.values()) and not _tiny_is_made(out / "tiny"):
        return set()
    with TemporaryDirectory() as folder:
        try:
            made = make(study, out, Path(folder))
        except (InputError, OSError):
            return set()
        return {cell.name for cell in cells if state(study, made, cell) in FINISHED}


def _tiny_is_made(place: Path) -> bool:
    record = place / tiny_model.RECORD
    return record.is_file() and read_json(record) == {"version": tiny_model.version(tiny_model.STEPS, 0)}
