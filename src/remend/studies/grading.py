"""Grades of a model on the study's tasks, by remend eval."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from remend.evaluation.job import evaluate
from remend.files.atomic import JsonObject, JsonRow, write_json
from remend.files.settings import Settings


def grades_file(folder: Path, task: str) -> Path:
    """Where a task's grades are in a cell's grades/."""
    return folder / (re.sub(r"[^\w.+-]", "-", task) + ".json")


class Grading(Settings):
    """A task that a model is graded on."""

    task: str = Field(description="a task's name, or lm-eval:NAME")
    data: str | None = Field(description="the rows, None where the task brings its own")
    options: JsonObject = Field(description="further settings of remend eval")


def grade(model: str, folder: Path, grading: Grading) -> None:
    """Grade a model on one task, anew; `folder` gets TASK.json.

    Raises RemendError as evaluate does.
    """
    target = grades_file(folder, grading.task)
    target.unlink(missing_ok=True)
    evaluate(model, [grading.task], str(target), data=grading.data, **grading.options)


def grade_reference(model: str, folder: str, grading: list[JsonObject], inputs: JsonRow) -> None:
    """Grade a healthy model, unless that was done with the same inputs.

    Raises RemendError as evaluate does.
    """
    place = Path(folder)
    record = place / "graded.json"
    record.unlink(missing_ok=True)
    for entry in grading:
        grade(model, place, Grading(**entry))
    write_json(record, dict(inputs))
