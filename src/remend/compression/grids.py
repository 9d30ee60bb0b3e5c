"""Quantization grids: fit, quantize, encode, decode. Pure tensor mathematics; formats.py says what a format means.

Legend: O rows (outputs), I columns (inputs), K groups a row, G group size (I = K·G), P points of a table.

Arithmetic is float32; scales, zeros and minimums hold only what the format's file can hold. Compared with:

    gguf:*            gguf 0.19, `quants.quantize` and `quants.dequantize`: bit for bit
    int*-sym, int*-zp compressed-tensors 0.20, `quantize` and `dequantize` on the same scales: equal, but for weights
                      within float32's rounding of a tie
    int*-asym         no library: a real zero
    mxfp4             torchao 0.18, `to_mx` (FLOOR) and its dequantization: equal
    nvfp4             compressed-tensors 0.20 (`generate_gparam`, `calculate_qparams`, FP4 rounding): equal;
                      torchao 0.18, `nvfp4_quantize`: equal to float32's rounding, but for ties
    fp8-e4m3          compressed-tensors 0.20, channel strategy: equal
    nf4               bitsandbytes 0.50, `quantize_4bit` on CPU without double quantization: equal

Where a group's scale is 0, every code means the same weight; `encode` then gives the code of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from remend.compression.formats import GridFormat, nearest, round_e2m1, table_of
from remend.errors import InputError

__all__ = ["Grid", "GridFormat", "decode", "encode", "ends", "fit", "part", "quantize", "rescale", "restore", "snap"]
__all__ += ["scale_gradient", "stacked", "store", "within_cell"]

_INSIDE = 0.998
"""Of the way from a point to its cell's border: a weight on the border itself would round to either side."""
_CHUNK = 2**17
_SMALLEST = 2.0**-6
"""Smallest normal E4M3, below which nvfp4's writers hold no block scale."""


