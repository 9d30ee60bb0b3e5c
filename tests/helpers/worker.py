"""Run in its own process by test_resume.py: a recovery that kills itself, or one of two processes of a step."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

import remend
import remend.training.loop
from remend.training.constraints import Calibration, ConstraintKind, Start, StudentFacts
from remend.training.constraints.grid import GridKind


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


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        killed(json.loads(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "spoil":
        GridKind.repair = spoil  # type: ignore[assignment]
        remend.recover(**json.loads(sys.argv[2]))
    elif sys.argv[1] == "diagnose":
        remend.diagnose(**json.loads(sys.argv[2]))
    else:
        remend.recover(**json.loads(sys.argv[2]))
