"""A student whose weights stay as they are while an adapter beside them is trained."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from remend.errors import InputError
from remend.models.adapters import is_adapted


class Adapter:
    """Only an adapter's parameters move (remend.models.adapters puts it into the model and is what freezes the rest).

    Whatever the base lies on, a grid or a mask, it keeps: none of its weights is written. The adapter is never merged.

    Args:
        model: carries an adapter, whose parameters are its only trainable ones, in float32.

    Raises:
        InputError: the model has no trainable adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not is_adapted(model) or not self._parameters:
            raise InputError("the model carries no adapter to train; add one with lora, or name an adapter's directory")

    def masters(self) -> dict[str, Tensor]:
        """See Constraint."""
        return dict(self._parameters)

    def take_gradients(self) -> None:
        """See Constraint."""

    def project(self) -> None:
        """See Constraint."""

    def save(self, directory: Path) -> None:
        """See Constraint. Nothing: models.save_model writes the adapter itself."""
