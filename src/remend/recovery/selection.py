"""Which step's weights are kept: the last, or the best of those that were evaluated; and when to stop early.

The rule: the weighted mean over streams of the gap closed since the start, 1 − now / before, of the stream's held-out
KL (or of the negative log-likelihood of its rows' answers, where the teacher moves with the student). A stream whose
teacher is the student as it came in has no gap to close, and counts with −KL: what it loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file

from remend.errors import FileError
from remend.files.atomic import new_directory, write_json
from remend.files.hashes import damaged, hash_directory
from remend.files.reading import read_object
from remend.files.run_directory import Checkpoint, RunDirectory
from remend.maths.gap import MEASURABLE_KL
from remend.models.written import FILES
from remend.training.constraints import Constraint
from remend.training.loop import restore_masters

SCORE = "eval/gap_closed"
BEST = "best"


def score(before: Mapping[str, float], now: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The rule of the module docstring: `before` and `now` hold each stream's measure, lower is better."""
    total = sum(weights.values())
    gains = {s: 1 - now[s] / before[s] if before[s] >= MEASURABLE_KL else -now[s] for s in weights}
    return sum(weights[s] * gains[s] for s in weights) / total


@dataclass
class Selection:
    """Keeps the best weights in the run's directory.

    Args:
        directory: of the run.
        constraint: whose masters are kept.
        keep: whether the best are wanted.
        patience: evaluations without a better one after which training stops, or None.
        scores: of the evaluations so far; a resumed run goes on from those before.
    """

    directory: RunDirectory
    constraint: Constraint
    keep: bool
    patience: int | None
    scores: list[float] = field(default_factory=list)

    def seen(self, step: int, value: float) -> None:
        """After an evaluation at `step`."""
        best = max(self.scores, default=float("-inf"))
        self.scores.append(value)
        if self.keep and value > best:
            target = self.directory.path / BEST
            with new_directory(target) as directory:
                tensors = {k: t.detach().contiguous() for k, t in self.constraint.masters().items()}
                save_file(tensors, directory / "masters.safetensors")
                write_json(directory / "best.json", {"step": step, "score": value, FILES: hash_directory(directory)})

    def stop(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        if self.patience is None:
            return False
        if len(self.scores) <= self.patience:
            return False
        return max(self.scores[-self.patience :]) <= max(self.scores[: -self.patience])

    @torch.no_grad()
    def restore(self) -> dict[str, Any] | None:
        """Put the best masters back where they are wanted and not the last; what was chosen, or None.

        Raises FileError where they changed on the disk since they were written.
        """
        path = self.directory.path / BEST
        if not self.keep or not (path / "best.json").is_file():
            return None
        chosen: dict[str, Any] = read_object(path / "best.json")
        if damaged(path, chosen.pop(FILES, {})):
            raise FileError(
                f"masters.safetensors of {path} changed or can't be read since it was written: put back a copy of it, "
                "or start a new run with another out"
            )
        restore_masters(Checkpoint(chosen["step"], path), self.constraint)
        return chosen
