"""Grids: encode, decode, within_cell, snap, part against a slow reference in plain Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.grid_reference import ALL, COLUMNS, any_codes, groups_of, slow_groups, slow_values, spread, weights
from remend.compression import grids
from remend.compression.formats import GridFormat
from remend.compression.grids import Grid, decode, encode, fit, quantize, within_cell
from remend.errors import InputError

quick = settings(deadline=None, max_examples=40, database=None)
seeds = st.integers(0, 2**31 - 1)
scales_of_weights = st.floats(1e-3, 10)
formats = st.sampled_from([GridFormat.parse(n) for n in ALL])


@quick
@given(seed=seeds, fmt=formats, scale=scales_of_weights, offset=st.floats(-2, 2))
def test_encode_and_decode_equal_the_slow_reference(seed: int, fmt: GridFormat, scale: float, offset: float) -> None:
    grid = fit(weights(seed, scale, offset * scale), fmt)
    weight = weights(seed + 1, 1.2 * scale, offset * scale)  # beyond the ends too
    codes = encode(weight, grid, fmt)
    decoded = decode(codes, grid, fmt)
    assert codes.dtype == torch.uint8
    assert decoded.dtype == torch.float32
    for row, columns, points in slow_groups(weight, grid, fmt):
        real = [p for p in points if not math.isnan(p)]
        wide = max(real) - min(real)
        for w, code, d in zip(
            weight[row, columns].tolist(), codes[row, columns].tolist(), decoded[row, columns].tolist(), strict=True
        ):
            nearest = min(abs(p - w) for p in real)
            assert abs(points[code] - w) <= nearest + 1e-6 * (wide + abs(w))  # a tie may go either way
            assert d == pytest.approx(points[code], rel=1e-6, abs=1e-6 * wide)


@quick
@given(seed=seeds, fmt=formats)
def test_grid_points_return_to_their_codes(seed: int, fmt: GridFormat) -> None:
    grid = fit(weights(seed), fmt)
    codes = any_codes(seed, fmt)
    before = codes.clone()
    decoded = decode(codes, grid, fmt)
    assert torch.equal(encode(decoded, grid, fmt), codes)
    assert torch.equal(decode(codes, grid, fmt), decoded)
    assert torch.equal(codes, before)  # decode works on a copy


@quick
@given(seed=seeds, fmt=formats, wide=st.floats(0.1, 5))
def test_snap_is_decode_of_encode_bit_for_bit_and_idempotent(seed: int, fmt: GridFormat, wide: float) -> None:
    grid = fit(weights(seed), fmt)
    moved = weights(seed + 1, 0.05 * wide)
    out = torch.full_like(moved, torch.nan)
    grids.snap(moved, grid, fmt, out=out)
    assert torch.equal(out, decode(encode(moved, grid, fmt), grid, fmt))
    again = torch.full_like(moved, torch.nan)
    grids.snap(out, grid, fmt, out=again)
    assert torch.equal(out, again)


@pytest.mark.parametrize("name", ["int3-g32-asym", "nvfp4"])
def test_snap_writes_into_a_parameter_and_into_one_column(name: str) -> None:
    fmt = GridFormat.parse(name)
    weight = weights(0, rows=1030)  # more than are done at a time, and some are left
    grid = fit(weight, fmt)
    expected = decode(encode(weight, grid, fmt), grid, fmt)
    parameter = torch.nn.Parameter(torch.zeros_like(weight))
    with torch.no_grad():
        grids.snap(weight, grid, fmt, out=parameter)
    assert torch.equal(parameter.detach(), expected)
    column = torch.zeros(COLUMNS, len(weight))
    shared, alone = grids.part(grid, fmt, 33, 34)
    grids.snap(weight[:, 33:34], shared, alone, out=column[33].unsqueeze(1))
    assert torch.equal(column[33], expected[:, 33])


@quick
@given(seed=seeds, fmt=formats)
def test_ends_are_the_least_and_the_largest_point(seed: int, fmt: GridFormat) -> None:
    weight = weights(seed)
    grid = fit(weight, fmt)
    low, high = grids.ends(grid, fmt)
    for row, columns, points in slow_groups(weight, grid, fmt):
        k = columns.start // groups_of(fmt)
        real = [p for p in points if not math.isnan(p)]
        assert float(low[row, k]) == pytest.approx(min(real), rel=1e-5, abs=1e-8)
        assert float(high[row, k]) == pytest.approx(max(real), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("operation", ["fit", "quantize", "encode", "decode", "within_cell"])
def test_a_group_that_does_not_divide_the_row_is_refused(operation: str) -> None:
    fmt = GridFormat.parse("int3-g64")
    weight, codes = torch.zeros(2, 96), torch.zeros(2, 96, dtype=torch.uint8)
    grid = Grid(torch.ones(2, 1), torch.ones(2, 1))
    call = {
        "fit": lambda: fit(weight, fmt),
        "quantize": lambda: quantize(weight, fmt),
        "encode": lambda: encode(weight, grid, fmt),
        "decode": lambda: decode(codes, grid, fmt),
        "within_cell": lambda: within_cell(weight, codes, grid, fmt),
    }[operation]
    with pytest.raises(InputError, match="a row of 96 weights can't be cut into groups of 64"):
        call()


@quick
@given(seed=seeds, fmt=formats, scale=scales_of_weights, offset=st.floats(-20, 20), wide=st.floats(0, 5))
def test_within_cell_always_rounds_to_its_code(
    seed: int, fmt: GridFormat, scale: float, offset: float, wide: float
) -> None:
    """Also for groups far from zero, and for codes that another method than rounding chose."""
    grid = fit(weights(seed, scale, offset * scale), fmt)
    anywhere = weights(seed + 1, scale * wide, offset * scale)
    codes = any_codes(seed, fmt)
    assert torch.equal(encode(within_cell(anywhere, codes, grid, fmt), grid, fmt), codes)


@pytest.mark.parametrize("value", [0.2, 0.7, 1.5, 3.0])
def test_within_cell_of_a_constant_group(value: float) -> None:
    """Such a group's zero is the largest that occurs, so a code is the smallest part of it."""
    fmt = GridFormat.parse("int3-g32")
    grid = fit(torch.full((1, 32), value), fmt)
    codes = (torch.arange(32) % 8).to(torch.uint8).view(1, 32)
    for shift in (-1e-3, 0.0, 1e-3):
        master = within_cell(torch.full((1, 32), value + shift), codes, grid, fmt)
        assert torch.equal(encode(master, grid, fmt), codes)


