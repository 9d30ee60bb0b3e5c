"""Grade many responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from remend.data.examples import Row
from remend.data.tasks.task import Grade, Task, require_mode, row_id
from remend.errors import InputError

RAISED = "the grader raised on row "
"""How the reason begins where no grade could be given."""


class Item(TypedDict):
    """A graded response."""

    id: str
    correct: bool
    reason: str


class Scored(TypedDict):
    """What `score` gives."""

    task: str
    grader: str
    n: int
    score: float
    raised: int
    items: list[Item]


def score(task: Task, rows: Sequence[Row], answers: Sequence[str], *, mode: str = "paper") -> Scored:
    """The share of correct answers, with every grade and its reason.

    A row whose grader raises is named in its item's reason, counts as wrong, and is counted in `raised`.

    Args:
        task: from remend.tasks.get.
        rows: the task's rows.
        answers: one response a row, in order.
        mode: paper or robust; see Task.grade.

    Returns:
        task, grader (the mode), n, score (0 to 1), raised, items: [{id, correct, reason}]; `id` is the row's own, or
        made by `row_id`.

    Raises:
        InputError: there are no rows, not as many answers as rows, or no such mode.
    """
    require_mode(mode)
    if len(rows) != len(answers):
        raise InputError(f"there are {len(answers)} answers for {len(rows)} rows; give one answer a row, in order")
    if not rows:
        raise InputError("there are no rows to score")
    items: list[Item] = []
    raised = 0
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), start=1):
        name = _name(row, number)
        try:
            grade = task.grade(answer, row, mode)
        except Exception as error:  # one bad row must not lose the grades of the others
            raised += 1
            grade = Grade(False, f"{RAISED}{name}: {type(error).__name__}: {error}")
        items.append({"id": name, "correct": grade.correct, "reason": grade.reason})
    right = sum(item["correct"] for item in items)
    return {
        "task": task.name,
        "grader": mode,
        "n": len(items),
        "score": right / len(items),
        "raised": raised,
        "items": items,
    }


def _name(row: Row, number: int) -> str:
    if row.get("id") is not None:
        return str(row["id"])
    try:
        return row_id(row)
    except (InputError, TypeError):
        return f"row {number}"
