"""What a grid means, once more: in plain Python floats, point by point, for the tests of grids and constraints."""

from __future__ import annotations

import torch
from torch import Tensor

from remend.compression.formats import GridFormat, table_of
from remend.compression.grids import Grid

COLUMNS = 256  # one group of the largest
BLOCKS = [f"gguf:{kind}" for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "tq2_0")]
OTHERS = [*BLOCKS, "nf4", "fp8-e4m3", "mxfp4", "nvfp4"]
ALL = [*(f"int{bits}-g32-{zeros}" for bits in (2, 3, 4, 8) for zeros in ("asym", "sym", "zp")), *OTHERS]


def weights(seed: int, scale: float = 0.05, offset: float = 0.0, rows: int = 3, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale + offset


def any_codes(seed: int, fmt: GridFormat) -> Tensor:
    """Codes that encoding can give: all but the second zero and what is no number."""
    generator = torch.Generator().manual_seed(seed)
    if not fmt.table:
        return torch.randint(fmt.levels, (3, COLUMNS), generator=generator).to(torch.uint8)
    codes = table_of(fmt.table, torch.device("cpu")).codes
    return codes[torch.randint(len(codes), (3, COLUMNS), generator=generator)]


def groups_of(fmt: GridFormat) -> int:
    return fmt.group or COLUMNS


def spread(values_OK: Tensor, fmt: GridFormat) -> Tensor:
    """One value a group → one a weight."""
    return values_OK.repeat_interleave(groups_of(fmt), 1)


def slow_values(fmt: GridFormat) -> list[float]:
    """What each code is worth on a grid of scale 1 with zero or minimum 0."""
    if "mxfp4" in fmt.name or fmt.name == "nvfp4":
        return [s * v for s in (1.0, -1.0) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    if fmt.name == "nf4" or fmt.name == "fp8-e4m3":  # tested in test_formats.py
        return table_of(fmt.table, torch.device("cpu")).values.tolist()
    low = {"gguf:q4_0": -8, "gguf:q5_0": -16, "gguf:q8_0": -128, "gguf:tq2_0": -1}.get(fmt.name, 0)
    low = -(2 ** (fmt.bits - 1)) if fmt.name.endswith("-sym") else low
    return [float(low + c) for c in range(3 if fmt.name == "gguf:tq2_0" else 2**fmt.bits)]


def slow_points(fmt: GridFormat, scale: float, zero: float, outer: float) -> list[float]:
    """The weight of every code in one group, in double precision."""
    if fmt.name in ("gguf:q4_1", "gguf:q5_1"):
        return [scale * v + zero for v in slow_values(fmt)]
    return [scale / outer * (v - zero) for v in slow_values(fmt)]


def slow_groups(weight: Tensor, grid: Grid, fmt: GridFormat) -> list[tuple[int, slice, list[float]]]:
    """Row, columns and the points of every group."""
    found = []
    size = fmt.group or weight.shape[1]
    for row in range(weight.shape[0]):
        for k in range(weight.shape[1] // size):
            zero = 0.0 if grid.zeros is None else float(grid.zeros[row, k])
            outer = 1.0 if grid.outer is None else float(grid.outer)
            points = slow_points(fmt, float(grid.scales[row, k]), zero, outer)
            found.append((row, slice(k * size, (k + 1) * size), points))
    return found
