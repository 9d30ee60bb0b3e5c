"""Grades of a model on the study's tasks, by remend eval."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remend.evaluation.job import evaluate
from remend.files.atomic import write_json


def grades_file(folder: Path, task: str) -> Path:
    """Where a task's grades are in a cell's grades/."""
    return folder / (re.sub(r"[^\w.+-]", "-", task) + ".json")


def grade(model: str, folder: Path, *, task: str, data: str | None, options: Mapping[str, Any]) -> None:
    """Grade a model on one task, anew.

    Args:
        model: as remend eval names it.
        folder: gets TASK.json.
        task: a task's name, or lm-eval:NAME.
        data: the rows, None where the task brings its own.
        options: further arguments of evaluate.

    Raises RemendError as evaluate does.
    """
    target = grades_file(folder, task)
    target.unlink(missing_ok=True)
    evaluate(model, [task], str(target), data=data, **options)


def grade_reference(model: str, folder: str, grading: list[Mapping[str, Any]], inputs: Mapping[str, Any]) -> None:
    """Grade a healthy model, unless that was done with the same inputs.

    Raises RemendError as evaluate does.
    """
    place = Path(folder)
    record = place / "graded.json"
    record.unlink(missing_ok=True)
    for entry in grading:
        grade(model, place, **entry)
    write_json(record, dict(inputs))
