"""What training must not give back: the quantization grid or the zeros that a student came with.

A constraint stands between model and optimizer. The model holds the weights as they are served; the optimizer moves
float32 masters. After the backward pass the gradients at the served weights are handed to the masters unchanged
(the straight-through estimator, Bengio et al., arXiv 1308.3432), and after the update the served weights are written
anew. So a weight is quantized once per update, and sampling, scoring and saving see plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from remend.compression.stored_grid import GRID_FILE, StoredGrid
from remend.models.adapters import is_adapted
from remend.training.constraints.adapter import Adapter
from remend.training.constraints.free import Constraint, Free
from remend.training.constraints.grid import OnGrid, check_learnable
from remend.training.constraints.healthy import freeze_healthy_embeddings
from remend.training.constraints.mask import Masked

__all__ = [
    "GRID_FILE",
    "Adapter",
    "Constraint",
    "Free",
    "Masked",
    "OnGrid",
    "StoredGrid",
    "check_learnable",
    "constraint_of",
    "freeze_healthy_embeddings",
]


def constraint_of(
    model: nn.Module,
    stored: StoredGrid | None,
    *,
    masked: bool = False,
    origin: Any = None,
    masters: Mapping[str, Tensor] | None = None,
    margin: float = 0.0,
    scales: Literal["fixed", "learned"] = "fixed",
) -> Free | OnGrid | Masked | Adapter:
    """The constraint of a student as it was recognised (remend.compression.recognise).

    Where the model carries an adapter, that alone is trained. `stored` is its grid and `masked` says that its zeros
    stay; `origin` is the teacher's model, or None; for the rest see OnGrid.
    """
    if is_adapted(model):
        return Adapter(model)
    if masked:
        return Masked(model)
    if stored is None:
        return Free(model)
    originals = dict(origin.named_parameters()) if origin is not None else None
    return OnGrid(model, stored, origin=originals, masters=masters, margin=margin, scales=scales)
