"""initial: the student with the weights that it came in with, which hold it to what it knew then."""

from __future__ import annotations

from dataclasses import dataclass

from remend.training.teachers.teacher import TEACHERS, NamedTeacher, Workplace
from remend.training.teachers.views import Weights


@TEACHERS.register("initial", source="learning without forgetting, arXiv 1606.09282")
@dataclass(frozen=True)
class Initial(NamedTeacher):
    """The recipe's name for it."""

    word = "initial"
    moving = True
    healthy = False
    copies = 1
    no_layers = "initial has the student's own"
    needs_initial = True

    def load(self, workplace: Workplace) -> Weights:
        """Where repair has changed the student, the values from before are taken."""
        weights = Weights(workplace.student)
        if workplace.initial is not None:
            weights.take(workplace.initial)
        return weights
