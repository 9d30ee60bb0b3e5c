"""What a way to hold AdamW's state is: it makes a torch optimizer, and says what of that a checkpoint holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from remend.registry import Registry

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""torch's own defaults."""

Group = dict[str, Any]
"""Masters that share a weight decay: `params` and `weight_decay`."""


class OptimizerKind(Protocol):
    """One way. A class that names this one as its base need only write `make`."""

    saved: Sequence[str] = ("exp_avg", "exp_avg_sq")
    """Keys of the state of a master that a checkpoint holds, as far as it has them. Its step is the checkpoint's."""

    @abstractmethod
    def make(self, groups: Sequence[Group], rate: float) -> Optimizer:
        """The optimizer; its masters are float32, and `rate` is the learning rate at the start."""

    def problem(self, device: torch.device) -> str | None:
        """Why it can't be had here, and what to do; None where it can. Asked before anything is loaded."""
        return None

    def state(self, optimizer: Optimizer, master: Tensor) -> dict[str, Tensor]:
        """What a checkpoint holds of one master's state; empty where it never had a gradient."""
        of: Mapping[str, Any] = optimizer.state[master]
        return {key: of[key] for key in self.saved if key in of}

    @abstractmethod
    def restore(self, optimizer: Optimizer, master: Tensor, saved: Mapping[str, Tensor], step: int) -> None:
        """Inverse of `state`, after `step` steps."""


OPTIMIZERS: Registry[OptimizerKind] = Registry("optimizer")
