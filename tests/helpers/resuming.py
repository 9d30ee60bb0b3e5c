"""Make a finished recovery look interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

from remend.files.run_directory import SUMMARY, RunDirectory


def torn_copy(finished: Path, to: Path, step: int) -> Path:
    """A copy of a finished run's directory as it was soon after its checkpoint of `step`."""
    shutil.copytree(finished, to)
    for checkpoint in RunDirectory(to).checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    shutil.rmtree(to / "model")
    (to / SUMMARY).unlink()
    return to
