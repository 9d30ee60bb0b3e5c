"""After its layers were refitted in closed form, a block is trained: its output shall come nearer to the teacher's.

The closed form fits one layer after the other. Gradients through the block move all of its matrices together, on the
text that repair has anyway, while everything but this block stands still (block-wise training of all parameters,
EfficientQAT, arXiv 2407.11062; on rounding alone, AutoRound, arXiv 2309.05516).

Legend: N real tokens, D width of the residual stream, O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from remend.models.activations.passes import HiddenBatch, run_block
from remend.models.matrices import Matrix

RATE = 5e-4
"""Adam's first step size; it falls along a line to LAST of that. Measured: docs/measurements/degradations.md."""
LAST = 0.1
BETAS = (0.9, 0.95)


@dataclass
class Moving:
    """One matrix of the block.

    master_OI: float32, what Adam moves.
    serve: writes what the master stands for into the model's weight, on the constraint.
    """

    matrix: Matrix
    master_OI: Tensor
    serve: Callable[[Tensor], None]


@dataclass(frozen=True)
class Trainable:
    """What of a student's blocks can be trained, and who is told of it.

    moving: the matrices of a block, by key, after they were fitted.
    trained: told of them where their training was kept.
    """

    moving: Callable[[nn.Module], Mapping[str, Moving]]
    trained: Callable[[Mapping[str, Moving]], None] = lambda _: None


def served_as_they_are(visited: Mapping[str, Matrix], block: nn.Module) -> dict[str, Moving]:
    """Those of the visited matrices that are a block's; the zeros that they hold stay zeros."""
    inside, moving = set(block.modules()), {}
    for key, matrix in visited.items():
        if matrix.module in inside:
            weight_OI = matrix.weight_OI
            kept_OI = weight_OI != 0
            moving[key] = Moving(matrix, weight_OI.float().clone(), partial(_serve, matrix, kept_OI))
    return moving


def _serve(matrix: Matrix, kept_OI: Tensor, master_OI: Tensor) -> None:
    matrix.weight_OI.copy_(master_OI * kept_OI)


@dataclass(frozen=True)
class BlockTraining:
    """How blocks are trained.

    passes: over the text; 0 trains nothing.
    seed: of the order of the batches.
    """

    passes: float = 0.0
    seed: int = 0
    rate: float = RATE

    def train(
        self,
        index: int,
        block: nn.Module,
        batches: Sequence[HiddenBatch],
        taught: Sequence[HiddenBatch],
        moving: Mapping[str, Moving],
        error: Callable[[], float] | None,
    ) -> bool:
        """Train a block in place; what does harm on other text is taken back. Returns whether it was kept.

        Args:
            index, block: of the student.
            batches: what enters the block.
            taught: the teacher's stream behind it, batch for batch.
            moving: its matrices by key, whose weights are those that their masters stand for.
            error: of the block's output on text that nothing is fitted to; None where there is none.
        """
        steps = round(self.passes * len(batches))
        if not steps or not moving:
            return False
        before = {key: (one.matrix.weight_OI.clone(), one.master_OI.clone()) for key, one in moving.items()}
        error_before = error() if error else 0.0
        self._steps(index, block, batches, taught, list(moving.values()), steps)
        if error is None or error() <= error_before:
            return True
        with torch.no_grad():
            for key, (weight_OI, master_OI) in before.items():
                moving[key].matrix.weight_OI.copy_(weight_OI)
                moving[key].master_OI.copy_(master_OI)
        return False

    def _steps(
        self,
        index: int,
        block: nn.Module,
        batches: Sequence[HiddenBatch],
        taught: Sequence[HiddenBatch],
        moving: Sequence[Moving],
        steps: int,
    ) -> None:
        parameters = dict(block.named_parameters())
        trained = {id(parameter): parameter.requires_grad for parameter in parameters.values()}
        weights = {id(p): p for one in moving for p in [one.matrix.whole]}
        order = _order(len(batches), steps, f"{self.seed} {index}")
        optimizer = torch.optim.Adam([one.master_OI for one in moving], lr=self.rate, betas=BETAS)
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(id(parameter) in weights)
            for step, number in enumerate(order):
                with torch.enable_grad():
                    _loss(block, batches[number], taught[number], index).backward()  # type: ignore[no-untyped-call]
                for one in moving:
                    gradient = one.matrix.whole.grad
                    one.master_OI.grad = None if gradient is None else one.matrix.of(gradient).float()
                for weight in weights.values():
                    weight.grad = None
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * (1 - (1 - LAST) * step / steps)
                optimizer.step()
                for one in moving:
                    one.serve(one.master_OI)
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(trained[id(parameter)])
                parameter.grad = None


def _order(count: int, steps: int, seed: str) -> list[int]:
    """Of the batches, each once before one comes again."""
    drawn, numbers = random.Random(seed), list(range(count))
    order: list[int] = []
    while len(order) < steps:
        drawn.shuffle(numbers)
        order += numbers
    return order[:steps]


def _loss(block: nn.Module, batch: HiddenBatch, taught: HiddenBatch, index: int) -> Tensor:
    """The mean over tokens of the squared distance to the teacher's stream, relative to its size."""
    given_ND = run_block(block, batch, index)[batch.real_BT].float()
    wanted_ND = taught.states_BTD[batch.real_BT].float()
    size_N = wanted_ND.square().sum(-1).clamp_min(1e-12)
    return ((given_ND - wanted_ND).square().sum(-1) / size_N).mean()
