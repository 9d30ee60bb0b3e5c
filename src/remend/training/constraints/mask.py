"""A pruned student: its zeros stay zeros.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

import torch

from remend.compression.recognise import was_pruned
from remend.compression.solvers import refit_kept
from remend.errors import InputError
from remend.models.activations.walk import Sites
from remend.models.layers import kept_weights
from remend.models.matrices import matrices
from remend.models.protocols import CausalLM
from remend.models.written import RECORD
from remend.training.constraints.fitting import Priors, anchored_gram, targets
from remend.training.constraints.free import Free
from remend.training.constraints.kind import (
    RATE,
    Calibration,
    Constraint,
    ConstraintKind,
    Shapes,
    Start,
    StudentFacts,
    other_shapes,
)


class Masked(Free):
    """The exact zeros of linear weights stay exactly zero; everything else is free.

    The mask is the zeros that the student came with. Gradients at them are dropped, so AdamW's moments there are 0 and
    an update moves nothing; after every update the mask is applied once more, whatever the optimizer did.

    Args:
        model: holds the pruned weights.

    Raises:
        InputError: no linear layer holds a zero.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__(model)
        kept = kept_weights(model)
        self._kept = [(matrix, kept[matrix.key]) for matrix in matrices(model).values() if matrix.key in kept]
        if not self._kept:
            raise InputError("no linear layer of the student holds zeros: there is no sparsity mask to keep")

    @torch.no_grad()
    def take_gradients(self) -> None:
        """The gradient at a zero is dropped before clipping, so it takes no part in the norm."""
        for matrix, kept_OI in self._kept:
            gradient = self._parameters[matrix.parameter].grad
            if gradient is not None:
                matrix.of(gradient).mul_(kept_OI)

    @torch.no_grad()
    def project(self) -> None:
        for matrix, kept_OI in self._kept:
            matrix.weight_OI.mul_(kept_OI)


class MaskKind(ConstraintKind):
    """Students with more exact zeros than chance gives, or whose record names them."""

    def holds(self, facts: StudentFacts) -> bool:
        return facts.recognised.mask

    def describe(self, facts: StudentFacts) -> str:
        """The share of zeros and their pattern."""
        zeros, pattern = facts.recognised.sparsity, facts.recognised.pattern
        return f"mask, {zeros:.1%} zeros" + (f" ({pattern})" if pattern else "")

    def lost(self, facts: StudentFacts) -> str | None:
        directory, gone = facts.directory, not facts.recognised.mask and not facts.as_dense
        if not directory or not gone or not was_pruned(directory):
            return None
        return (
            f"{directory / RECORD} says that {facts.record['sparsity']:.1%} of the weights are zero, and the files "
            "hold no zeros: they are another model's. Put the pruned weights back, or say --as dense"
        )

    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        return Masked(model)

    def no_repair(self, facts: StudentFacts, ours: Shapes, theirs: Shapes | None) -> str | None:
        return other_shapes(ours, theirs)

    def repair(self, model: CausalLM, facts: StudentFacts, calibration: Calibration) -> Start:
        """What the mask left is refitted."""
        return repair_mask(model, calibration)

    def learning_rate(self, facts: StudentFacts, *, repaired: bool) -> float:
        """Under a mask even a repaired student is still far from its goal."""
        return RATE


@torch.no_grad()
def repair_mask(student: CausalLM, calibration: Calibration) -> Start:
    """Refit what the mask left, in place; the zeros stay where they are."""
    healthy = Priors(calibration.teacher)

    def visit(sites: Sites) -> None:
        gram_II = anchored_gram(sites)
        kept = {matrix.key: matrix.weight_OI != 0 for matrix in sites.matrices}
        pruned = [key for key, kept_OI in kept.items() if not bool(kept_OI.all())]
        for matrix, target_OI in targets(sites, healthy, gram_II, pruned):
            matrix.weight_OI.copy_(refit_kept(target_OI, gram_II, kept[matrix.key]))

    return Start(walked=calibration.walk(student, visit, "repairing under the mask"))