def test_within_cell_where_float32_itself_is_hardly_finer_than_the_grid() -> None:
    fmt = GridFormat.parse("gguf:q4_1")
    grid = Grid(torch.full((1, 1), 2.0**-22), torch.ones(1, 1))  # two floats from point to point
    codes = (torch.arange(32) % 16).to(torch.uint8).view(1, 32)
    for weight in (0.0, 1.0, 2.0):
        master = within_cell(torch.full((1, 32), weight), codes, grid, fmt)
        assert torch.equal(encode(master, grid, fmt), codes)


@quick
@given(seed=seeds, fmt=formats, wide=st.floats(0.5, 3))
def test_within_cell_keeps_what_rounds_to_its_code_already(seed: int, fmt: GridFormat, wide: float) -> None:
    grid = fit(weights(seed), fmt)
    weight = weights(seed + 1, 0.05 * wide)  # beyond the ends too, where the cells are open
    master = within_cell(weight, encode(weight, grid, fmt), grid, fmt)
    low, high = (spread(end, fmt) for end in grids.ends(grid, fmt))
    # 0.002 of half the way between two points next to a border, and float32 rounding elsewhere
    assert ((master - weight).abs() <= 1.05e-3 * (high - low) / 2 + 1e-5 * weight.abs()).all()
    centre = decode(encode(weight, grid, fmt), grid, fmt)
    assert torch.equal(encode(centre, grid, fmt), encode(weight, grid, fmt))
    torch.testing.assert_close(within_cell(centre, encode(centre, grid, fmt), grid, fmt), centre, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "grid", "cases"),
    [
        (
            "int2-g32-asym",  # points 0, 1, 2, 3
            Grid(torch.ones(1, 1), torch.zeros(1, 1)),
            [(0.3, 1, 0.5), (2.9, 1, 1.5), (1.2, 1, 1.2), (-5, 0, -5), (9, 3, 9), (9, 0, 0.5), (-5, 3, 2.5)],
        ),
        (
            "gguf:q4_0",  # a negative scale: points 8, 7 … -7
            Grid(-torch.ones(1, 1)),
            [(9, 0, 9), (7.7, 0, 7.7), (7, 0, 7.5), (0.4, 8, 0.4), (3, 8, 0.5), (-9, 15, -9), (2, 15, -6.5)],
        ),
        (
            "mxfp4",  # points 0, 1, 2, 3, 4, 6, 8, 12 and their negatives
            Grid(torch.full((1, 1), 2.0)),
            [(0.3, 0, 0.3), (4, 7, 10), (100, 7, 100), (9, 6, 9), (11, 6, 10), (5, 9, -0.5), (-1.6, 9, -1.5)],
        ),
    ],
)
def test_within_cell_moves_to_the_nearest_border_and_no_further(
    name: str, grid: Grid, cases: list[tuple[float, int, float]]
) -> None:
    fmt = GridFormat.parse(name)
    cases = (cases * 32)[:32]
    weight, codes, expected = (torch.tensor([case[i] for case in cases]).view(1, 32) for i in range(3))
    codes = codes.to(torch.uint8)
    ours = within_cell(weight.float(), codes, grid, fmt)
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=5e-3)
    assert torch.equal(encode(ours, grid, fmt), codes)


