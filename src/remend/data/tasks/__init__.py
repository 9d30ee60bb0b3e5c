"""Tasks: rows to train and measure on, and what makes a response to one of them correct.

import remend
task = remend.tasks.get("tooluse-short")
row = task.rows("train", 1, seed=0)[0]
task.grade(row["demonstration"], row, mode="robust")  # Grade(correct=True, reason='correct')

tooluse and science read their rows from a file; the others make their own.

A task is one short file in this folder that ends in `TASKS.register(...)(Task(...))`; the folder is scanned. A task of
one's own registers itself in the same way from anywhere, as soon as its module is imported.
"""

from pathlib import Path

from remend.data.tasks.grading import RAISED, score
from remend.data.tasks.task import MODES, SPLITS, TASKS, Grade, Task, row_id
from remend.errors import InputError
from remend.files.atomic import json_line, write_text
from remend.registry import register_all

__all__ = ["FORMS", "MODES", "RAISED", "SPLITS", "TASKS", "Form", "Grade", "Task"]
__all__ += ["form", "get", "names", "row_id", "score", "write"]


def get(name: str) -> Task:
    """The task called `name`. Raises InputError that lists the known ones."""
    return TASKS.get(name)


form, FORMS, Form = get, TASKS, Task
"""How the rows of a task are read: these were their own names in version 0.1, and the task itself knows it now."""


def names() -> list[str]:
    """The names of all tasks, sorted."""
    return TASKS.names()


def write(name: str, out: str | Path, *, split: str, n: int, seed: int = 0) -> Path:
    """Make `n` rows of the task `name` and write them to the new file `out`, one JSON object a line.

    `remend degrade finetune --data` and a recipe's `data` read them.

    Raises:
        InputError: as Task.rows; the name is unknown; `out` exists.
        FileError: `out` can't be written, or a package is missing; see Task.rows.
    """
    target = Path(out)
    task = TASKS.get(name)
    if target.exists():
        raise InputError(f"out {target} exists; name a new file")
    write_text(target, "".join(json_line(row) for row in task.rows(split, n, seed)))
    return target


register_all(__name__)
