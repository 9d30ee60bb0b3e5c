"""Grids: names, fit, encode, decode and within_cell against a slow reference in plain Python floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remend.errors import InputError
from remend.grids import BITS, GROUPS, Grid, GridFormat, decode, encode, fit, snap, within_cell

quick = settings(deadline=None, max_examples=40, database=None)
seeds = st.integers(0, 2**31 - 1)
formats = st.builds(GridFormat, st.sampled_from(BITS), st.just(32), st.booleans())


def weights(seed: int, scale: float = 0.05, offset: float = 0.0, rows: int = 3, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale + offset


def half(value: float) -> float:
    return float(np.float16(value))


def slow_fit(group: list[float], bits: int, symmetric: bool) -> tuple[float, float]:
    """Scale and zero as the module's docstring defines them, each rounded to float16."""
    low, high, top = min(group), max(group), 2**bits - 1
    if symmetric:
        return half(max(2 * max(abs(low), abs(high)) / top, 2.0**-14)), 2.0 ** (bits - 1)
    scale = half(max((high - low) / top, 2.0**-14))
    return scale, half(-low / scale)


def slow_code(weight: float, scale: float, zero: float, bits: int) -> int:
    """The code whose grid point is nearest, by trying all."""
    return min(range(2**bits), key=lambda code: abs(scale * (code - zero) - weight))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int3-g64", GridFormat(3, 64, False)),
        ("int4-g32-sym", GridFormat(4, 32, True)),
        ("int2-g128-asym", GridFormat(2, 128, False)),
        ("int8-g32", GridFormat(8, 32, False)),
    ],
)
def test_parse(name: str, expected: GridFormat) -> None:
    assert GridFormat.parse(name) == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_name_and_parse_are_inverse(bits: int, group: int, symmetric: bool) -> None:
    fmt = GridFormat(bits, group, symmetric)
    assert GridFormat.parse(fmt.name) == fmt
    assert fmt.levels == 2**bits


@pytest.mark.parametrize(
    "name",
    ["", "int3", "int5-g64", "int3-g63", "int3-g64-", "int3-g64-symmetric", "INT3-G64", "xint3-g64", "int3-g64\n"],
)
def test_parse_refuses_and_says_what_is_allowed(name: str) -> None:
    with pytest.raises(InputError) as raised:
        GridFormat.parse(name)
    message = str(raised.value)
    assert f'unknown format "{name}"' in message
    assert "2, 3, 4, 8 bits" in message
    assert "32, 64, 128" in message
    assert "-sym or -asym" in message


def test_bits_per_weight_counts_scale_and_zero() -> None:
    assert GridFormat.parse("int3-g64").bits_per_weight == 3.5
    assert GridFormat.parse("int4-g32-sym").bits_per_weight == 4.5


@quick
@given(seed=seeds, fmt=formats, scale=st.floats(1e-3, 10), offset=st.floats(-2, 2))
def test_fit_encode_decode_equal_the_slow_reference(seed: int, fmt: GridFormat, scale: float, offset: float) -> None:
    weight = weights(seed, scale, offset * scale)
    grid = fit(weight, fmt)
    codes = encode(weight, grid, fmt)
    decoded = decode(codes, grid, fmt)
    assert grid.scales.shape == grid.zeros.shape == (3, 2)
    assert codes.dtype == torch.uint8
    assert decoded.dtype == torch.float32
    for row in range(3):
        for k in range(2):
            part = slice(k * 32, k * 32 + 32)
            group = weight[row, part].tolist()
            step, zero = slow_fit(group, fmt.bits, fmt.symmetric)
            # float32 division against float64: the float16 rounding may fall to either neighbour
            assert grid.scales[row, k].item() == pytest.approx(step, rel=2**-10)
            step, zero = grid.scales[row, k].item(), grid.zeros[row, k].item()
            assert zero == pytest.approx(
                fmt.levels / 2 if fmt.symmetric else -min(group) / step, rel=2**-10, abs=2**-24
            )
            for w, code, d in zip(group, codes[row, part].tolist(), decoded[row, part].tolist(), strict=True):
                nearest = slow_code(w, step, zero, fmt.bits)
                distances = [abs(step * (c - zero) - w) for c in (code, nearest)]
                assert distances[0] <= distances[1] + 1e-4 * step  # a tie may go either way
                assert d == pytest.approx(step * (code - zero), rel=1e-6, abs=1e-7 * step * fmt.levels)


