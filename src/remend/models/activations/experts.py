"""Experts of one layer: which tokens each of them sees, and what its second product sees.

transformers keeps the experts of a layer in one module (`use_experts_implementation` in its module integrations.moe),
which is called with all tokens and the numbers of each token's experts. Nothing inside it is a module, so the inputs of
an expert's matrices are taken from the call: those of the first product are the tokens that were routed to it, those of
the second are computed from them by the module's own gate.

Legend: N real tokens, D width of the residual stream, K experts of a token, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remend.models.matrices import Matrix

Given = tuple[Any, ...]
Keywords = Mapping[str, Any]
"""What a module is called with."""


@dataclass(frozen=True)
class Routed:
    """What entered a module of experts: tokens [N, D], and for each the numbers [N, K] of its experts."""

    states_ND: Tensor
    chosen_NK: Tensor

    def to(self, expert: int) -> Tensor:
        """int64 [n]: which tokens an expert got."""
        return (self.chosen_NK == expert).any(dim=1).nonzero().flatten()


def joined(parts: Sequence[Routed]) -> Routed:
    """All tokens of several batches."""
    return Routed(torch.cat([p.states_ND for p in parts]), torch.cat([p.chosen_NK for p in parts]))


def routing(module: nn.Module, args: Given, keywords: Keywords) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, numbers of the chosen experts and their shares: the first three arguments of a module's call."""
    given = list(inspect.signature(type(module).forward).bind(module, *args, **keywords).arguments.values())
    return given[1], given[2], given[3]


class Experts:
    """A module of experts: for each expert the matrix of its first product (gate and up) and of its second (down)."""

    def __init__(self, module: nn.Module, matrices: Sequence[Matrix]) -> None:
        self.module = module
        self.first = [m for m in matrices if not _is_down(m)]
        self.second = [m for m in matrices if _is_down(m)]

    def inner(self, expert: int, states_ND: Tensor) -> Tensor:
        """[N, I]: what the second product of an expert sees where its first sees `states_ND`."""
        given = applied(self.first[expert], states_ND)
        inner: Tensor = self.module._apply_gate(given) if self.module.has_gate else self.module.act_fn(given)  # type: ignore[operator]
        return inner

    def output(self, states_ND: Tensor, chosen_NK: Tensor, shares_NK: Tensor) -> Tensor:
        """[N, D]: what the module ought to give."""
        total_ND = torch.zeros_like(states_ND, dtype=torch.float32)
        for expert, matrix in enumerate(self.second):
            rows, places = (chosen_NK == expert).nonzero(as_tuple=True)
            given = applied(matrix, self.inner(expert, states_ND[rows]))
            if getattr(self.module, "has_post_expert_norm", False):
                given = self.module.post_expert_norm(given)  # type: ignore[operator]
            total_ND.index_add_(0, rows, (given * shares_NK[rows, places, None]).float())
        return total_ND


def applied(matrix: Matrix, inputs_NI: Tensor) -> Tensor:
    """[N, O]: what the layer gives, its bias included."""
    return F.linear(inputs_NI, matrix.weight_OI, matrix.bias_O)


def _is_down(matrix: Matrix) -> bool:
    return matrix.parameter.endswith("down_proj")
