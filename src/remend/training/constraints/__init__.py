"""What training must not give back: the quantization grid or the zeros that a student came with.

A constraint stands between model and optimizer. The model holds the weights as they are served; the optimizer moves
float32 masters. After the backward pass the gradients at the served weights are handed to the masters unchanged
(the straight-through estimator, Bengio et al., arXiv 1308.3432), and after the update the served weights are written
anew. So a weight is quantized once per update, and sampling, scoring and saving see plain tensors.
"""

from __future__ import annotations

from remend.training.constraints.adapter import Adapter, AdapterKind
from remend.training.constraints.free import Free, FreeKind
from remend.training.constraints.grid import GridKind, OnGrid
from remend.training.constraints.healthy import freeze_healthy_embeddings
from remend.training.constraints.kind import (
    CONSTRAINTS,
    Calibration,
    Constraint,
    ConstraintKind,
    Start,
    StudentFacts,
    kind_of,
)
from remend.training.constraints.last import LastKind
from remend.training.constraints.mask import Masked, MaskKind
from remend.training.constraints.scales import NormsKind, OnScales, ScalesKind

__all__ = [
    "CONSTRAINTS",
    "Adapter",
    "Calibration",
    "Constraint",
    "ConstraintKind",
    "Free",
    "Masked",
    "OnGrid",
    "OnScales",
    "Start",
    "StudentFacts",
    "freeze_healthy_embeddings",
    "kind_of",
]

# the last of them is asked first, so this is the order from the most general to the most particular
CONSTRAINTS.register("free", source="every weight moves")(FreeKind())
CONSTRAINTS.register("grid", source="straight-through estimator, arXiv 1308.3432")(GridKind())
CONSTRAINTS.register("mask", source="SparseGPT's zeros, arXiv 2301.00774")(MaskKind())
CONSTRAINTS.register("norms", source="every vector, and no matrix")(NormsKind())
CONSTRAINTS.register("scales", source="EfficientQAT's end-to-end phase, arXiv 2407.11062")(ScalesKind())
CONSTRAINTS.register("last", source="Reassessing Layer Pruning in LLMs, arXiv 2411.15558")(LastKind())
CONSTRAINTS.register("adapter", source="LoRA, arXiv 2106.09685")(AdapterKind())