@quick
@given(seed=seeds, fmt=formats, scale=st.floats(1e-6, 100))
def test_what_a_file_holds_is_exact_in_float16_and_codes_are_in_range(seed: int, fmt: GridFormat, scale: float) -> None:
    weight = weights(seed, scale)
    grid = fit(weight, fmt)
    for tensor in grid:
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.half().float())
        assert torch.isfinite(tensor).all()
    codes = encode(weight * 3, grid, fmt)  # far outside of the grid too
    assert int(codes.max()) <= fmt.levels - 1
    assert int(codes.min()) >= 0


@quick
@given(seed=seeds, fmt=formats)
def test_grid_points_return_to_their_codes(seed: int, fmt: GridFormat) -> None:
    grid = fit(weights(seed), fmt)
    codes = torch.randint(fmt.levels, (3, 64), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    decoded = decode(codes, grid, fmt)
    assert torch.equal(encode(decoded, grid, fmt), codes)
    assert torch.equal(decode(codes, grid, fmt), decoded)
    assert codes.dtype == torch.uint8  # decode works on a copy


@quick
@given(seed=seeds, bits=st.sampled_from(BITS), offset=st.floats(-3, 3))
def test_asymmetric_grids_reach_both_extremes(seed: int, bits: int, offset: float) -> None:
    fmt = GridFormat(bits, 32, False)
    weight = weights(seed, 1.0, offset)
    grid = fit(weight, fmt)
    grouped = weight.view(3, 2, 32)
    low, high = grid.scales * -grid.zeros, grid.scales * (fmt.levels - 1 - grid.zeros)
    # float16 rounding of scale and zero moves an end by at most 2^-11 of each
    slack = 2**-10 * (grid.scales * (fmt.levels + grid.zeros.abs()))
    assert ((low - grouped.amin(-1)).abs() <= slack).all()
    assert ((high - grouped.amax(-1)).abs() <= slack).all()
    codes = encode(weight, grid, fmt).view(3, 2, 32)
    assert (codes.amin(-1) == 0).all()
    assert (codes.amax(-1) == fmt.levels - 1).all()


@quick
@given(seed=seeds, fmt=formats)
def test_no_weight_is_further_than_half_a_step_from_its_point(seed: int, fmt: GridFormat) -> None:
    weight = weights(seed)
    grid = fit(weight, fmt)
    error = (decode(encode(weight, grid, fmt), grid, fmt) - weight).abs().view(3, 2, 32).amax(-1)
    assert (error <= grid.scales * (0.5 + 2**-10 * fmt.levels)).all()


def test_finer_grids_err_less() -> None:
    weight = weights(0)
    errors = []
    for bits in BITS:
        fmt = GridFormat(bits, 32, False)
        grid = fit(weight, fmt)
        errors.append(float((decode(encode(weight, grid, fmt), grid, fmt) - weight).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


@quick
@given(seed=seeds, fmt=formats, spread=st.floats(0.1, 5))
def test_snap_is_decode_of_encode_bit_for_bit(seed: int, fmt: GridFormat, spread: float) -> None:
    grid = fit(weights(seed), fmt)
    moved = weights(seed + 1, 0.05 * spread)
    out = torch.full_like(moved, torch.nan)
    snap(moved, grid, fmt, out=out)
    assert torch.equal(out, decode(encode(moved, grid, fmt), grid, fmt))


def test_snap_writes_into_a_parameter() -> None:
    fmt = GridFormat(3, 32, False)
    weight = weights(0)
    grid = fit(weight, fmt)
    parameter = torch.nn.Parameter(torch.zeros_like(weight))
    with torch.no_grad():
        snap(weight, grid, fmt, out=parameter)
    assert torch.equal(parameter.detach(), decode(encode(weight, grid, fmt), grid, fmt))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_stay_zero(bits: int, symmetric: bool) -> None:
    fmt = GridFormat(bits, 32, symmetric)
    weight = torch.zeros(2, 64)
    grid = fit(weight, fmt)
    assert torch.equal(decode(encode(weight, grid, fmt), grid, fmt), weight)


@pytest.mark.parametrize("value", [0.01, -0.3, 1.0, -3.0, 5.0, -40.0, 1000.0])
@pytest.mark.parametrize("name", ["int3-g32-asym", "int3-g32-sym"])
def test_constant_groups_stay_nearly_constant(value: float, name: str) -> None:
    fmt = GridFormat.parse(name)
    weight = torch.full((1, 32), value)
    grid = fit(weight, fmt)
    decoded = decode(encode(weight, grid, fmt), grid, fmt)
    assert torch.isfinite(decoded).all()
    allowed = abs(value) * (1.01 / 7 if fmt.symmetric else 2**-9) + 1e-4  # symmetric: half a step; else float16's step
    assert float((decoded - weight).abs().max()) <= allowed


@pytest.mark.parametrize("operation", ["fit", "encode", "decode", "within_cell"])
def test_a_group_that_does_not_divide_the_row_is_refused(operation: str) -> None:
    fmt, weight, codes = GridFormat(3, 64, False), torch.zeros(2, 96), torch.zeros(2, 96, dtype=torch.uint8)
    grid = Grid(torch.ones(2, 1), torch.ones(2, 1))
    call = {
        "fit": lambda: fit(weight, fmt),
        "encode": lambda: encode(weight, grid, fmt),
        "decode": lambda: decode(codes, grid, fmt),
        "within_cell": lambda: within_cell(weight, codes, grid, fmt),
    }[operation]
    with pytest.raises(InputError, match="a row of 96 weights can't be cut into groups of 64"):
        call()


@quick
@given(seed=seeds, fmt=formats, scale=st.floats(1e-3, 10), offset=st.floats(-20, 20), spread=st.floats(0, 5))
def test_within_cell_always_rounds_to_its_code(
    seed: int, fmt: GridFormat, scale: float, offset: float, spread: float
) -> None:
    """Also for groups far from zero, and for codes that another method than rounding chose."""
    grid = fit(weights(seed, scale, offset * scale), fmt)
    anywhere = weights(seed + 1, scale * spread, offset * scale)
    codes = torch.randint(fmt.levels, (3, 64), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(encode(within_cell(anywhere, codes, grid, fmt), grid, fmt), codes)


@pytest.mark.parametrize("value", [0.2, 0.7, 1.5, 3.0])
def test_within_cell_of_a_constant_group(value: float) -> None:
    """Such a group's zero is the largest that occurs, so a code is the smallest part of it."""
    fmt = GridFormat(3, 32, False)
    grid = fit(torch.full((1, 32), value), fmt)
    codes = (torch.arange(32) % 8).to(torch.uint8).view(1, 32)
    for shift in (-1e-3, 0.0, 1e-3):
        master = within_cell(torch.full((1, 32), value + shift), codes, grid, fmt)
        assert torch.equal(encode(master, grid, fmt), codes)


@quick
@given(seed=seeds, fmt=formats, spread=st.floats(0.5, 3))
def test_within_cell_keeps_what_rounds_to_its_code_already(seed: int, fmt: GridFormat, spread: float) -> None:
    grid = fit(weights(seed), fmt)
    weight = weights(seed + 1, 0.05 * spread)  # beyond the ends too, where the cells are open
    master = within_cell(weight, encode(weight, grid, fmt), grid, fmt)
    step = grid.scales.repeat_interleave(32, 1)
    # 0.001 step next to a border, and float32 rounding elsewhere
    assert ((master - weight).abs() <= 1.05e-3 * step + 1e-5 * weight.abs()).all()
    centred = decode(encode(weight, grid, fmt), grid, fmt) + 0.4 * step * torch.sign(weight)
    codes = encode(centred, grid, fmt)
    torch.testing.assert_close(within_cell(centred, codes, grid, fmt), centred, rtol=1e-4, atol=1e-6)


def test_within_cell_moves_to_the_nearest_border_and_no_further() -> None:
    fmt = GridFormat(2, 32, False)
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1))  # points 0, 1, 2, 3
    weight = torch.tensor([0.3, 2.9, 1.2, -5.0, 9.0, 9.0, -5.0, 1.5] * 4).view(1, 32)
    codes = torch.tensor([1, 1, 1, 0, 3, 0, 3, 2] * 4, dtype=torch.uint8).view(1, 32)
    expected = torch.tensor([0.5, 1.5, 1.2, -5.0, 9.0, 0.5, 2.5, 1.5] * 4).view(1, 32)
    ours = within_cell(weight, codes, grid, fmt)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)
    assert torch.equal(encode(ours, grid, fmt), codes)
