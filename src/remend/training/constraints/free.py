"""A student that is held to nothing: every weight moves. One with fewer or narrower layers is repaired at the cut."""

from __future__ import annotations

import torch
from torch import Tensor

from remend.models.activations.walk import Sites
from remend.models.layers import infer_layer_map
from remend.models.protocols import CausalLM
from remend.training.constraints.fitting import anchored_gram, shapes, target
from remend.training.constraints.kind import (
    NO_WEIGHTS,
    Calibration,
    Constraint,
    ConstraintKind,
    Shapes,
    Start,
    StudentFacts,
)


class Free(Constraint):
    """No constraint: every trainable parameter is its own master."""

    def __init__(self, model: CausalLM) -> None:
        self._parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def masters(self) -> dict[str, Tensor]:
        return dict(self._parameters)


class FreeKind(ConstraintKind):
    """Every student that no other kind holds."""

    def holds(self, facts: StudentFacts) -> bool:
        return True

    def describe(self, facts: StudentFacts) -> str:
        return "none"

    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        return Free(model)

    def no_repair(self, facts: StudentFacts, ours: Shapes, theirs: Shapes | None) -> str | None:
        """An uncut student, as a pruned one whose zeros are not held, has nothing to refit."""
        if theirs is None:
            return NO_WEIGHTS
        return None if _size(ours) < _size(theirs) else "none of its layers is missing or narrower than the teacher's"

    def repairs(self, model: CausalLM, facts: StudentFacts, teacher: CausalLM) -> bool:
        """Of one architecture and one residual stream, but fewer or narrower layers."""
        ours, theirs = model.config.get_text_config(), teacher.config.get_text_config()
        alike = ours.model_type == theirs.model_type and ours.hidden_size == theirs.hidden_size
        return bool(alike) and _size(shapes(model)) < _size(shapes(teacher))

    @torch.no_grad()
    def repair(self, model: CausalLM, facts: StudentFacts, calibration: Calibration) -> Start:
        """The layers are refitted to the teacher's streams."""
        layer_map = facts.layer_map or infer_layer_map(model, calibration.teacher)

        def visit(sites: Sites) -> None:
            gram_II = anchored_gram(sites)
            for at, matrix in enumerate(sites.matrices):
                matrix.weight_OI.copy_(target(sites, at, matrix.weight_OI.float(), gram_II))

        return Start(walked=calibration.walk(model, visit, "repairing at the cut", layer_map=layer_map))


def _size(matrices: Shapes) -> int:
    return sum(shape.numel() for shape in matrices.values())
