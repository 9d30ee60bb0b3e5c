"""The contract of a constraint, and the constraint of a student that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn


class Constraint(Protocol):
    """What the loop needs to know of a constraint."""

    def masters(self) -> dict[str, Tensor]:
        """The float32 tensors that the optimizer moves, by parameter name; a checkpoint holds these."""
        ...

    def take_gradients(self) -> None:
        """After the last backward pass of a step: make every master's `.grad` hold its gradient."""
        ...

    def project(self) -> None:
        """After an update, or after masters were loaded: write the weights as served, on the constraint."""
        ...

    def save(self, directory: Path) -> None:
        """Write what describes the constraint beside a saved model."""
        ...


class Free:
    """No constraint: every trainable parameter is its own master."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def masters(self) -> dict[str, Tensor]:
        """See Constraint."""
        return dict(self._parameters)

    def take_gradients(self) -> None:
        """See Constraint."""

    def project(self) -> None:
        """See Constraint."""

    def save(self, directory: Path) -> None:
        """See Constraint."""
