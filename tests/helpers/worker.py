"""Run in a process of its own (processes.py): a recovery that kills itself, or jobs that two processes share."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import remend
import remend.training.loop
from remend.errors import TrainingError
from remend.files.launch import rank
from remend.training.constraints import Calibration, ConstraintKind, Start, StudentFacts
from remend.training.constraints.grid import GridKind, OnGrid


def killed(values: dict[str, object], after: int) -> None:
    """Recover, and die by SIGKILL right after step `after` was logged, before any clean-up."""
    append = remend.training.loop.RunDirectory.append

    def deadly(self: object, name: str, row: dict[str, object]) -> None:
        append(self, name, row)  # type: ignore[arg-type]
        if name == "timing.jsonl" and row["step"] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    remend.training.loop.RunDirectory.append = deadly  # type: ignore[method-assign, assignment]
    remend.recover(**values)


def spoil(kind: ConstraintKind, model: torch.nn.Module, facts: StudentFacts, calibration: Calibration) -> Start:
    """In the place of a kind's repair: one that makes things worse."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return Start()


def spoiled(**recipe: object) -> None:
    """Recover with a repair that makes things worse."""
    repair, GridKind.repair = GridKind.repair, spoil  # type: ignore[assignment]
    remend.recover(**recipe)
    GridKind.repair = repair  # type: ignore[method-assign]


def differing(said: str, **recipe: object) -> None:
    """Recover, while the second process moves a master that the first leaves alone; each writes what it is told."""
    project = OnGrid.project

    def moved(self: OnGrid) -> None:
        if rank() == 1:
            list(self.masters().values())[1].add_(1e-3)
        project(self)

    OnGrid.project = moved  # type: ignore[method-assign]
    try:
        remend.recover(**recipe)
    except TrainingError as error:
        Path(f"{said}-{rank()}").write_text(str(error))
    OnGrid.project = project  # type: ignore[method-assign]


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "kill":
        killed(json.loads(words[1]), int(words[2]))
    jobs = {"recover": remend.recover, "spoiled": spoiled, "differing": differing, "diagnose": remend.diagnose}
    for what, values in zip(words[::2], words[1::2], strict=True):
        jobs[what](**json.loads(values))
