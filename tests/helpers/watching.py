"""What each matrix of a model multiplies, seen from below: at the products themselves, sequence by sequence.

Knows nothing of modules, hooks, batches, padding or routing, so the walk can be held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from campaign.zoo import MODELS
from remend.models.matrices import matrices
from remend.models.sampling.rollout import Rollout


def architecture(name: str) -> Any:
    """A tiny model of the zoo, with noise in its vectors and in all numbers that start at a constant."""
    torch.manual_seed(0)
    model = MODELS[name]().float().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1) if parameter.ndim == 1 else parameter.mul_(3.0)
    return model


class Watching(TorchFunctionMode):
    """While it is entered, sums x xᵀ of everything that is multiplied by a matrix of the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._matrices = {matrix.weight_OI.data_ptr(): matrix for matrix in matrices(model).values()}
        self.grams: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), keywords: Any = None) -> Any:
        place = {"linear": 0, "matmul": 0, "__matmul__": 0, "addmm": 1}.get(getattr(function, "__name__", ""))
        if place is not None:
            inputs, weight = args[place], args[place + 1]
            matrix = self._matrices.get(weight.data_ptr())
            if matrix is not None and matrix.weight_OI.numel() == weight.numel():
                x_NI = inputs.reshape(-1, inputs.shape[-1]).double()
                gram_II = self.grams.setdefault(matrix.name, torch.zeros(2 * [x_NI.shape[1]], dtype=torch.float64))
                gram_II += x_NI.T @ x_NI
                self.rows[matrix.name] = self.rows.get(matrix.name, 0) + len(x_NI)
        return function(*args, **(keywords or {}))


@torch.no_grad()
def watched(model: Any, text: Sequence[Rollout]) -> Watching:
    """Grams and rows of plain passes of transformers, one sequence at a time, experts in transformers' own loop."""
    for part in model.modules():
        if getattr(part, "config", None) is not None:
            part.config._experts_implementation = "eager"
    watching = Watching(model)
    with watching:
        for row in text:
            model(input_ids=torch.tensor([[*row.prompt, *row.completion]]), use_cache=False)
    return watching
