"""adamw-8bit: both moments in 8 bits, block by block (arXiv 2110.02861), by the package bitsandbytes.

Tensors of fewer than 4,096 values keep theirs in float32, as bitsandbytes does.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from remend.training.optimizers.kind import BETAS, EPSILON, OPTIMIZERS, Group, OptimizerKind

PACKAGE = "bitsandbytes"

_TRIED = 8192
"""Values of the tensor that it is tried on: enough to be held in 8 bits."""


class EightBit(OptimizerKind):
    """bitsandbytes' AdamW8bit."""

    saved = ("state1", "state2", "absmax1", "absmax2")

    def make(self, groups: Sequence[Group], rate: float) -> Optimizer:
        made: Optimizer = importlib.import_module(PACKAGE).optim.AdamW8bit(groups, lr=rate, betas=BETAS, eps=EPSILON)
        return made

    def problem(self, device: torch.device) -> str | None:
        """A small step is tried, since what a release can do depends on the device."""
        instead = "take optimizer: adamw-host, which is exact and needs no package, or adamw"
        if importlib.util.find_spec(PACKAGE) is None:
            return (
                f"optimizer: adamw-8bit needs the package {PACKAGE}, which is not installed: pip install {PACKAGE}. "
                f"Or {instead}"
            )
        try:
            why = self._tried(device)
        except Exception as error:  # each backend has its own way to say what it lacks
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"optimizer: adamw-8bit can't be had on {device} ({why}); {instead}" if why else None

    def _tried(self, device: torch.device) -> str | None:
        """What is wrong with a tensor's first step, in which AdamW moves every value by the rate; None for nothing."""
        master = torch.zeros(_TRIED, device=device)
        master.grad = torch.ones(_TRIED, device=device)
        self.make([{"params": [master], "weight_decay": 0.0}], 0.5).step()
        near = torch.allclose(master, torch.full_like(master, -0.5), atol=0.05)
        return None if near else "its first step is not AdamW's"

    def restore(self, optimizer: Optimizer, master: Tensor, saved: Mapping[str, Tensor], step: int) -> None:
        bits: Any = optimizer
        places = [
            (g, i) for g, group in enumerate(bits.param_groups) for i, p in enumerate(group["params"]) if p is master
        ]
        for group, at in places:
            bits.init_state(bits.param_groups[group], master, group, at)
        state = optimizer.state[master]
        for key, tensor in saved.items():
            state[key].copy_(tensor)
        state["step"] = step


OPTIMIZERS.register("adamw-8bit", source="arXiv 2110.02861")(EightBit())
