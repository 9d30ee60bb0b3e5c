"""A loss from outside the package: a bare function, registered and nothing else."""

from __future__ import annotations

from torch import Tensor

from remend.maths.losses import LOSSES

DISTANCE = "distance"


@LOSSES.register(DISTANCE, source="made for the tests")
def distance(student_NV: Tensor, teacher_NV: Tensor, *, power: float = 2.0) -> Tensor:
    """Σ |q − p|^power of each position."""
    return (student_NV.softmax(-1) - teacher_NV.softmax(-1)).abs().pow(power).sum(-1)
