"""Linear layers that are never trained, whose weights take few bytes and are widened where they are multiplied.

Under an adapter the base stays as it is, so its weights need no float32: what widening gives is what a float32 copy
would hold, and so are all products. The backward pass widens the weight once more; between the passes no wide copy is
alive.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is no parameter. A class that names this one as its base says how it is held.

    Args:
        layer: a plain layer of the same shape, whose bias is taken over.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.outline = torch.empty(layer.out_features, layer.in_features, device="meta")
        """Stands for the weight where its shape alone is asked for."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] for one product: float32's numbers, in `dtype`."""

    @property
    @abstractmethod
    def held_as(self) -> str:
        """The dtype or the grid of what is held, in words."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I] in float32, made anew each time it is asked for."""
        return self.dense(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """The product in autocast's dtype where that is on, else in the dtype of `x`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return cast(Tensor, _Product.apply(x.to(dtype), self))  # type: ignore[no-untyped-call]


class NarrowLinear(FrozenLinear):
    """One whose weight is held in bfloat16 or float16, as `held` [O, I]."""

    held: Tensor

    def __init__(self, layer: nn.Linear, held_OI: Tensor) -> None:
        super().__init__(layer)
        self.register_buffer("held", held_OI)

    @property
    def held_as(self) -> str:
        return str(self.held.dtype).removeprefix("torch.")

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.held.to(dtype)


class _Product(torch.autograd.Function):
    """x ↦ W x + b with a gradient for x alone. The layer is kept, not its weight: backward widens that anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        bias_O = None if layer.bias is None else layer.bias.detach().to(x.dtype)
        return linear(x, layer.dense(x.dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradient @ ctx.layer.dense(ctx.dtype), None
