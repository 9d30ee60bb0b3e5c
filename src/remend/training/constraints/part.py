"""Students of which a part is trained: what holds the rest, and what repair changed of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from remend.models.protocols import CausalLM
from remend.training.constraints.free import Free
from remend.training.constraints.kind import (
    Calibration,
    Constraint,
    ConstraintKind,
    Shapes,
    Start,
    StudentFacts,
    kind_of,
)


class OnPart(Free):
    """Some parameters of a student that lies on no grid move; whatever else repair changed is kept.

    Args:
        model: the student. Every parameter that is not among `moving` stops to need a gradient.
        moving: names of the parameters that are trained, as `named_parameters` has them.
        repaired: whether repair changed the student.
    """

    def __init__(self, model: CausalLM, moving: Collection[str], *, repaired: bool) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in moving)
        super().__init__(model)
        self._still = {name: p for name, p in model.named_parameters() if name not in moving}
        self._repaired = repaired

    def kept(self) -> dict[str, Tensor]:
        return dict(self._still) if self._repaired else {}

    @torch.no_grad()
    def take_kept(self, saved: Mapping[str, Tensor]) -> None:
        self._repaired = bool(saved)
        for name, tensor in saved.items():
            self._still[name].copy_(tensor)


class PartKind(ConstraintKind):
    """Students of which the recipe's `train` names a part; repair is that of a student of which all is trained."""

    moving: str
    """The value of `train`."""
    words: str
    """What moves, for verdict, manifest and summary."""

    def holds(self, facts: StudentFacts) -> bool:
        return facts.train == self.moving and not facts.adapted

    def describe(self, facts: StudentFacts) -> str:
        """What the student lies on, and what moves."""
        kind, rest = whole(facts)
        return f"{kind.describe(rest)}; {self.words}"

    def check(self, model: CausalLM, facts: StudentFacts) -> None:
        kind, rest = whole(facts)
        kind.check(model, rest)

    @abstractmethod
    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint: ...

    def no_repair(self, facts: StudentFacts, ours: Shapes, theirs: Shapes | None) -> str | None:
        kind, rest = whole(facts)
        return kind.no_repair(rest, ours, theirs)

    def repairs(self, model: CausalLM, facts: StudentFacts, teacher: CausalLM) -> bool:
        kind, rest = whole(facts)
        return kind.repairs(model, rest, teacher)

    def repair(self, model: CausalLM, facts: StudentFacts, calibration: Calibration) -> Start:
        """As of the same student if all of it were trained."""
        kind, rest = whole(facts)
        return kind.repair(model, rest, calibration)

    def learning_rate(self, facts: StudentFacts, *, repaired: bool) -> float:
        kind, rest = whole(facts)
        return kind.learning_rate(rest, repaired=repaired)

    def repair_answers(self, facts: StudentFacts) -> int:
        kind, rest = whole(facts)
        return kind.repair_answers(rest)


def whole(facts: StudentFacts) -> tuple[ConstraintKind, StudentFacts]:
    """The kind that would hold the student if all of it were trained, and the facts for it."""
    rest = replace(facts, train="all")
    return kind_of(rest), rest
