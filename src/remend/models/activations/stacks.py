"""Stacks: parameters that hold several matrices, and that the model's own code multiplies (`matrices.STACKS`).

Which tokens reach which matrix is known to that code alone, so the products themselves are watched: what is multiplied
by a part of the parameter is that matrix's input. A sequence has to run alone, since nothing tells which rows of a
product are padding.

Legend: N tokens, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from remend.models.activations.passes import HiddenBatch, Settled, run_block
from remend.models.matrices import Matrix

_INPUTS = {"linear": 0, "matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Which argument of a product is its input; the next one is its weight."""


class Products(TorchFunctionMode):
    """While it is entered, keeps what is multiplied by matrices of a stack.

    inputs: [N, I] for each matrix that was multiplied, in the order of the products. Rows of zeros are left out: some
        models give them to the experts that a token was not sent to.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self._starts = {matrix.weight_OI.data_ptr(): at for at, matrix in enumerate(matrices)}
        self._matrices = list(matrices)
        self.inputs: dict[Matrix, list[Tensor]] = {}

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        place = _INPUTS.get(name)
        weight = args[place + 1] if place is not None and len(args) > place + 1 else None
        if place is not None and isinstance(weight, Tensor) and weight.ndim in (2, 3):
            self._note(args[place], weight if name == "linear" else weight.mT)
        return function(*args, **(kwargs or {}))

    def _note(self, inputs: Tensor, weight_OI: Tensor) -> None:
        """Keep the inputs of a product with one matrix, or with all of them: then both have a dimension for them."""
        at = self._starts.get(weight_OI.data_ptr())
        if at is None:
            return
        one = weight_OI.ndim == 2
        if not one and (inputs.ndim != 3 or len(inputs) != len(weight_OI)):
            return
        parts = [(inputs, weight_OI)] if one else zip(inputs, weight_OI, strict=True)
        for matrix, (given, part_OI) in zip(self._matrices[at:], parts, strict=False):
            if _place(matrix.weight_OI) == _place(part_OI):
                x_NI = given.reshape(-1, given.shape[-1])
                self.inputs.setdefault(matrix, []).append(x_NI[x_NI.any(dim=-1)])


def _place(weight_OI: Tensor) -> tuple[object, ...]:
    """Where it lies and how it is read: a matrix that is read the other way round is another."""
    return weight_OI.data_ptr(), weight_OI.shape, weight_OI.stride()


@torch.no_grad()
def inputs_of(
    matrices: Sequence[Matrix],
    block: nn.Module,
    batches: Sequence[HiddenBatch],
    index: int,
    settled: Settled | None = None,
) -> dict[Matrix, Tensor]:
    """[N, I] for each of the matrices that a block's forward pass multiplied, in the order of its products.

    Args:
        matrices: of one stack, or those of some of its parameters, ordered as these hold them.
        block, batches, index: the block that holds it, and what enters that; each batch has one sequence.
        settled: what of the block need not be computed again.
    """
    products = Products(matrices)
    for number, batch in enumerate(batches):
        with settled.at(number) if settled else nullcontext(), products:
            run_block(block, batch, index)
    return {matrix: torch.cat(parts) for matrix, parts in products.inputs.items()}