class Grid(NamedTuple):
    """What the groups of one matrix share.

    Attributes:
        scales: float32 [O, K], what multiplies a code's value, representable in the format's storage.
        zeros: float32 [O, K], zeros (form 'zero') or minimums (form 'minimum'); None for the form 'scaled'.
        outer: float32 [], nvfp4's scale of the whole matrix as compressed-tensors holds it (weight_global_scale): a
            code's value is multiplied by scales / outer. None elsewhere.
    """

    scales: Tensor
    zeros: Tensor | None = None
    outer: Tensor | None = None

    def to(self, device: torch.device | str) -> Grid:
        """The same on a device."""
        return Grid(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


def _grouped(weight_OI: Tensor, group: int) -> Tensor:
    rows, columns = weight_OI.shape
    if columns % (group or columns):
        raise InputError(f"a row of {columns} weights can't be cut into groups of {group}; choose a smaller group")
    return weight_OI.view(rows, -1, group or columns)


def _steps(grid: Grid) -> Tensor:
    return (grid.scales if grid.outer is None else grid.scales / grid.outer).unsqueeze(-1)


def store(grid: Grid, fmt: GridFormat) -> dict[str, Tensor]:
    """The tensors that a file holds: 'scales', 'zeros' and 'outer' where there are any, in the format's storage types.

    E8M0 scales are their exponent bytes (uint8, biased by 127); nvfp4's are E4M3.
    """
    stored = {}
    if fmt.scale == torch.float8_e8m0fnu:
        stored["scales"] = (grid.scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    else:
        stored["scales"] = grid.scales.to(fmt.scale)
    if grid.zeros is not None and fmt.zero is not None:
        stored["zeros"] = grid.zeros.to(fmt.zero)
    if grid.outer is not None:
        stored["outer"] = grid.outer
    return stored


def restore(stored: dict[str, Tensor], fmt: GridFormat) -> Grid:
    """The grid of what `store` gave. Raises InputError when a tensor is missing, or of another type or shape."""
    scales = stored.get("scales")
    kind = torch.uint8 if fmt.scale == torch.float8_e8m0fnu else fmt.scale
    if scales is None or scales.dtype != kind or scales.ndim != 2:
        raise InputError(f"{fmt.name} needs scales of type {kind}, one a group of a row")
    zeros = stored.get("zeros") if fmt.zero is not None else None
    if fmt.zero is not None and (zeros is None or zeros.dtype != fmt.zero or zeros.shape != scales.shape):
        raise InputError(f"{fmt.name} needs zeros of type {fmt.zero}, one a scale")
    outer = stored.get("outer") if fmt.rule == "two scales" else None
    if fmt.rule == "two scales" and (outer is None or outer.dtype != torch.float32 or outer.ndim):
        raise InputError(f"{fmt.name} needs one outer scale of type float32")
    values = _from_e8m0(scales) if kind == torch.uint8 else scales.float()
    return Grid(values, None if zeros is None else zeros.float(), outer)


def _from_e8m0(exponents: Tensor) -> Tensor:
    """2^(byte - 127). The least of them is no normal float32: its exponent field is 0, its mantissa holds it."""
    bits = exponents.to(torch.int32) << 23
    return torch.where(bits == 0, 0x00400000, bits).view(torch.float32)


def _by_range(grouped_OKG: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
    """scale = (max - min) / (levels - 1), zero = -min / scale; symmetric: 2 max|w| / (levels - 1)."""
    low, high = torch.aminmax(grouped_OKG, dim=-1)
    largest = torch.maximum(low.abs(), high.abs())
    span = 2 * largest if fmt.form == "scaled" else high - low
    # a narrow group far from 0 would need a zero beyond float16: its step is held above 1/1024 of its largest weight
    least = (largest / 1024).clamp(min=torch.finfo(torch.float16).smallest_normal)
    scales = torch.maximum(span / (fmt.levels - 1), least).to(fmt.scale).float()
    if fmt.form == "scaled":
        return scales, None
    return scales, (-low / scales).to(torch.float16).float()


def _by_integer_zero(grouped_OKG: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
    """scale = (max - min) / (levels - 1) over a range that holds 0, zero = round(-min / scale)."""
    low, high = torch.aminmax(grouped_OKG, dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = ((high - low) / (fmt.levels - 1)).clamp(min=torch.finfo(torch.float16).smallest_normal)
    scales = span.to(fmt.scale).float()
    return scales, (-low / scales).round().clamp(0, fmt.levels - 1)


def _by_extreme(grouped_OKG: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
    """The weight of largest magnitude is code 0, so that the scale carries its sign: w / -offset (ggml's _0 types)."""
    where = grouped_OKG.abs().argmax(-1, keepdim=True)
    return grouped_OKG.gather(-1, where).squeeze(-1) / -fmt.offset, None


def _by_minimum(grouped_OKG: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
    """scale = (max - min) / (levels - 1) above the minimum (ggml's _1 types)."""
    low, high = torch.aminmax(grouped_OKG, dim=-1)
    return (high - low) / (fmt.levels - 1), low


def _by_largest(grouped_OKG: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
    """The largest magnitude is the largest value."""
    top = float(table_of(fmt.table, torch.device("cpu")).points[-1]) if fmt.table else fmt.levels - 1 - fmt.offset
    return grouped_OKG.abs().amax(-1) / top, None


def _by_power(grouped_OKG: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
    """2^(floor(log2 max|w|) - 2), section 6.3 of OCP Microscaling 1.0: 4 is E2M1's largest power of two."""
    largest_OK = grouped_OKG.abs().amax(-1)
    if fmt.rule == "gguf power":  # float32's log2 rounds up just below a power of two
        exponent = largest_OK.double().log2().float().floor()
    else:
        exponent = torch.frexp(largest_OK).exponent.float() - 1
    biased = torch.where(largest_OK > 0, exponent - 2 + 127, 0).clamp(0, 254).to(torch.uint8)
    return _from_e8m0(biased), None


_RULES: dict[str, Callable[[Tensor, GridFormat], tuple[Tensor, Tensor | None]]] = {
    "range": _by_range,
    "integer zero": _by_integer_zero,
    "extreme": _by_extreme,
    "minimum": _by_minimum,
    "largest": _by_largest,
    "power": _by_power,
    "gguf power": _by_power,
}


def _two_scales(grouped_OKG: Tensor, fmt: GridFormat, outer: Tensor | None) -> Grid:
    """outer = 448·6 / max|w| of the matrix, block scale = E4M3(outer · max|w| of the block / 6), at least 2^-6."""
    largest_OK = grouped_OKG.abs().amax(-1)
    if outer is None:
        whole = 448.0 * 6.0 / largest_OK.max().clamp(min=torch.finfo(torch.float32).tiny)
        outer = torch.where(whole.isfinite() & (largest_OK.max() > 0), whole, torch.ones_like(whole))
    block = (outer * (largest_OK / 6.0)).clamp(_SMALLEST, 448.0)
    return Grid(block.to(fmt.scale).float(), None, outer)


def _checked(grid: Grid, fmt: GridFormat) -> Grid:
    if not all(bool(tensor.isfinite().all()) for tensor in grid if tensor is not None):
        raise InputError(f"the weights are not finite, or too large for the scales of {fmt.name}")
    return grid


def fit(weight_OI: Tensor, fmt: GridFormat, *, outer: Tensor | None = None) -> Grid:
    """Round-to-nearest's grid: what every group shares, from the group's own weights.

    Args:
        weight_OI: [O, I], any floating type.
        outer: nvfp4 only: the matrix's scale where it is settled already (a part of a matrix is fitted).

    Raises:
        InputError: the group size does not divide the row, or a scale is not finite as stored.
    """
    grouped_OKG = _grouped(weight_OI.detach().float(), fmt.group)
    if fmt.rule == "two scales":
        return _checked(_two_scales(grouped_OKG, fmt, outer), fmt)
    scales, zeros = _RULES[fmt.rule](grouped_OKG, fmt)
    zeros = zeros.to(fmt.zero).float() if zeros is not None and fmt.zero is not None else None
    return _checked(Grid(scales.to(fmt.scale).float() if fmt.scale.itemsize > 1 else scales, zeros), fmt)


def quantize(weight_OI: Tensor, fmt: GridFormat) -> tuple[Tensor, Grid]:
    """Codes (uint8 [O, I]) and grid as the format's own writer makes them.

    ggml's block types choose codes by the scale before its rounding to float16, so a code may be a neighbour of the
    nearest; everywhere else this is `fit` and `encode`. Raises as `fit` does.
    """
    grid = fit(weight_OI, fmt)
    if not fmt.gguf or fmt.table:
        return encode(weight_OI, grid, fmt), grid
    grouped_OKG = _grouped(weight_OI.detach().float(), fmt.group)
    exact, low = _RULES[fmt.rule](grouped_OKG, fmt)
    # 1/d overflows below the smallest normal number; the stored scale is 0 there, and any code will do
    inverse = torch.where(exact.abs() < torch.finfo(torch.float32).tiny, 0, 1 / exact).unsqueeze(-1)
    if fmt.rule == "largest":  # half away from zero
        position = grouped_OKG * inverse
        size = position.abs()
        whole = size.floor()
        codes = position.sign() * (whole + (2 * (size - whole)).floor()) + fmt.offset
    elif low is not None:
        codes = ((grouped_OKG - low.unsqueeze(-1)) * inverse + 0.5).trunc()
    else:
        codes = (grouped_OKG * inverse + (fmt.offset + 0.5)).trunc()
    return codes.clamp_(0, fmt.levels - 1).reshape(weight_OI.shape).to(torch.uint8), grid


def _positions(grouped_OKG: Tensor, grid: Grid, fmt: GridFormat, out: Tensor | None = None) -> Tensor:
    """Where weights lie between codes (an evenly spaced grid) or between values (a table), before rounding."""
    divisor = _steps(grid)
    divisor = torch.where(divisor == 0, torch.inf, divisor)
    if fmt.form == "minimum" and grid.zeros is not None:
        return torch.sub(grouped_OKG, grid.zeros.unsqueeze(-1), out=out).div_(divisor)
    position = torch.div(grouped_OKG, divisor, out=out)
    if fmt.table:
        return position
    return position.add_(fmt.offset if grid.zeros is None else grid.zeros.unsqueeze(-1))


def _weights_(position_OKG: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """The inverse of `_positions`, in place."""
    steps = _steps(grid)
    if fmt.form == "minimum" and grid.zeros is not None:
        return position_OKG.mul_(steps).add_(grid.zeros.unsqueeze(-1))
    if not fmt.table:
        position_OKG.sub_(fmt.offset if grid.zeros is None else grid.zeros.unsqueeze(-1))
    return position_OKG.mul_(steps)


def encode(weight_OI: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """Nearest code of every weight on a given grid: uint8 [O, I]."""
    position = _positions(_grouped(weight_OI.detach().float(), fmt.group), grid, fmt)
    if not fmt.table:
        return position.round_().clamp_(0, fmt.levels - 1).reshape(weight_OI.shape).to(torch.uint8)
    return nearest(position, fmt.table).view(weight_OI.shape)


def decode(codes_OI: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """The weights that codes stand for: float32 [O, I], always by the same operations, so bit for bit the same."""
    if fmt.table:
        table = table_of(fmt.table, codes_OI.device)
        values_OI = table.values.index_select(0, codes_OI.flatten().int()).view(codes_OI.shape)
    else:
        values_OI = codes_OI.to(torch.float32, copy=True)
    return _weights_(_grouped(values_OI, fmt.group), grid, fmt).reshape(codes_OI.shape)


def within_cell(weight_OI: Tensor, codes_OI: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """The point nearest to `weight_OI` that still rounds to `codes_OI`: a float32 master that hides behind its code.

    The outermost cells are open to the outside, so a weight beyond the grid's end stays where it is.
    """
    position = _positions(_grouped(weight_OI.detach().float(), fmt.group), grid, fmt)
    codes = _grouped(codes_OI, fmt.group)
    if fmt.table:
        table = table_of(fmt.table, codes_OI.device)
        end = torch.full_like(table.borders[:1], torch.inf)
        index = table.point_of[codes.int()]
        middle = table.points[index]
        low, high = torch.cat([-end, table.borders])[index], torch.cat([table.borders, end])[index]
    else:
        middle = codes.to(torch.float32)
        low = torch.where(codes == 0, -torch.inf, middle - 0.5)
        high = torch.where(codes == fmt.levels - 1, torch.inf, middle + 0.5)
    inside = torch.maximum(
        torch.minimum(position, middle + _INSIDE * (high - middle)), middle + _INSIDE * (low - middle)
    )
    master_OI = _weights_(inside, grid, fmt).reshape(weight_OI.shape)
    # where a cell is as narrow as float32 itself, only its own point is sure to be inside
    return torch.where(encode(master_OI, grid, fmt) == codes_OI, master_OI, decode(codes_OI, grid, fmt))


def off_borders(weight_OI: Tensor, codes_OI: Tensor, grid: Grid, fmt: GridFormat, margin: float) -> Tensor:
    """Weights that a change by `margin` would give another code, moved inside by as much; they keep their codes.

    Args:
        weight_OI: float32; rounds to `codes_OI`.
        margin: in the weights' unit, 0 or more. Where both sides are nearer than that, a weight stays.
    """
    up, down = (encode(weight_OI + d, grid, fmt) != codes_OI for d in (margin, -margin))
    moved_OI = weight_OI + margin * (down.float() - up.float())
    return torch.where(encode(moved_OI, grid, fmt) == codes_OI, moved_OI, weight_OI)


def snap(weight_OI: Tensor, grid: Grid, fmt: GridFormat, *, out: Tensor) -> None:
    """Write the nearest grid point of every weight into `out`: decode(encode(w)) bit for bit, with little memory."""
    if not fmt.table and out.dtype == torch.float32:
        position = _positions(_grouped(weight_OI, fmt.group), grid, fmt, _grouped(out, fmt.group))
        _weights_(position.round_().clamp_(0, fmt.levels - 1), grid, fmt)
        return
    step = max(1, _CHUNK // weight_OI.shape[1])
    for row in range(0, weight_OI.shape[0], step):
        rows = slice(row, row + step)
        some = Grid(grid.scales[rows], None if grid.zeros is None else grid.zeros[rows], grid.outer)
        if fmt.table == "e2m1":
            position = _positions(_grouped(weight_OI[rows].float(), fmt.group), some, fmt)
            out[rows] = _weights_(round_e2m1(position), some, fmt).reshape(out[rows].shape)
            continue
        out[rows] = decode(encode(weight_OI[rows], some, fmt), some, fmt)


def part(grid: Grid, fmt: GridFormat, start: int, stop: int) -> tuple[Grid, GridFormat]:
    """The grid of columns start … stop - 1: whole groups, or columns inside one group (the format's group is then 0).

    Raises InputError for columns that are neither.
    """
    if fmt.group == 0:
        return grid, fmt
    first, last = start // fmt.group, -(-stop // fmt.group)
    whole = start % fmt.group == stop % fmt.group == 0
    if not whole and last - first != 1:
        raise InputError(f"columns {start} to {stop} are neither whole groups of {fmt.group} nor inside one")
    zeros = None if grid.zeros is None else grid.zeros[:, first:last]
    return Grid(grid.scales[:, first:last], zeros, grid.outer), fmt if whole else replace(fmt, group=0)


def stacked(some: Sequence[Grid]) -> Grid:
    """The grid of matrices one below the other. Not of a format with an outer scale, unless there is one grid alone."""
    first = some[0]
    if len(some) == 1:
        return first
    assert first.outer is None
    zeros = None if first.zeros is None else torch.cat([grid.zeros for grid in some if grid.zeros is not None])
    return Grid(torch.cat([grid.scales for grid in some]), zeros)


def ends(grid: Grid, fmt: GridFormat) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of every group: float32 [O, K] each."""
    codes = (0, fmt.levels - 1)
    if fmt.table:
        points = table_of(fmt.table, torch.device("cpu")).codes
        codes = (int(points[0]), int(points[-1]))
    single = replace(fmt, group=1)
    low, high = (decode(torch.full_like(grid.scales, c, dtype=torch.uint8), grid, single) for c in codes)
    return torch.minimum(low, high), torch.maximum(low, high)


def rescale(grid: Grid, factors_OK: Tensor, fmt: GridFormat) -> Grid:
    """A grid whose groups are stretched about the weight 0 by positive factors, rounded to the format's storage.

    Scales and minimums are multiplied; a zero stays, since it counts in codes. For scales in float16 or float32.
    """
    kind = torch.finfo(fmt.scale)
    scales = (grid.scales * factors_OK).clamp(kind.min, kind.max).to(fmt.scale).float()
    zeros = grid.zeros
    if fmt.form == "minimum" and zeros is not None and fmt.zero is not None:
        zeros = (zeros * factors_OK).clamp(kind.min, kind.max).to(fmt.zero).float()
    return Grid(scales, zeros, grid.outer)


def scale_gradient(gradient_OI: Tensor, served_OI: Tensor, master_OI: Tensor, grid: Grid, fmt: GridFormat) -> Tensor:
    """The gradient of a loss by the logarithms of a grid's scales: float32 [O, K], the factors of `rescale` being exp.

    LSQ's (arXiv 1902.08153, eq. 3) times the scale: the sum over a group of g · (served − master) inside the grid's
    range, and of g · served beyond it. LSQ's gradient scale (section 2.2) is left out: Adam undoes it.

    Args:
        gradient_OI: g, by the served weights.
        served_OI: the weights on the grid, as `snap` gives them.
        master_OI: float32, the weights that were rounded.
        grid, fmt: as rescaled so far.
    """
    low, high = (end.unsqueeze(-1) for end in ends(grid, fmt))
    master_OKG = _grouped(master_OI, fmt.group)
    moved_OKG = torch.where((master_OKG > low) & (master_OKG < high), master_OKG, 0)
    return ((_grouped(served_OI, fmt.group) - moved_OKG) * _grouped(gradient_OI, fmt.group)).sum(-1)
