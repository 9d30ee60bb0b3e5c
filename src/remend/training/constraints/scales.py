"""Train little of a student: the scales of its grid and its norms, or its norms alone.

The codes of a grid stay, and what they are multiplied with moves end to end, as in the second phase of EfficientQAT
(arXiv 2407.11062). No matrix has a master or moments, so that the optimizer holds a group's worth less.

Legend: O rows (outputs), I columns (inputs), K groups a row, G group size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import ref

import torch
from torch import Tensor

from remend.compression.formats import GridFormat
from remend.compression.grids import Grid, decode, rescale
from remend.compression.stored_grid import StoredGrid
from remend.models.matrices import Matrix, by_key
from remend.models.protocols import CausalLM
from remend.training.constraints.kind import Constraint, Start, StudentFacts
from remend.training.constraints.part import OnPart, PartKind

SCALES_RATE = 1e-3
"""AdamW's peak of scales, which move by a share of themselves, and of norms, whose weights are near 1."""

FINE_SCALES = (torch.float16, torch.float32)
"""Stored types in which a scale can move by small steps."""


@dataclass
class _Held:
    """One matrix: its codes, the grid that it came on, and what moves that.

    factors: [O, K], the logarithm of what scales (and minimums) are multiplied by. shifts: [O, K], what is added to
    zeros, or to minimums in units of the scale; None where the format stores none that can move.
    """

    matrix: Matrix
    codes: Tensor
    grid: Grid
    factors: Tensor
    shifts: Tensor | None

    def moved(self, fmt: GridFormat) -> Grid:
        """The grid as it is now, rounded to the format's storage."""
        zeros = self.grid.zeros
        if zeros is not None and self.shifts is not None and fmt.zero is not None:
            step = self.grid.scales if fmt.form == "minimum" else 1.0
            zeros = (zeros + step * self.shifts).to(fmt.zero).float()
        return rescale(Grid(self.grid.scales, zeros, self.grid.outer), self.factors.exp(), fmt)


class OnScales(Constraint):
    """A grid's codes stand still; its scales and zeros move, and all vectors of the model (norms, biases).

    Args:
        model: holds the quantized weights already. Every parameter that is neither on the grid nor a vector stops to
            need a gradient.
        stored: the grid.
        scales: whether scales and zeros move; if not, vectors alone do.

    Raises:
        InputError: the weights are not the ones that the grid describes.
    """

    def __init__(self, model: CausalLM, stored: StoredGrid, *, scales: bool = True) -> None:
        stored.check(model)
        self.format, self.carried = stored.format, stored.carried
        parts, parameters = by_key(model), dict(model.named_parameters())
        on_grid = {parts[key].parameter for key in stored.matrices}
        for name, parameter in parameters.items():
            parameter.requires_grad_(parameter.ndim == 1 or (scales and name in on_grid))
        self._parameters = {name: parameters[name] for name in on_grid} if scales else {}
        self._vectors = {name: p for name, p in parameters.items() if p.requires_grad and name not in on_grid}
        self._held: dict[str, _Held] = {}
        for key, (codes, grid) in stored.matrices.items():
            place = parts[key].weight_OI.device
            grid = grid.to(place)
            shifts = torch.zeros_like(grid.scales) if stored.format.zero == torch.float16 else None
            self._held[key] = _Held(parts[key], codes.to(place), grid, torch.zeros_like(grid.scales), shifts)
        self._scales = scales
        own = ref(self)  # weakly: torch keeps a hook where no collection of garbage sees what it holds
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(_sum_up, own, name))  # type: ignore[no-untyped-call]

    def masters(self) -> dict[str, Tensor]:
        moving = self._held.items() if self._scales else ()
        factors = {f"{key}.scales": one.factors for key, one in moving}
        shifts = {f"{key}.zeros": one.shifts for key, one in moving if one.shifts is not None}
        return {**factors, **shifts, **self._vectors}

    @torch.no_grad()
    def sum_up(self, name: str, parameter: Tensor) -> None:
        """As soon as a matrix has its gradient: add it up over groups and let it go, so that one is alive at a time.

        The served weight is scale · (value − zero); rounding to the stored types is passed straight through.
        """
        assert parameter.grad is not None
        for one in self._held.values():
            if one.matrix.parameter != name:
                continue
            rows, groups = one.factors.shape
            gradient_OKG = one.matrix.of(parameter.grad).float().reshape(rows, groups, -1)
            served_OKG = one.matrix.weight_OI.float().reshape(rows, groups, -1)
            _add_gradient(one.factors, (gradient_OKG * served_OKG).sum(-1))
            if one.shifts is not None:
                sign = 1.0 if self.format.form == "minimum" else -1.0
                _add_gradient(one.shifts, sign * one.grid.scales * one.factors.exp() * gradient_OKG.sum(-1))
        parameter.grad = None

    @torch.no_grad()
    def project(self) -> None:
        for one in self._held.values() if self._scales else ():
            one.matrix.weight_OI.copy_(decode(one.codes, one.moved(self.format), self.format))

    def kept(self) -> dict[str, Tensor]:
        """The codes, which repair may have chosen anew."""
        return {f"{key}.codes": one.codes for key, one in self._held.items()}

    @torch.no_grad()
    def take_kept(self, saved: Mapping[str, Tensor]) -> None:
        for key, one in self._held.items():
            if (codes := saved.get(f"{key}.codes")) is not None:
                one.codes.copy_(codes)
                one.matrix.weight_OI.copy_(decode(one.codes, one.moved(self.format), self.format))

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Codes, scales and zeros as `remend/grid.safetensors`."""
        matrices = {key: (one.codes, one.moved(self.format)) for key, one in self._held.items()}
        StoredGrid(self.format, matrices, self.carried).write(directory)


class NormsKind(PartKind):
    """Students of which vectors alone are trained: whatever else training must keep, it keeps."""

    moving = "norms"
    words = "norms and biases alone move"

    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        stored = (start.stored if start else None) or facts.recognised.stored
        if stored is not None:
            return OnScales(model, stored, scales=self.moving == "scales")
        vectors = {name for name, p in model.named_parameters() if p.ndim == 1}
        return OnPart(model, vectors, repaired=start is not None)

    def learning_rate(self, facts: StudentFacts, *, repaired: bool) -> float:
        return SCALES_RATE


class ScalesKind(NormsKind):
    """Students on a grid of which scales, zeros and vectors are trained."""

    moving = "scales"
    words = "codes stay, scales and norms move"

    def lost(self, facts: StudentFacts) -> str | None:
        """Why scales can't be trained."""
        if facts.train != self.moving:
            return None
        stored = facts.recognised.stored
        if stored is None:
            return (
                "train: scales moves the scales of a grid, and the student lies on none that is held; take "
                "train: norms or train: all"
            )
        if stored.format.scale not in FINE_SCALES:
            return (
                f"train: scales can't be had on {stored.format.name}: its scales have few values, and a small step "
                "rounds to none. Take train: norms or train: all"
            )
        return None


def _sum_up(constraint: ref[OnScales], name: str, parameter: Tensor) -> None:
    if (alive := constraint()) is not None:
        alive.sum_up(name, parameter)


def _add_gradient(master: Tensor, gradient: Tensor) -> None:
    master.grad = gradient if master.grad is None else master.grad + gradient
