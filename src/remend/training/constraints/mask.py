"""A pruned student: its zeros stay zeros.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remend.errors import InputError
from remend.models.layers import kept_weights


class Masked:
    """The exact zeros of linear weights stay exactly zero; everything else is free.

    The mask is the zeros that the student came with. Gradients at them are dropped, so AdamW's moments there are 0 and
    an update moves nothing; after every update the mask is applied once more, whatever the optimizer did.

    Args:
        model: holds the pruned weights.

    Raises:
        InputError: no linear layer holds a zero.
    """

    def __init__(self, model: Any) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._kept = kept_weights(model)
        if not self._kept:
            raise InputError("no linear layer of the student holds zeros: there is no sparsity mask to keep")

    def masters(self) -> dict[str, Tensor]:
        """See Constraint."""
        return dict(self._parameters)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """See Constraint. The gradient at a zero is dropped before clipping, so it takes no part in the norm."""
        for name, kept_OI in self._kept.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.mul_(kept_OI)

    @torch.no_grad()
    def project(self) -> None:
        """See Constraint."""
        for name, kept_OI in self._kept.items():
            self._parameters[name].mul_(kept_OI)

    def save(self, directory: Path) -> None:
        """See Constraint. Nothing: the zeros are in the weights."""
