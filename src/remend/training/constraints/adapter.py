"""A student whose weights stay as they are while an adapter beside them is trained."""

from __future__ import annotations

from dataclasses import replace

from remend.errors import InputError
from remend.models.adapters import is_adapted
from remend.models.protocols import CausalLM
from remend.training.constraints.free import Free
from remend.training.constraints.kind import Constraint, ConstraintKind, Shapes, Start, StudentFacts, kind_of

ADAPTER_RATE = 2e-3
"""As in `degrade finetune`."""


class Adapter(Free):
    """Only an adapter's parameters move (remend.models.adapters puts it into the model and is what freezes the rest).

    Whatever the base lies on, a grid or a mask, it keeps: none of its weights is written. The adapter is never merged,
    and models.save_model writes it.

    Args:
        model: carries an adapter, whose parameters are its only trainable ones, in float32.

    Raises:
        InputError: the model has no trainable adapter.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__(model)
        if not is_adapted(model) or not self._parameters:
            raise InputError("the model carries no adapter to train; add one with lora, or name an adapter's directory")


class AdapterKind(ConstraintKind):
    """Students beside which an adapter is trained."""

    def holds(self, facts: StudentFacts) -> bool:
        return facts.adapted

    def describe(self, facts: StudentFacts) -> str:
        """What the base keeps."""
        base = replace(facts, adapted=False)
        return kind_of(base).describe(base)

    def check(self, model: CausalLM, facts: StudentFacts) -> None:
        """A base under which the adapter is still to be put is what its files promise."""
        if not is_adapted(model):
            base = replace(facts, adapted=False)
            kind_of(base).check(model, base)

    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        return Adapter(model)

    def no_repair(self, facts: StudentFacts, ours: Shapes, theirs: Shapes | None) -> str | None:
        return "an adapter is trained, and the weights under it stay"

    def learning_rate(self, facts: StudentFacts, *, repaired: bool) -> float:
        return ADAPTER_RATE
