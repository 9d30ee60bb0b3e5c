"""A study's results from committed records alone: nothing is run, and no model is opened."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow
from remend.files.settings import build
from remend.recovery.settings import RecoverConfig
from remend.studies.grid import Cell, Study
from remend.studies.made import reference_grades
from remend.studies.records import REMEDY, file_of, read_record, unpack
from remend.studies.results import gather


def results_of_records(study: Study, folder: Path) -> JsonObject:
    """What the records of a folder say together, as results.json of the study has it.

    Args:
        study: as read.
        folder: of records; one that is not there has none.

    Returns:
        As remend.studies.results.gather. Cells without a record are "not run".

    Raises:
        InputError: a record of no cell of the study, or of another training than the study's.
        FileError: one that can't be read, or changed since it was written.
    """
    known = {file_of(folder, cell): cell for cell in study.cells}
    found = sorted(folder.glob("*.json"))
    if strange := [path.name for path in found if path not in known]:
        raise InputError(f"{folder} has records of no cell of the study {study.name}: {', '.join(strange)}")
    states = {cell.name: "not run" for cell in study.cells}
    with TemporaryDirectory() as place:
        out = Path(place)
        for path in found:
            cell, record = known[path], read_record(path)
            _require_own(study, cell, record, path)
            unpack(record, out / "cells" / cell.name, reference_grades(study, out, cell.group))
            states[cell.name] = "done"
        done = [name for name, state in states.items() if state == "done"]
        return gather(study, out, states, dict.fromkeys(done, ()))


def _require_own(study: Study, cell: Cell, record: JsonRow, path: Path) -> None:
    """Raises InputError unless a record's training is the cell's, as this version writes recipes."""
    training = record["settles"]["training"]
    mine = study.draft(cell).model_dump(mode="json", exclude={"out"})
    theirs = build(RecoverConfig, {**training["recipe"], "out": "-"}, str(path)).model_dump(
        mode="json", exclude={"out"}
    )
    budget = study.budget.tokens if cell.method.steps else None
    if (training["how"], training.get("budget"), theirs) != (cell.method.how, budget, mine):
        raise InputError(f"{path} is of another training than the study's cell {cell.name}; {REMEDY}")
