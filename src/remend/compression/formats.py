"""Names of the grids that a weight can lie on: what a code stands for, what a group shares, how it is stored.

A weight is an unsigned code c with a scale s, shared by a group of neighbours in a row. v(c) is the value of a code:
c - offset on an evenly spaced grid, else an entry of a table. Three forms:

    scaled    w = s * v(c)
    zero      w = s * (c - z)      z: a zero for every group
    minimum   w = s * c + m        m: a minimum for every group

    int{2,3,4,8}-g{32,64,128}-asym   zero, a real number in float16 (as HQQ places it)
    int{2,3,4,8}-g{32,64,128}-zp     zero, an integer 0 ... 2^bits - 1, as compressed-tensors' pack-quantized stores it
    int{2,3,4,8}-g{32,64,128}-sym    scaled, offset 2^(bits-1), as compressed-tensors stores it
    gguf:q4_0 q5_0 q8_0 tq2_0        scaled, evenly spaced; float16 scale, which may be negative (q4_0, q5_0)
    gguf:q4_1 q5_1                   minimum; float16 scale and minimum
    gguf:mxfp4, mxfp4                scaled, E2M1 values, a power of two (E8M0) for 32: OCP Microscaling 1.0, section 5.
                                     Both names stand for the same values; they differ in what a tie rounds to, since
                                     each quantizes as its own library does (gguf; torchao and compressed-tensors)
    nvfp4                            scaled, E2M1 values, an E4M3 scale for 16, over it a float32 scale for the matrix
    nf4                              scaled, the 16 values of QLoRA (arXiv 2305.14314, appendix E), float32 scale for 64
    fp8-e4m3                         scaled, E4M3 values (arXiv 2209.05433), float32 scale for a row
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from remend.errors import InputError, did_you_mean

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
ZEROS = ("asym", "sym", "zp")
_INTEGER = re.compile(r"int(\d+)-g(\d+)(?:-(sym|asym|zp))?")

Form = Literal["scaled", "zero", "minimum"]
Rule = Literal["range", "integer zero", "extreme", "minimum", "largest", "power", "gguf power", "two scales"]


@dataclass(frozen=True)
class GridFormat:
    """A grid by its name and what the name means. `parse` makes one; see the module for the forms.

    Attributes:
        name: in full, as `parse` reads it, e.g. 'int3-g64-asym'.
        bits: stored bits of a code.
        group: neighbours in a row that share a scale; 0 is the whole row.
        form: how scale and zero or minimum turn a code into a weight.
        rule: how `remend.compression.grids.fit` places the grid on a group of weights.
        levels: codes are 0 ... levels - 1.
        offset: on an evenly spaced grid of the form 'scaled', the code of 0.
        table: name of the table of values; '' on an evenly spaced grid.
        scale: how a scale is stored.
        zero: how a zero or minimum is stored; None where there is none.
    """

    name: str
    bits: int
    group: int
    form: Form
    rule: Rule
    levels: int
    offset: int = 0
    table: str = ""
    scale: torch.dtype = torch.float16
    zero: torch.dtype | None = None

    @property
    def gguf(self) -> bool:
        """Whether it is a block format of GGUF files."""
        return self.name.startswith("gguf:")

    def bits_per_weight(self, columns: int) -> float:
        """As packed in rows of `columns` weights: the code and its share of scale and zero.

        nvfp4's one scale for a matrix is not counted.
        """
        shared = 8 * self.scale.itemsize
        if self.zero is not None:
            shared += self.bits if self.zero == torch.uint8 else 8 * self.zero.itemsize
        return self.bits + shared / (self.group or columns)

    @staticmethod
    def parse(name: str) -> GridFormat:
        """Read 'int3-g64' (asymmetric), 'int4-g32-sym', 'gguf:q4_0' … Raises InputError that says what is allowed."""
        match = _INTEGER.fullmatch(name)
        if match and int(match[1]) in BITS and int(match[2]) in GROUPS:
            return _integer(int(match[1]), int(match[2]), match[3] or "asym")
        if name in _OTHERS:
            return _OTHERS[name]
        raise InputError(
            f'unknown format "{name}"; allowed is intB-gG, B one of {", ".join(map(str, BITS))} bits and '
            f"G one of {', '.join(map(str, GROUPS))}, with -asym (the default), -sym or -zp (an integer zero), "
            f"e.g. int3-g64, or one of {', '.join(_OTHERS)}.{did_you_mean(name, _OTHERS)}"
        )


def _integer(bits: int, group: int, zeros: str) -> GridFormat:
    name, levels = f"int{bits}-g{group}-{zeros}", 2**bits
    if zeros == "sym":
        return GridFormat(name, bits, group, "scaled", "range", levels, offset=levels // 2)
    if zeros == "zp":
        return GridFormat(name, bits, group, "zero", "integer zero", levels, zero=torch.uint8)
    return GridFormat(name, bits, group, "zero", "range", levels, zero=torch.float16)


_OTHERS = {
    fmt.name: fmt
    for fmt in (
        GridFormat("gguf:q4_0", 4, 32, "scaled", "extreme", 16, offset=8),
        GridFormat("gguf:q4_1", 4, 32, "minimum", "minimum", 16, zero=torch.float16),
        GridFormat("gguf:q5_0", 5, 32, "scaled", "extreme", 32, offset=16),
        GridFormat("gguf:q5_1", 5, 32, "minimum", "minimum", 32, zero=torch.float16),
        GridFormat("gguf:q8_0", 8, 32, "scaled", "largest", 256, offset=128),
        GridFormat("gguf:tq2_0", 2, 256, "scaled", "largest", 3, offset=1),
        GridFormat("gguf:mxfp4", 4, 32, "scaled", "gguf power", 16, table="e2m1 gguf", scale=torch.float8_e8m0fnu),
        GridFormat("mxfp4", 4, 32, "scaled", "power", 16, table="e2m1", scale=torch.float8_e8m0fnu),
        GridFormat("nvfp4", 4, 16, "scaled", "two scales", 16, table="e2m1", scale=torch.float8_e4m3fn),
        GridFormat("nf4", 4, 64, "scaled", "largest", 16, table="nf4", scale=torch.float32),
        GridFormat("fp8-e4m3", 8, 0, "scaled", "largest", 256, table="e4m3", scale=torch.float32),
    )
}


class ValueTable(NamedTuple):
    """Values that are not evenly spaced. P points, distinct and ascending; codes that repeat 0 or are NaN are none."""

    values: Tensor  # float32 [levels], by code
    points: Tensor  # float32 [P]
    codes: Tensor  # uint8 [P], the code of a point
    point_of: Tensor  # int32 [levels], the point of a code
    borders: Tensor  # float32 [P - 1]; a position x belongs to the first point whose border is >= x
    lower: Tensor  # int32 [BINS], the least point of a bin; see `nearest`
    inside: Tensor  # float32 [BINS], the border inside a bin, infinite where there is none


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _values(name: str) -> Tensor:
    if name == "e4m3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    if name == "nf4":
        return torch.tensor(_NF4)
    magnitudes = torch.tensor(_E2M1)
    # gguf looks values up as integers, where the code of -0 is 0
    return torch.cat([magnitudes, -magnitudes if name == "e2m1" else 0 - magnitudes])


BINS = 64
"""Even bins over a table's range, fine enough that none holds two borders (but for e4m3, whose points are floats)."""


