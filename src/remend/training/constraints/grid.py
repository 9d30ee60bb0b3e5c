"""A student on a quantization grid stays on it in training.

Legend: O rows (outputs), I columns (inputs), K groups a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from remend.compression.grids import (
    Grid,
    GridFormat,
    decode,
    encode,
    ends,
    off_borders,
    rescale,
    snap,
    within_cell,
)
from remend.compression.stored_grid import StoredGrid
from remend.errors import InputError

LOG_SCALES = "log_scales"


@dataclass
class _Matrix:
    """One matrix in training: the weight as served, what the optimizer moves, the grid that it started on."""

    weight: Tensor
    master: Tensor
    grid: Grid
    log_scales: Tensor | None = None


class OnGrid:
    """Some matrices stay on the quantization grid that they came on; all other parameters are free.

    Scales and zeros are not derived anew from trained weights, which is not idempotent. They stay as stored
    (`scales="fixed"`), or are learned: each group's scale is then scale · exp(r), rounded as the format stores it, with
    a master r that starts at 0. A zero counts in codes and stays; the minimum of GGUF's _1 formats is multiplied too.
    The gradient of r is LSQ's (arXiv 1902.08153, eq. 3) times the scale: the sum over the group of g · (w_served - w)
    inside the grid's range and g · w_served beyond it, w the master. Its gradient scale (section 2.2) is left out: the
    optimizer is Adam, which undoes it.

    Args:
        model: holds the quantized weights already.
        stored: the grid as read from the student's directory.
        origin: parameters of the model before quantization (the teacher's), by name. Where names and shapes agree, a
            master starts at the original weight, moved as far as its code demands: it still rounds to the student's
            code, but remembers on which side of it the lost weight was. Elsewhere it starts on the grid point.
        masters: where masters start instead, by name, e.g. the weights that one-shot repair rounded.
        margin: those of `masters`, and of the original weights those that round to another code than the student's,
            are moved inside by as much where they are so near to another code. A weight then changes its code when its
            gradient insists, not when one noisy step happens to push it over the border.
        scales: 'fixed' or 'learned'.

    Raises:
        InputError: the model lacks a matrix of the grid, its weights are not the ones that the grid describes, a start
            value rounds to another weight, or scales are to be learned that are no float16 or float32.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: StoredGrid,
        *,
        origin: Mapping[str, Tensor] | None = None,
        masters: Mapping[str, Tensor] | None = None,
        margin: float = 0.0,
        scales: Literal["fixed", "learned"] = "fixed",
    ) -> None:
        self.format = stored.format
        if scales == "learned":
            check_learnable(self.format)
        stored.check(model)
        parameters = dict(model.named_parameters())
        self._matrices: dict[str, _Matrix] = {}
        for name, (codes, grid) in stored.matrices.items():
            weight = parameters[name]
            codes, grid = codes.to(weight.device), grid.to(weight.device)
            start, source = (masters or {}).get(name), (origin or {}).get(name)
            if start is not None:
                master = off_borders(self._start(name, start, weight, grid), codes, grid, self.format, margin)
            elif source is not None and source.shape == codes.shape:
                master = self._from_origin(source.detach().to(weight.device), codes, grid, margin)
            else:
                master = weight.detach().clone()
            learned = torch.zeros_like(grid.scales) if scales == "learned" else None
            self._matrices[name] = _Matrix(weight, master, grid, learned)
        self._free = {n: p for n, p in parameters.items() if n not in self._matrices and p.requires_grad}

    def _from_origin(self, source: Tensor, codes: Tensor, grid: Grid, margin: float) -> Tensor:
        """The original weight where it rounds to its code; where it does not (GPTQ), inside the cell by `margin`.

        Codes that made good what others lost would else fall back at the first noisy step.
        """
        master = within_cell(source, codes, grid, self.format)
        inside = off_borders(master, codes, grid, self.format, margin)
        return torch.where(encode(source.float(), grid, self.format) == codes, master, inside)

    def _start(self, name: str, start: Tensor, weight: Tensor, grid: Grid) -> Tensor:
        master = start.detach().to(weight.device, torch.float32, copy=True)
        if master.shape != weight.shape or not torch.equal(
            decode(encode(master, grid, self.format), grid, self.format), weight.detach().float()
        ):
            raise InputError(f"the start value of {name} does not round to the weight that the model holds")
        return master

    def _grid(self, matrix: _Matrix) -> Grid:
        if matrix.log_scales is None:
            return matrix.grid
        return rescale(matrix.grid, matrix.log_scales.exp(), self.format)

    def masters(self) -> dict[str, Tensor]:
        """See Constraint. Learned scales are '<matrix>.log_scales', float32 [O, K]."""
        masters = {name: matrix.master for name, matrix in self._matrices.items()}
        logs = {f"{n}.{LOG_SCALES}": m.log_scales for n, m in self._matrices.items() if m.log_scales is not None}
        return {**masters, **logs, **self._free}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """See Constraint. Straight-through: the gradient at the served weight, unchanged."""
        for matrix in self._matrices.values():
            gradient = matrix.weight.grad
            matrix.master.grad, matrix.weight.grad = gradient, None
            if matrix.log_scales is not None:
                matrix.log_scales.grad = None if gradient is None else self._scale_gradient(matrix, gradient)

    def _scale_gradient(self, matrix: _Matrix, gradient_OI: Tensor) -> Tensor:
        """Of the loss by the log-scales: float32 [O, K]."""
        groups = (-1, matrix.grid.scales.shape[1], self.format.group or gradient_OI.shape[1])
        low, high = (end.unsqueeze(-1) for end in ends(self._grid(matrix), self.format))
        master = matrix.master.view(groups)
        moved = torch.where((master > low) & (master < high), master, 0)
        return ((matrix.weight.detach().view(groups) - moved) * gradient_OI.view(groups)).sum(-1)

    @torch.no_grad()
    def project(self) -> None:
        """See Constraint."""
        for matrix in self._matrices.values():
            snap(matrix.master, self._grid(matrix), self.format, out=matrix.weight)

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """See Constraint: codes, scales and zeros as `grid.safetensors`."""
        matrices = {}
        for name, matrix in self._matrices.items():
            grid = self._grid(matrix)
            matrices[name] = (encode(matrix.master, grid, self.format), grid)
        StoredGrid(self.format, matrices).write(directory)


def check_learnable(fmt: GridFormat) -> None:
    """Raise InputError for a format whose scales are stored too coarsely to be learned."""
    if fmt.scale not in (torch.float16, torch.float32):
        kind = str(fmt.scale).removeprefix("torch.")
        raise InputError(f"the scales of {fmt.name} are {kind}, too coarse to learn; use scales: fixed")
