"""adamw-host: both moments in float32, in the host's memory; a GPU has none of them.

Tensor by tensor, master and gradient come to the host, are updated there, and the master goes back. A step is exactly
that of `adamw` on a CPU, in every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from remend.training.optimizers.kind import BETAS, EPSILON, OPTIMIZERS, Group, OptimizerKind

HOST = torch.device("cpu")


class HostAdamW(Optimizer):
    """AdamW whose state is on the CPU, wherever its parameters are.

    Args:
        groups: of float32 parameters, each with `params` and `weight_decay`.
        rate: of learning, until a group's `lr` says otherwise.
    """

    def __init__(self, groups: Sequence[Group], rate: float) -> None:
        super().__init__(list(groups), {"lr": rate, "betas": BETAS, "eps": EPSILON, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: Group) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            moments = (torch.zeros_like(parameter, device=HOST) for _ in range(2))
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = moments
        assert parameter.grad is not None
        here, gradient = parameter.to(HOST), parameter.grad.to(HOST)
        adamw(
            [here],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if here is not parameter:
            parameter.copy_(here)


class OnHost(OptimizerKind):
    """The moments on the host."""

    def make(self, groups: Sequence[Group], rate: float) -> Optimizer:
        return HostAdamW(groups, rate)

    def restore(self, optimizer: Optimizer, master: Tensor, saved: Mapping[str, Tensor], step: int) -> None:
        moments: dict[str, Any] = {key: torch.empty_like(master, device=HOST).copy_(saved[key]) for key in self.saved}
        optimizer.state[master] = {"step": torch.tensor(float(step)), **moments}


OPTIMIZERS.register("adamw-host", source="ZeRO-Offload, arXiv 2101.06840")(OnHost())