@pytest.mark.parametrize("name", ALL)
def test_a_part_of_a_grid_is_the_grid_of_those_columns(name: str) -> None:
    fmt = GridFormat.parse(name)
    weight = weights(0, columns=2 * COLUMNS)
    codes, grid = quantize(weight, fmt)
    whole = decode(codes, grid, fmt)
    size = fmt.group or COLUMNS
    for start, stop in [(0, size), (size, 2 * size), (size, size + 1), (size + 3, size + 9), (0, 2 * COLUMNS)]:
        some, alone = grids.part(grid, fmt, start, stop)
        assert torch.equal(decode(codes[:, start:stop], some, alone), whole[:, start:stop])
        assert torch.equal(encode(weight[:, start:stop], some, alone), encode(weight, grid, fmt)[:, start:stop])
        assert alone.group == (fmt.group if start % size == stop % size == 0 else 0)
    if fmt.group:
        with pytest.raises(InputError, match="neither whole groups"):
            grids.part(grid, fmt, size - 1, size + 1)


@pytest.mark.parametrize("name", [n for n in ALL if "fp4" not in n])
def test_rescaling_stretches_every_point_about_zero(name: str) -> None:
    fmt = GridFormat.parse(name)
    weight = weights(0)
    codes, grid = quantize(weight, fmt)
    factors = torch.linspace(0.5, 2, grid.scales.numel()).view(grid.scales.shape)
    stretched = grids.rescale(grid, factors, fmt)
    restored = grids.restore(grids.store(stretched, fmt), fmt)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(stretched, restored, strict=True))
    expected = decode(codes, grid, fmt) * spread(factors, fmt)
    torch.testing.assert_close(decode(codes, stretched, fmt), expected, rtol=2**-10, atol=2e-4)
    same = grids.rescale(grid, torch.ones_like(factors), fmt)
    assert torch.equal(decode(codes, same, fmt), decode(codes, grid, fmt))


@pytest.mark.parametrize("name", [n for n in ALL if "fp4" not in n])
def test_the_scales_gradient_is_that_of_straight_through_rounding(name: str) -> None:
    """LSQ, eq. 3, by automatic differentiation in float64: rounding passes gradients on, clipping stops them."""
    fmt = GridFormat.parse(name)
    grid, master, gradient = fit(weights(0), fmt), weights(1, 0.1), weights(2)  # many beyond the grid's ends
    served = decode(encode(master, grid, fmt), grid, fmt)
    rows, groups = grid.scales.shape
    log = torch.zeros(rows, groups, dtype=torch.float64, requires_grad=True)
    scale = (grid.scales.double() * log.exp()).unsqueeze(-1)
    zero = 0 if grid.zeros is None else grid.zeros.double().unsqueeze(-1)
    minimum = zero * log.exp().unsqueeze(-1) if fmt.form == "minimum" else 0
    shift = zero if fmt.form == "zero" else 0
    position = (master.double().view(rows, groups, -1) - minimum) / scale + shift
    point = ((served.double().view(rows, groups, -1) - minimum) / scale + shift).detach()
    values = torch.tensor([v for v in slow_values(fmt) if v == v], dtype=torch.float64)
    inside = (position > values.min()) & (position < values.max())
    assert 0.0 < inside.float().mean() < 1.0
    rounded = torch.where(inside, position + (point - position).detach(), point)
    expected = (rounded - shift) * scale + minimum
    (expected * gradient.double().view(rows, groups, -1)).sum().backward()
    ours = grids.scale_gradient(gradient, served, master, grid, fmt).double()
    # a master at the very end of its grid is inside or not by rounding
    torch.testing.assert_close(ours, log.grad, rtol=1e-3, atol=1e-4 * float(log.grad.abs().max()))


@pytest.mark.parametrize("name", ["int4-g32-sym", "int3-g64", "gguf:q4_1", "nvfp4"])
def test_off_borders_keeps_codes_and_leaves_room(name: str) -> None:
    fmt = GridFormat.parse(name)
    weight = weights(3, 0.05, 0.0)
    grid = fit(weight, fmt)
    codes, margin = encode(weight, grid, fmt), 2e-4
    moved = grids.off_borders(weight, codes, grid, fmt, margin)
    assert torch.equal(encode(moved, grid, fmt), codes)
    near = [(encode(weight + d, grid, fmt) != codes) for d in (margin, -margin)]
    still = [(encode(moved + 0.9 * d, grid, fmt) != codes) for d in (margin, -margin)]
    assert int((near[0] | near[1]).sum()) > 5
    assert not bool((still[0] & ~near[1]).any() or (still[1] & ~near[0]).any())
    assert torch.equal(moved[~(near[0] | near[1])], weight[~(near[0] | near[1])])
