"""Where AdamW's moments live, and in how many bits. Each file here adds one way; importing it registers it.

What moves is the same everywhere: AdamW (arXiv 1711.05101) with decoupled decay, on float32 masters. No way holds
second moments in bfloat16: once gradients fall they would stay too large, since a small step of the average rounds to
none.
"""

from remend.registry import register_all
from remend.training.optimizers.kind import OPTIMIZERS, Group, OptimizerKind

__all__ = ["OPTIMIZERS", "Group", "OptimizerKind"]

register_all(__name__)