def _bins(position: Tensor, top: Tensor) -> Tensor:
    """Bin of a position: int32, never falling as the position rises. Changes `position`."""
    return position.mul_(0.4 * BINS / top).add_(BINS / 2).clamp_(0, BINS - 1).to(torch.int32)


def nearest(position: Tensor, name: str) -> Tensor:
    """Code of the point nearest to every position: uint8 of the same shape. Changes `position`.

    A table lookup finds the bin and one comparison the side of its border: four times faster than a binary search.
    """
    table = table_of(name, position.device)
    if name == "e4m3":
        codes = position.clamp_(table.points[0], table.points[-1]).to(torch.float8_e4m3fn).view(torch.uint8)
        return codes.masked_fill_(codes == 128, 0)  # -0
    bins = _bins(position.clone(), table.points[-1]).flatten()
    points = table.lower.index_select(0, bins)
    points += position.flatten() > table.inside.index_select(0, bins)
    return table.codes.index_select(0, points).view(position.shape)


def round_e2m1(position: Tensor) -> Tensor:
    """The E2M1 value nearest to every position, ties to the even code: that of `nearest`'s code. Changes `position`.

    Steps are 0.5 up to 2, 1 up to 4 and 2 up to 6: the part of a position in each is rounded by itself, with no table.
    """
    low = position.clamp(-2, 2)
    high = position.clamp_(-6, 6).sub_(low)
    middle = high.clamp(-2, 2)
    high.sub_(middle)
    low.mul_(2).round_().mul_(0.5)
    return low.add_(middle.round_()).add_(high.mul_(0.5).round_(), alpha=2).add_(0.0)  # the last makes -0 0


@lru_cache(maxsize=32)
def table_of(name: str, device: torch.device) -> ValueTable:
    """The table 'e2m1', 'e2m1 gguf', 'nf4' or 'e4m3' on a device.

    A position halfway between two points goes to the even code in 'e2m1' and 'e4m3' (IEEE 754), toward 0 in
    'e2m1 gguf' (gguf's argmin), and down in 'nf4' (bitsandbytes' comparisons): borders are moved by one float.
    """
    values = _values(name)
    codes = torch.arange(len(values))
    codes = codes[values.isfinite() & ~((values == 0) & (codes > 7))] if name != "nf4" else codes
    codes = codes[values[codes].argsort()]
    points = values[codes]
    middle = ((points[:-1].double() + points[1:].double()) / 2).float()
    upward = {
        "nf4": torch.zeros_like(middle, dtype=torch.bool),
        "e2m1 gguf": middle < 0,
    }.get(name, codes[1:] % 2 == 0)
    borders = torch.where(upward, middle.nextafter(torch.tensor(-torch.inf)), middle)
    index = (values.nan_to_num().unsqueeze(1) - points).abs().argmin(1)
    home = _bins(borders.clone(), points[-1])
    lower = torch.tensor([int((home < i).sum()) for i in range(BINS)], dtype=torch.int32)
    inside = torch.full((BINS,), torch.inf).scatter(0, home.long(), borders)
    parts = (values, points, codes.to(torch.uint8), index.to(torch.int32), borders, lower, inside)
    return ValueTable(*(part.to(device) for part in parts))
