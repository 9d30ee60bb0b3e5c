"""Write a task's rows as JSON lines, as `remend degrade finetune --data` and a recipe's `data` read them."""

from __future__ import annotations

from pathlib import Path

from remend.data.tasks.task import TASKS
from remend.errors import InputError


def write(name: str, out: str | Path, *, split: str, n: int, seed: int = 0) -> Path:
    """Make `n` rows of the task `name` and write them to the new file `out`, one JSON object a line.

    Raises:
        InputError: as Task.rows; the name is unknown; `out` exists.
        FileError: `out` can't be written, or a package is missing; see Task.rows.
    """
    from remend.files.atomic import (
        json_line,  # imports torch, which reading a task's list need not
        write_text,
    )

    target = Path(out)
    task = TASKS.get(name)
    if target.exists():
        raise InputError(f"out {target} exists; name a new file")
    write_text(target, "".join(json_line(row) for row in task.rows(split, n, seed)))
    return target
