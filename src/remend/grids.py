"""Uniform quantization grids: fit, encode, decode. Pure tensor mathematics.

Legend: O rows (outputs), I columns (inputs), K groups a row, G group size (I = K·G).

A weight is stored as an unsigned code with one scale and one zero a group of G neighbours in a row:

    w = scale · (code − zero),   code in 0 … 2^bits − 1

    asymmetric   scale = (max − min) / (2^bits − 1), zero = −min / scale, a real number (as HQQ and GGUF's _1 formats
                 place it: the group's extremes are representable, 0 need not be)
    symmetric    scale = 2 max|w| / (2^bits − 1), zero = 2^(bits − 1)  (as compressed-tensors does)

Scales and zeros are rounded to float16, since that is what a packed file holds; arithmetic is float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from remend.errors import InputError

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
_NAME = re.compile(r"int(\d+)-g(\d+)(?:-(sym|asym))?")


@dataclass(frozen=True)
class GridFormat:
    """A grid by its three numbers. `name` is e.g. 'int3-g64-asym'."""

    bits: int
    group: int
    symmetric: bool

    @property
    def name(self) -> str:
        """In full, as `parse` reads it."""
        return f"int{self.bits}-g{self.group}-{'sym' if self.symmetric else 'asym'}"

    @property
    def levels(self) -> int:
        """Number of code points, 2^bits."""
        return int(2**self.bits)

    @property
    def bits_per_weight(self) -> float:
        """As packed: the code, and the float16 scale (and zero, where asymmetric) shared by a group."""
        return self.bits + (16 if self.symmetric else 32) / self.group

    @staticmethod
    def parse(name: str) -> GridFormat:
        """Read 'int3-g64' (asymmetric) or 'int4-g32-sym'. Raises InputError that says what is allowed."""
        match = _NAME.fullmatch(name)
        if not match or int(match[1]) not in BITS or int(match[2]) not in GROUPS:
            raise InputError(
                f'unknown format "{name}"; allowed is intB-gG, B one of {", ".join(map(str, BITS))} bits and '
                f"G one of {', '.join(map(str, GROUPS))}, with -sym or -asym (the default), e.g. int3-g64"
            )
        return GridFormat(int(match[1]), int(match[2]), match[3] == "sym")


class Grid(NamedTuple):
    """Scales and zeros of one matrix, float32 [O, K] each, exactly representable in float16."""

    scales: Tensor
    zeros: Tensor


def _grouped(weight_OI: Tensor, group: int) -> Tensor:
    rows, columns = weight_OI.shape
    if columns % group:
        raise InputError(f"a row of {columns} weights can't be cut into groups of {group}")
    return weight_OI.view(rows, columns // group, group)


def _to_half(values: Tensor) -> Tensor:
    return values.to(torch.float16).to(torch.float32)


def fit(weight_OI: Tensor, fmt: GridFormat) -> Grid:
    """Round-to-nearest's grid: scale and zero of every group from its minimum and maximum.

    Raises InputError when the group size does not divide the row.
    """
    grouped_OKG = _grouped(weight_OI.detach().float(), fmt.group)
    low, high = torch.aminmax(grouped_OKG, dim=-1)
    span = 2 * torch.maximum(low.abs(), high.abs()) if fmt.symmetric else high - low
    # a narrow group far from 0 would need a zero beyond float16: its step is held above 1/1024 of its largest weight
    least = (torch.maximum(low.abs(), high.abs()) / 1024).clamp(min=torch.finfo(torch.float16).smallest_normal)
    scales = _to_half(torch.maximum(span / (fmt.levels - 1), least))
    zeros = torch.full_like(scales, fmt.levels / 2) if fmt.symmetric else _to_half(-low / scales)
    return Grid(scales, zeros)


def encode(weight_OI: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """Nearest code of every weight on a given grid: uint8 [O, I]."""
    grouped_OKG = _grouped(weight_OI.detach().float(), fmt.group)
    codes = grouped_OKG / grid.scales.unsqueeze(-1)
    codes.add_(grid.zeros.unsqueeze(-1)).round_().clamp_(0, fmt.levels - 1)
    return codes.reshape(weight_OI.shape).to(torch.uint8)


def decode(codes_OI: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """The weights that codes stand for: float32 [O, I], always by the same two operations, so bit for bit the same."""
    grouped_OKG = _grouped(codes_OI.to(torch.float32), fmt.group)
    return grouped_OKG.sub_(grid.zeros.unsqueeze(-1)).mul_(grid.scales.unsqueeze(-1)).reshape(codes_OI.shape)


def within_cell(weight_OI: Tensor, codes_OI: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """The point nearest to `weight_OI` that still rounds to `codes_OI`: a float32 master that hides behind its code.

    The outermost cells are open to the outside, so a weight beyond the grid's end stays where it is.
    """
    shape = weight_OI.shape
    scales, zeros = grid.scales.unsqueeze(-1), grid.zeros.unsqueeze(-1)
    codes_OKG = _grouped(codes_OI.to(torch.float32), fmt.group)
    position_OKG = _grouped(weight_OI.detach().float(), fmt.group) / scales + zeros
    half = 0.499  # not 0.5: a point on the border would round to either side
    low = torch.where(codes_OKG == 0, position_OKG, codes_OKG - half)
    high = torch.where(codes_OKG == fmt.levels - 1, position_OKG, codes_OKG + half)
    inside = torch.minimum(torch.maximum(position_OKG, low), high)
    # open cells: never let the point cross to the inner side of its own cell's border
    inside = torch.where(codes_OKG == 0, inside.clamp(max=half), inside)
    inside = torch.where(codes_OKG == fmt.levels - 1, inside.clamp(min=fmt.levels - 1 - half), inside)
    return ((inside - zeros) * scales).reshape(shape)


def snap(weight_OI: Tensor, grid: Grid, fmt: GridFormat, *, out: Tensor) -> None:
    """Write the nearest grid point of every weight into `out`: decode(encode(w)) bit for bit, in one buffer."""
    grouped_OKG = _grouped(weight_OI, fmt.group)
    target_OKG = _grouped(out, fmt.group)
    scales, zeros = grid.scales.unsqueeze(-1), grid.zeros.unsqueeze(-1)
    torch.div(grouped_OKG, scales, out=target_OKG)
    target_OKG.add_(zeros).round_().clamp_(0, fmt.levels - 1).sub_(zeros).mul_(scales)
