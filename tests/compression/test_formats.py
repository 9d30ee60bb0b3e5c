"""Formats: names, sizes, and the tables of values against their definitions."""

from __future__ import annotations

import math

import gguf
import pytest
import torch
from scipy.stats import norm

from helpers.grid_reference import BLOCKS, OTHERS
from remend.compression.formats import GridFormat, nearest, round_e2m1, table_of
from remend.errors import InputError

CPU = torch.device("cpu")
TABLES = ["e2m1", "e2m1 gguf", "nf4", "e4m3"]


def test_every_promised_format_is_there_under_its_name() -> None:
    integers = [f"int{b}-g{g}-{z}" for b in (2, 3, 4, 8) for g in (32, 64, 128) for z in ("asym", "sym", "zp")]
    assert all(GridFormat.parse(name).name == name for name in (*integers, *OTHERS))
    assert GridFormat.parse("int3-g64") == GridFormat.parse("int3-g64-asym"), "asymmetric is the default"


WRONG = ["", "int3", "int5-g64", "int3-g63", "int3-g64-", "int3-g64-symmetric", "INT3-G64", "xint3-g64", "int3-g64\n"]


@pytest.mark.parametrize("name", [*WRONG, "q4_0"])
def test_parse_refuses_and_says_what_is_allowed(name: str) -> None:
    with pytest.raises(InputError) as raised:
        GridFormat.parse(name)
    message = str(raised.value)
    assert f'unknown format "{name}"' in message
    for allowed in ("2, 3, 4, 8 bits", "32, 64, 128", "-sym", "-zp", "gguf:q4_0", "nvfp4"):
        assert allowed in message
    with pytest.raises(InputError, match='Did you mean "gguf:q4_0"'):
        GridFormat.parse("gguf:q4-0")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int3-g64", 3 + 32 / 64),
        ("int4-g32-sym", 4.5),
        ("int4-g128-zp", 4 + (16 + 4) / 128),
        ("nf4", 4.5),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
        ("fp8-e4m3", 8 + 32 / 512),
    ],
)
def test_bits_per_weight_counts_scale_and_zero(name: str, bits: float) -> None:
    assert GridFormat.parse(name).bits_per_weight(512) == bits


@pytest.mark.parametrize("name", BLOCKS)
def test_bits_per_weight_of_ggufs_blocks_is_theirs(name: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name[5:].upper()]]
    fmt = GridFormat.parse(name)
    assert fmt.group == block
    assert fmt.bits_per_weight(1024) == 8 * size / block


def test_nf4_is_made_of_normal_quantiles() -> None:
    """Appendix E of QLoRA as bitsandbytes' create_normal_map computes it: 8 positive values, 0, 7 negative ones."""
    offset = 0.9677083
    positive = [norm.ppf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-norm.ppf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64) / max(positive)
    torch.testing.assert_close(table_of("nf4", CPU).values.double(), expected, rtol=0, atol=2e-6)


def small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Value of a sign, exponent, mantissa code by IEEE 754's rule, without infinities."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    return sign * (fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))


@pytest.mark.parametrize(("name", "shape"), [("e2m1", (2, 1, 1)), ("e4m3", (4, 3, 7))])
def test_small_floats_follow_their_bits(name: str, shape: tuple[int, int, int]) -> None:
    values = table_of(name, CPU).values.tolist()
    for code, value in enumerate(values):
        if name == "e4m3" and code & 127 == 127:
            assert math.isnan(value)
        else:
            assert value == small_float(code, *shape)


@pytest.mark.parametrize("name", TABLES)
def test_points_are_distinct_and_borders_between_them(name: str) -> None:
    table = table_of(name, CPU)
    assert (table.points.diff() > 0).all()
    assert torch.equal(table.values[table.codes.int()], table.points)
    assert torch.equal(table.point_of[table.codes.int()], torch.arange(len(table.points), dtype=torch.int32))
    middle = (table.points[1:].double() + table.points[:-1].double()) / 2
    torch.testing.assert_close(table.borders.double(), middle, rtol=2e-7, atol=0)
    assert len(table.points) == {"nf4": 16, "e4m3": 253}.get(name, 15)


@pytest.mark.parametrize("name", TABLES)
def test_nearest_is_a_search_among_the_borders(name: str) -> None:
    """The bins' shortcut, at random positions, at every border and one float beside it, and far outside."""
    table = table_of(name, CPU)
    around = torch.cat([table.borders, table.points])
    infinity = torch.tensor(torch.inf)
    spread = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * table.points[-1] / 2
    far = torch.tensor([1e30, -1e30, 0.0, -0.0, 1e-40])
    x = torch.cat([around, around.nextafter(infinity), around.nextafter(-infinity), spread, spread / 1000, far])
    expected = table.codes[torch.bucketize(x, table.borders)]
    assert torch.equal(nearest(x.clone(), name), expected)
    if name == "e2m1":
        assert torch.equal(round_e2m1(x.clone()).view(torch.int32), table.values[expected.int()].view(torch.int32))


@pytest.mark.parametrize(
    ("name", "positions", "values"),
    [
        ("e2m1", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
        ("e2m1 gguf", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]),
        ("e4m3", [17.0, 19.0, 432.0, 2**-10, 3 * 2**-10], [16.0, 20.0, 448.0, 0.0, 2**-8]),
    ],
)
def test_ties_go_to_the_even_code_or_as_gguf_does_toward_zero(
    name: str, positions: list[float], values: list[float]
) -> None:
    both = torch.tensor([*positions, *(-p for p in positions)])
    codes = nearest(both, name)
    assert table_of(name, CPU).values[codes.int()].tolist() == [*values, *(-v for v in values)]
