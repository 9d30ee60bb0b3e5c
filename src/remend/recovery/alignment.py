"""Representation alignment as a second training signal (after arXiv 2606.05682): off by default.

While student and teacher score the same completion tokens, the outputs of chosen blocks are kept, and

    cka  1 − debiased linear CKA of a micro-batch's completion tokens, a layer's mean
    l2   ‖student − teacher‖² / ‖teacher‖², a layer's mean

is added to the divergence. The two are balanced by their gradients at those blocks' outputs: at the first step and
every BALANCE_EVERY steps the factor is set so that the alignment's gradient is `weight` times as long as the
divergence's.

Legend: N completion tokens, D width, B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remend.maths.cka import cka_alignment
from remend.models.layers import decoder_layers
from remend.models.scorer import Packed

BALANCE_EVERY = 10

LEAST_TOKENS = 8
"""A micro-batch with fewer completion tokens gives no alignment: CKA needs 4, and is wild there."""


@dataclass
class Seen:
    """What one forward pass of a model showed: its chosen blocks' outputs [B, T, D], and how its batch is laid out."""

    states: list[Tensor] = field(default_factory=list)
    batch: Packed | None = None

    @contextmanager
    def by(self, alignment: Alignment | None, whose: str, batch: Packed) -> Iterator[None]:
        """Look at the forward pass inside, where there is an alignment."""
        if alignment is None:
            yield
            return
        with alignment.watching(whose) as self.states:
            yield
        self.batch = batch


class Alignment:
    """Keeps the chosen blocks' outputs of both models, and makes the loss of them.

    Args:
        measure: cka or l2.
        weight: length of its gradient as a share of the divergence's.
        pairs: the student's layers and the teacher's that they are compared with.
        student, teacher: transformers models.
    """

    def __init__(
        self, measure: str, weight: float, pairs: Sequence[tuple[int, int]], student: Any, teacher: Any
    ) -> None:
        self.measure, self.weight = measure, weight
        blocks = [list(decoder_layers(model)) for model in (student, teacher)]
        self._student = [blocks[0][ours] for ours, _ in pairs]
        self._teacher = [blocks[1][theirs] for _, theirs in pairs]
        self.scale = 0.0
        self._balanced = 0

    @contextmanager
    def watching(self, whose: str) -> Iterator[list[Tensor]]:
        """Outputs [B, T, D] of the chosen blocks of 'student' or 'teacher', in order."""
        found: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        # gone before the backward pass, where recomputed layers would call them again
        handles = [m.register_forward_hook(hook) for m in (self._student if whose == "student" else self._teacher)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, ours: Seen, theirs: Seen) -> Tensor | None:
        """Mean over layers at the positions that predict completion tokens; None for too small a micro-batch."""
        assert ours.batch is not None
        assert theirs.batch is not None
        if len(ours.batch.targets_N) < LEAST_TOKENS:
            return None
        measure = _cka if self.measure == "cka" else _l2
        pairs = zip(ours.states, theirs.states, strict=True)
        return torch.stack([measure(ours.batch.gather(a), theirs.batch.gather(b)) for a, b in pairs]).mean()

    def due(self, step: int) -> bool:
        """Whether the factor is to be set anew before this step's first micro-batch."""
        return self._balanced != step and (step - 1) % BALANCE_EVERY == 0

    def balance(self, step: int, divergence: Tensor, ours: Seen, theirs: Seen) -> None:
        """Set the factor. `divergence` is a mean a token; its graph is spent."""
        self._balanced = step
        aligned = self.loss(ours, theirs)
        if aligned is None:
            return
        lengths = []
        for loss in (aligned, divergence):
            gradients = torch.autograd.grad(loss, ours.states, retain_graph=loss is aligned, allow_unused=True)
            squares = [g.float().square().sum() for g in gradients if g is not None]
            lengths.append(float(torch.stack(squares).sum().sqrt()) if squares else 0.0)
        if lengths[0] > 0:
            self.scale = self.weight * lengths[1] / lengths[0]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"alignment.scale": torch.tensor(self.scale, dtype=torch.float64)}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self.scale = float(saved["alignment.scale"])


def _cka(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    return 1 - cka_alignment(ours_ND, theirs_ND)


def _l2(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    dtype = torch.promote_types(ours_ND.dtype, torch.float32)
    theirs_ND = theirs_ND.to(dtype)
    return (ours_ND.to(dtype) - theirs_ND).square().sum() / theirs_ND.square().sum().clamp(min=1e-12)


def pairs_of(layers: Sequence[int] | None, layer_map: Sequence[int]) -> list[tuple[int, int]]:
    """The student's layers, all or the chosen ones, with the teacher's that each is."""
    chosen = range(len(layer_map)) if layers is None else layers
    return [(layer, layer_map[layer]) for layer in chosen]
