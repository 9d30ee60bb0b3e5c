"""live: the student as it is, which teaches itself where it is shown a demonstration (SDFT, arXiv 2601.19897)."""

from __future__ import annotations

from dataclasses import dataclass

from remend.training.teachers.teacher import TEACHERS, NamedTeacher, StreamView, Workplace
from remend.training.teachers.views import View


@TEACHERS.register("live", source="arXiv 2601.19897")
@dataclass(frozen=True)
class Live(NamedTeacher):
    """The recipe's name for it."""

    word = "live"
    moving = True
    healthy = False
    no_layers = "live has the student's own"

    def refuses(self, stream: StreamView) -> list[str]:
        if stream.demonstrations:
            return []
        return ["teacher live without demonstrations is the student itself: it teaches nothing"]

    def load(self, workplace: Workplace) -> View:
        return View(workplace.student)
