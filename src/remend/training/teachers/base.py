"""base: the student without its LoRA adapter; the base is the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from remend.models.adapters import without_adapter
from remend.models.protocols import CausalLM
from remend.training.teachers.teacher import TEACHERS, NamedTeacher, Workplace
from remend.training.teachers.views import View


class AdapterOff(View):
    """The student with its adapter switched off."""

    @contextmanager
    def policy(self) -> Iterator[CausalLM]:
        with without_adapter(self.parts.model):
            yield self.parts.model


@TEACHERS.register("base", source="LoRA, arXiv 2106.09685")
@dataclass(frozen=True)
class Base(NamedTeacher):
    """The one view of the student that may be the healthy reference: it does not move."""

    word = "base"
    moving = True
    no_layers = "base has the student's own. Name the base model"

    def load(self, workplace: Workplace) -> AdapterOff:
        return AdapterOff(workplace.student)
