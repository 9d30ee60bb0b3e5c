"""A pruned student: its zeros stay zeros.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remend.errors import InputError

LEAST_SHARE = 0.01
"""Of exact zeros in a matrix: fewer are chance (underflow, an unused row), not pruning."""


class Masked:
    """The exact zeros of pruned matrices stay exactly zero; everything else is free.

    The mask is the zeros that the student came with. Gradients at them are dropped, so AdamW's moments there are 0 and
    an update moves nothing; after every update the mask is applied once more, whatever the optimizer did.

    Args:
        model: holds the pruned weights.

    Raises:
        InputError: no matrix holds enough zeros to be pruned.
    """

    def __init__(self, model: Any) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._kept = kept_weights(model)
        if not self._kept:
            raise InputError("no linear layer of the student holds zeros: there is no sparsity mask to keep")

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned matrices."""
        return 1 - sum(int(k.sum()) for k in self._kept.values()) / sum(k.numel() for k in self._kept.values())

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


def kept_weights(model: Any) -> dict[str, Tensor]:
    """For every pruned linear weight of the decoder (not head, not embeddings) a bool [O, I]: True where not zero."""
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            kept_OI = module.weight.detach() != 0
            if 1 - float(kept_OI.float().mean()) >= LEAST_SHARE:
                found[f"{name}.weight"] = kept_OI
    return found
