"""adamw: both moments in float32, beside the masters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from remend.training.optimizers.kind import BETAS, EPSILON, OPTIMIZERS, Group, OptimizerKind


class Beside(OptimizerKind):
    """torch's fused AdamW."""

    def make(self, groups: Sequence[Group], rate: float) -> Optimizer:
        return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPSILON, fused=True)

    def restore(self, optimizer: Optimizer, master: Tensor, saved: Mapping[str, Tensor], step: int) -> None:
        moments = {key: torch.empty_like(master).copy_(saved[key]) for key in self.saved}
        optimizer.state[master] = {"step": torch.tensor(float(step), device=master.device), **moments}


OPTIMIZERS.register("adamw", source="arXiv 1711.05101")(Beside())
