"""A finished cell as one small file: what it says, without its weights.

A study leaves one for each cell in OUT/records/. They can be kept where no weights are, be put into a repository, and
be given to a study on another machine, which then counts these cells as done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remend.console import warn
from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow, json_line, write_json, write_text
from remend.files.reading import read_object, understood
from remend.files.run_directory import MANIFEST, RECIPE, TRACK, RunDirectory
from remend.files.signed import as_signed, signed
from remend.studies.cell import GRADES, OUTCOME, grades_file
from remend.studies.grid import Cell, Study
from remend.studies.made import Made, degradation_inputs, graded, grading_inputs, reference_grades, training_inputs

FOLDER = "records"
FROM = "from.json"
"""In the directory of a cell that was taken over: what settles it, and the cell that the record is of."""

MOST_BYTES = 30_000
"""Of a record. One that is larger is written all the same, and told of."""

PART = ("task", "grader", "how", "n", "score", "interval_95", "interval_method", "raised", "empty", "clipped")
PROMPT = ("id", "tokens", "kl_sum_degraded", "kl_sum_recovered", "agree_degraded", "agree_recovered")
"""What is kept of a task's results, and of a held-out prompt. Of a graded item it is id, correct and cluster."""

TRACKED = ("step", "stage", "kl", "cka", "reference_layers")
DIGITS = 6
"""Significant ones of the numbers of a track."""

REMEDY = "copy it again, or take it out of the folder"


def settles(study: Study, made: Made, cell: Cell) -> JsonObject:
    """What a cell's figures rest on, whatever machine it runs on: settings and data, and hashes of the healthy model.

    The degraded student is not hashed: made of the same settings elsewhere, it differs by rounding.
    """
    chain, group = [degradation_inputs(study, made, cell.group)], cell.group
    while (parent := study.parent(group)) is not None:
        chain.append(degradation_inputs(study, made, parent))
        group = parent
    settled = {
        "model": made.hash_of(made.models[cell.group.model]),
        "damage": chain[::-1],
        "training": training_inputs(study, made, cell),
        "grading": grading_inputs(study, made, cell.group),
    }
    plain: JsonObject = json.loads(json.dumps(settled))
    return plain


