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
    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight [O, I] for one product: float32's numbers, in `dtype`. Where it must be made it may use `out`."""

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

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.held.to(dtype) if out is None or dtype == self.held.dtype else out.copy_(self.held)


class _Product(torch.autograd.Function):
    """x ↦ W x + b with a gradient for x alone. The layer is kept, not its weight: backward widens that anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        bias_O = None if layer.bias is None else layer.bias.detach().to(x.dtype)
        return linear(x, _widened(layer, x), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradient @ _widened(ctx.layer, gradient), None


_ROOM: dict[torch.dtype, Tensor] = {}
"""Where a CPU widens weights, as large as the largest so far. Between activations that stay, the C library would leave
the place of each wide weight empty."""


def _widened(layer: FrozenLinear, beside: Tensor) -> Tensor:
    """The weight for one product with `beside`, in its dtype; it is overwritten by the next one."""
    dtype, count = beside.dtype, layer.out_features * layer.in_features
    if beside.device.type != "cpu":
        return layer.dense(dtype)
    if dtype not in _ROOM or _ROOM[dtype].numel() < count:
        _ROOM[dtype] = torch.empty(count, dtype=dtype)
    return layer.dense(dtype, _ROOM[dtype][:count].view(layer.out_features, layer.in_features))
