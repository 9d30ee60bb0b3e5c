"""ema: the moving average of the student's weights as served (mean teacher, arXiv 1703.01780)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from remend.models.scorer import Scorer
from remend.training.teachers.teacher import TEACHERS, NamedTeacher, Workplace
from remend.training.teachers.views import Weights


class Ema(Weights):
    """The teacher at work.

    Args:
        student: as it is at the start.
        rate: ema += rate · (student − ema).
        every: after every n steps.
    """

    def __init__(self, student: Scorer, rate: float, every: int = 1) -> None:
        super().__init__(student)
        self.rate, self.every = rate, every

    def updated(self, step: int) -> None:
        if step % self.every == 0:
            self.approach(self.rate)

    def state(self) -> dict[str, Tensor]:
        return self.values

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self.take(saved)


@TEACHERS.register("ema", source="arXiv 1703.01780")
@dataclass(frozen=True)
class NamedEma(NamedTeacher):
    """The recipe's `ema: {rate, every}` says how it moves."""

    word = "ema"
    moving = True
    healthy = False
    copies = 1
    saved = True
    no_layers = "ema has the student's own"
    recipe_keys = ("ema",)

    def load(self, workplace: Workplace) -> Ema:
        settings = workplace.recipe["ema"]
        return Ema(workplace.student, settings["rate"], settings["every"])
