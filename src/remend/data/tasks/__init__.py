"""Tasks: rows to train and measure on, and what makes a response to one of them correct.

import remend
task = remend.tasks.get("tooluse-short")
row = task.rows("train", 1, seed=0)[0]
task.grade(row["demonstration"], row, mode="robust")  # Grade(correct=True, reason='correct')

tooluse and science read their rows from a file; the others make their own. `form(name)` tells how a row is read:

form = remend.tasks.form("science")
form.check(row), form.messages(row), form.id(row), form.choices(row), form.gold(row)

A task is one short file that ends in `TASKS.register(...)(Task(...))`; importing it below makes it known.
"""

from remend.data.tasks import general, science, science_short, tooluse, tooluse_short
from remend.data.tasks.forms import FORMS, Form
from remend.data.tasks.score import RAISED, score
from remend.data.tasks.task import MODES, SPLITS, TASKS, Grade, Task, row_id
from remend.data.tasks.write import write

__all__ = [
    "FORMS",
    "MODES",
    "RAISED",
    "SPLITS",
    "TASKS",
    "Form",
    "Grade",
    "Task",
    "form",
    "get",
    "names",
    "row_id",
    "score",
]
__all__ += ["general", "science", "science_short", "tooluse", "tooluse_short", "write"]


def get(name: str) -> Task:
    """The task called `name`. Raises InputError that lists the known ones."""
    return TASKS.get(name)


def form(name: str) -> Form:
    """How the rows of the task called `name` are read. Raises InputError that lists the known ones."""
    return FORMS.get(name)


def names() -> list[str]:
    """The names of all tasks, sorted."""
    return TASKS.names()
