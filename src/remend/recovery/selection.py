"""Which step's weights are kept: the last, or the best of those that were evaluated; and when to stop early.

The rule: the weighted mean over streams of the gap closed since the start, 1 − now / before, of the stream's held-out
KL (or of the negative log-likelihood of its rows' answers, where the teacher moves with the student). A stream whose
teacher is the student as it came in has no gap to close, and counts with −KL: what it loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from safetensors.torch import save_file

from remend.errors import FileError
from remend.files.atomic import JsonObject, new_directory, write_json
from remend.files.hashes import damaged, hash_directory
from remend.files.reading import read_object
from remend.files.run_directory import DAMAGED, Checkpoint, RunDirectory
from remend.files.signed import as_signed, signed
from remend.maths.gap import MEASURABLE_KL
from remend.models.written import FILES
from remend.training.constraints import Constraint
from remend.training.loop import restore_masters

SCORE = "eval/gap_closed"
BEST, RECORD = "best", "best.json"
"""In a run's directory: the weights that are kept, and in there which they are."""


def score(before: Mapping[str, float], now: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The rule of the module docstring: `before` and `now` hold each stream's measure, lower is better."""
    total = sum(weights.values())
    gains = {s: 1 - now[s] / before[s] if before[s] >= MEASURABLE_KL else -now[s] for s in weights}
    return sum(weights[s] * gains[s] for s in weights) / total


@dataclass(frozen=True)
class Best:
    """Which weights are kept: those after `step`, whose `score` is the rule's."""

    step: int
    score: float

    @classmethod
    def read(cls, directory: RunDirectory) -> Best | None:
        """Those that a run's directory holds. Raises FileError or ValueError for a file that is damaged."""
        path = directory.path / BEST / RECORD
        if not path.is_file():
            return None
        record = read_object(path)
        if not as_signed(record):
            raise FileError(f"{path} changed since it was written: {DAMAGED}")
        return cls(int(record["step"]), float(record["score"]))


@dataclass
class Selection:
    """Keeps the best weights in the run's directory.

    Args:
        directory: of the run.
        constraint: whose masters are kept.
        keep: whether the best are wanted.
        patience: evaluations without a better one after which training stops, or None.
        scores: of the evaluations so far; a resumed run goes on from those before.
        best: step and score of the weights that are kept, or None; a resumed run goes on from those that it finds.
    """

    directory: RunDirectory
    constraint: Constraint
    keep: bool
    patience: int | None
    scores: list[float] = field(default_factory=list)
    best: Best | None = None

    def seen(self, step: int, value: float) -> None:
        """After an evaluation at `step`."""
        self.scores.append(value)
        if self.keep and (self.best is None or value > self.best.score):
            self.best = Best(step, value)
            target = self.directory.path / BEST
            with new_directory(target) as directory:
                tensors = {k: t.detach().contiguous() for k, t in self.constraint.masters().items()}
                save_file(tensors, directory / "masters.safetensors")
                write_json(directory / RECORD, signed({**asdict(self.best), FILES: hash_directory(directory)}))

    def stop(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        if self.patience is None:
            return False
        if len(self.scores) <= self.patience:
            return False
        return max(self.scores[-self.patience :]) <= max(self.scores[: -self.patience])

    @torch.no_grad()
    def restore(self) -> JsonObject | None:
        """Put the best masters back where they are wanted and not the last; what was chosen, or None.

        Raises FileError where they changed on the disk since they were written.
        """
        if self.best is None:
            return None
        path = self.directory.path / BEST
        recorded = read_object(path / RECORD)
        if recorded.get("step") != self.best.step or damaged(path, recorded.get(FILES, {})):
            raise FileError(
                f"masters.safetensors of {path} changed or can't be read since it was written: put back a copy of it, "
                "or start a new run with another out"
            )
        restore_masters(Checkpoint(self.best.step, path), self.constraint)
        return asdict(self.best)