def write_record(study: Study, made: Made, cell: Cell) -> None:
    """Of a finished cell, into OUT/records/."""
    place = made.out / "cells" / cell.name
    healthy = reference_grades(study, made.out, cell.group)
    manifest = read_object(place / MANIFEST)
    ids: dict[str, list[str]] = {}
    folders = {"grades": place / GRADES} | ({} if cell.method.trained else {"reference_grades": healthy})
    record: JsonObject = {
        "cell": cell.name,
        "study": study.name,
        "settles": settles(study, made, cell),
        "outcome": read_object(place / OUTCOME),
        "reference_grades": {},
        **{
            key: {name: _graded(grades_file(folder, name), ids) for name in graded(study, cell.group)}
            for key, folder in folders.items()
        },
        "ids": ids,
        "held_out": [_only(row, PROMPT) for row in RunDirectory(place).rows("held_out.jsonl")],
        "track": [_short(_only(row, TRACKED)) for row in RunDirectory(place).rows(TRACK)],
        "manifest": {
            "recipe": {"student": Path(str(manifest["recipe"]["student"])).name},
            "constraint": manifest.get("constraint"),
            "models": {"teacher": manifest.get("models", {}).get("teacher")},
        },
    }
    target = file_of(made.out / FOLDER, cell)
    write_text(target, json.dumps(signed(record), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
    if target.stat().st_size > MOST_BYTES:
        warn(f"{target} has {target.stat().st_size} bytes, more than a record should have ({MOST_BYTES})")


def file_of(folder: Path, cell: Cell) -> Path:
    """Where a cell's record is."""
    return folder / f"{cell.name.replace('/', '--')}.json"


def read_record(path: Path) -> JsonObject:
    """A record as it was written. Raises FileError for one that can't be read, or changed since."""
    record = read_object(path)
    with understood(path, REMEDY):
        if not as_signed(record):
            raise InputError(f"{path} changed since it was written; {REMEDY}")
    return record


def unpack(record: JsonRow, place: Path, healthy: Path) -> None:
    """Put a record's files where a cell has them, and of the healthy model's grades those that are not there.

    Args:
        record: as `read_record` gives it.
        place: the cell's directory, a new one.
        healthy: of the healthy model's grades; several tasks' cells share it.
    """
    for key, target in (("grades", place / GRADES), ("reference_grades", healthy)):
        for name, content in record[key].items():
            path = grades_file(target, name)
            if content is not None and not path.exists():
                write_json(path, _with_items(content, record["ids"]))
    write_text(place / "held_out.jsonl", "".join(map(json_line, record["held_out"])))
    if record["track"]:
        write_text(place / TRACK, "".join(map(json_line, record["track"])))
    write_json(place / MANIFEST, record["manifest"])
    write_text(place / RECIPE, "# of a cell that ran elsewhere, see from.json\n")
    write_json(place / OUTCOME, record["outcome"])
    write_json(place / FROM, {"record": record["cell"], "settles": record["settles"]})


def take_over(study: Study, made: Made, cell: Cell, folder: Path) -> bool:
    """Count a cell as done by its record in a folder, where that has one of the same settings and data.

    Raises FileError for a record that can't be read, or changed since it was written.
    """
    source, place = file_of(folder, cell), made.out / "cells" / cell.name
    if place.exists():
        return is_taken_over(study, made, cell)
    if not source.is_file():
        return False
    record = read_record(source)
    with understood(source, REMEDY):
        if record["settles"] != settles(study, made, cell):
            warn(f"{source} is of other settings or data, and its cell is run")
            return False
        unpack(record, place, reference_grades(study, made.out, cell.group))
    return True


def is_taken_over(study: Study, made: Made, cell: Cell) -> bool:
    """Whether a cell's directory was filled from a record that still has these settings and data."""
    path = made.out / "cells" / cell.name / FROM
    return path.is_file() and read_object(path).get("settles") == settles(study, made, cell)


def _graded(path: Path, ids: dict[str, list[str]]) -> JsonObject | None:
    """The results of a task, without answers and reasons; None where it was not graded on it.

    `ids` gets the items of the task, which are named once for all models and graders.
    """
    if not path.is_file():
        return None
    content = read_object(path)
    return {"results": [_packed(part, ids) for part in content.get("results", [content])]}


def _packed(part: JsonRow, ids: dict[str, list[str]]) -> JsonObject:
    items = part.get("items") or ()
    own = [item["id"] for item in items]
    kept = _only(part, PART) | {"correct": [float(item["correct"]) for item in items]}
    if all(value.is_integer() for value in kept["correct"]):
        kept["correct"] = [int(value) for value in kept["correct"]]
    if any(item.get("cluster") is not None for item in items):
        kept["clusters"] = [item.get("cluster") for item in items]
    return kept if ids.setdefault(part["task"], own) == own else {**kept, "ids": own}


def _with_items(content: JsonRow, ids: Mapping[str, Sequence[str]]) -> JsonObject:
    """Results as `remend eval` writes them, of what `_graded` kept."""
    parts = []
    for packed in content["results"]:
        columns = {"id": packed.get("ids", ids[packed["task"]]), "correct": packed["correct"]}
        columns |= {"cluster": packed["clusters"]} if "clusters" in packed else {}
        items = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        parts.append({**_only(packed, PART), "items": items})
    return {"results": parts}


def _only(row: JsonRow, keys: tuple[str, ...]) -> JsonObject:
    return {key: row[key] for key in keys if key in row}


def _short(value: Any) -> Any:
    """With numbers of DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list) else value
