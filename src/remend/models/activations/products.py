"""Sums over calibration tokens, as fast as the forward passes that give them.

Legend: N tokens, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

ROWS = 2048
"""Tokens a product: its entries are rounded once where the passes run in bfloat16, and then added in float32."""


def products(outputs_NO: Tensor, inputs_NI: Tensor, precision: AbstractContextManager[object] | None = None) -> Tensor:
    """Σ y xᵀ over the tokens: float32 [O, I].

    A layer that multiplies in bfloat16 sees its inputs rounded to it, so the sum may as well; every partial sum is off
    by up to 2⁻⁹ of itself, far less than what other text changes.

    Args:
        outputs_NO, inputs_NI: float32.
        precision: context in which a product of two float32 matrices is taken on a CPU; None keeps float32, and so does
            a GPU, which is fast enough in it.
    """
    if precision is None or inputs_NI.device.type != "cpu":
        return outputs_NO.T @ inputs_NI
    total_OI = inputs_NI.new_zeros(outputs_NO.shape[1], inputs_NI.shape[1])
    for start in range(0, len(inputs_NI), ROWS):
        with precision:
            part_OI = torch.mm(outputs_NO[start : start + ROWS].T, inputs_NI[start : start + ROWS])
        total_OI += part_OI
    return total_OI
