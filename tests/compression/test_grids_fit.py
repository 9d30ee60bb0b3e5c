"""Where a grid is placed on weights and how it is stored: against definitions in plain Python, and libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.grid_reference import ALL, COLUMNS, groups_of, spread, weights
from remend.compression.formats import BITS, GridFormat
from remend.compression.grids import decode, encode, ends, fit, quantize, restore, store
from remend.errors import InputError

quick = settings(deadline=None, max_examples=40, database=None)
seeds = st.integers(0, 2**31 - 1)
scales_of_weights = st.floats(1e-3, 10)
formats = st.sampled_from([GridFormat.parse(n) for n in ALL])


def half(value: float) -> float:
    return float(np.float16(value))


def slow_fit(group: list[float], fmt: GridFormat) -> tuple[float, float]:
    """Scale and zero (or minimum) as the format's definition gives them, before nvfp4's second scale."""
    low, high, top = min(group), max(group), 2**fmt.bits - 1
    largest = max(abs(low), abs(high))
    signed = next(w for w in group if abs(w) == largest)
    if fmt.name.endswith("-sym"):
        return half(max(2 * largest / top, 2.0**-14)), 0.0
    if fmt.name.endswith("-asym"):
        scale = half(max((high - low) / top, 2.0**-14))
        return scale, half(-low / scale)
    if fmt.name.endswith("-zp"):
        low, high = min(low, 0.0), max(high, 0.0)
        scale = half(max((high - low) / top, 2.0**-14))
        return scale, float(min(max(round(-low / scale), 0), top))
    if fmt.name in ("gguf:q4_1", "gguf:q5_1"):
        return half((high - low) / top), half(low)
    if "mxfp4" in fmt.name:
        return 2.0 ** (math.floor(math.log2(largest)) - 2), 0.0
    of = {"gguf:q4_0": -8, "gguf:q5_0": -16, "gguf:q8_0": 127, "gguf:tq2_0": 1, "nf4": 1, "fp8-e4m3": 448}[fmt.name]
    scale = (signed if of < 0 else largest) / of
    return (half(scale) if fmt.gguf else scale), 0.0


@quick
@given(seed=seeds, fmt=formats, scale=scales_of_weights, offset=st.floats(-2, 2))
def test_fit_places_the_grid_as_defined(seed: int, fmt: GridFormat, scale: float, offset: float) -> None:
    weight = weights(seed, scale, offset * scale)
    grid = fit(weight, fmt)
    size = groups_of(fmt)
    assert grid.scales.shape == (3, COLUMNS // size)
    if fmt.name == "nvfp4":
        assert float(grid.outer) == pytest.approx(448 * 6 / float(weight.abs().max()), rel=1e-6)
    for row in range(3):
        for k in range(COLUMNS // size):
            group = weight[row, k * size : (k + 1) * size].tolist()
            got = float(grid.scales[row, k])
            if fmt.name == "nvfp4":
                expected = max(map(abs, group)) / 6 * float(grid.outer)
                assert abs(got - expected) <= expected * 2**-4  # E4M3 has four significant bits
                assert got == pytest.approx(float(torch.tensor(expected).to(torch.float8_e4m3fn)), rel=2**-3)
                continue
            step, zero = slow_fit(group, fmt)
            # float32 division against float64: the float16 rounding may fall to either neighbour
            assert got == pytest.approx(step, rel=2**-10)
            if grid.zeros is None:
                assert zero == 0.0
            elif fmt.name.endswith("-asym"):
                assert float(grid.zeros[row, k]) == pytest.approx(half(-min(group) / got), rel=2**-10, abs=2**-24)
            elif fmt.name.endswith("-zp"):
                assert abs(float(grid.zeros[row, k]) - zero) <= 1
            else:
                assert float(grid.zeros[row, k]) == zero


@quick
@given(seed=seeds, fmt=formats, scale=st.floats(1e-6, 100))
def test_a_file_holds_the_grid_exactly(seed: int, fmt: GridFormat, scale: float) -> None:
    weight = weights(seed, scale)
    grid = fit(weight, fmt)
    stored = store(grid, fmt)
    assert stored["scales"].dtype == (torch.uint8 if "mxfp4" in fmt.name else fmt.scale)
    assert ("zeros" in stored) == (fmt.zero is not None)
    assert ("outer" in stored) == (fmt.name == "nvfp4")
    again = restore(stored, fmt)
    for one, other in zip(grid, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == torch.float32 and torch.equal(one, other) and one.isfinite().all())


def test_e8m0_scales_cover_the_smallest_and_the_largest() -> None:
    fmt = GridFormat.parse("mxfp4")
    exponents = torch.arange(255, dtype=torch.uint8).view(1, -1)
    grid = restore({"scales": exponents}, fmt)
    assert grid.scales[0].tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert torch.equal(store(grid, fmt)["scales"], exponents)


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        ("gguf:q4_0", {}, "gguf:q4_0 needs scales of type torch.float16"),
        ("gguf:q4_0", {"scales": torch.ones(2, 2)}, "needs scales of type torch.float16"),
        ("mxfp4", {"scales": torch.ones(2, 2)}, "needs scales of type torch.uint8"),
        ("int3-g64", {"scales": torch.ones(2, 2).half()}, "needs zeros of type torch.float16"),
        (
            "int4-g32-zp",
            {"scales": torch.ones(2, 2).half(), "zeros": torch.ones(2, 1, dtype=torch.uint8)},
            "needs zeros of type torch.uint8, one a scale",
        ),
        ("nvfp4", {"scales": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "needs one outer scale"),
    ],
)
def test_restore_refuses_what_is_no_grid(name: str, stored: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        restore(stored, GridFormat.parse(name))


@quick
@given(seed=seeds, fmt=formats)
def test_quantize_errs_by_little_more_than_the_nearest_codes(seed: int, fmt: GridFormat) -> None:
    weight = weights(seed)
    codes, grid = quantize(weight, fmt)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grid, fit(weight, fmt), strict=True))
    nearest = encode(weight, grid, fmt)
    error = (decode(codes, grid, fmt) - weight).abs()
    if not fmt.gguf:
        assert torch.equal(codes, nearest)
    else:  # codes by scale and minimum before their rounding to float16, a share of 2^-11 of each
        low, high = (spread(end, fmt) for end in ends(grid, fmt))
        slack = 2**-10 * (high - low + torch.maximum(low.abs(), high.abs()))
        assert (error <= (decode(nearest, grid, fmt) - weight).abs() + slack).all()


@quick
@given(seed=seeds, bits=st.sampled_from(BITS), offset=st.floats(-4, 4))
def test_integer_zeros_are_codes_of_exact_zero(seed: int, bits: int, offset: float) -> None:
    fmt = GridFormat.parse(f"int{bits}-g32-zp")
    grid = fit(weights(seed, 1.0, offset), fmt)
    assert torch.equal(grid.zeros, grid.zeros.to(torch.uint8).float())
    assert (grid.zeros <= fmt.levels - 1).all()
    zeros = spread(grid.zeros, fmt).to(torch.uint8)
    assert torch.equal(decode(zeros, grid, fmt), torch.zeros(3, COLUMNS))


@pytest.mark.parametrize("name", ALL)
def test_groups_of_zeros_stay_zero(name: str) -> None:
    fmt = GridFormat.parse(name)
    weight = torch.zeros(2, COLUMNS)
    codes, grid = quantize(weight, fmt)
    assert torch.equal(decode(codes, grid, fmt), weight)
    assert torch.equal(decode(encode(weight, grid, fmt), grid, fmt), weight)


@pytest.mark.parametrize("value", [0.01, -0.3, 1.0, -3.0, 5.0, -40.0, 1000.0])
@pytest.mark.parametrize("name", ALL)
def test_constant_groups_stay_nearly_constant(value: float, name: str) -> None:
    fmt = GridFormat.parse(name)
    weight = torch.full((1, COLUMNS), value)
    codes, grid = quantize(weight, fmt)
    error = float((decode(codes, grid, fmt) - weight).abs().max()) / abs(value)
    if name.endswith("-sym"):
        assert error <= 1.01 / (2**fmt.bits - 1) + 0.01  # half a step
    elif "mxfp4" in name:
        assert error <= 0.25  # 8 rounds to 6
    else:
        assert error <= 2**-4 if name == "nvfp4" else error <= 2**-9


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("name", ["int4-g32-sym", "int4-g32-asym", "gguf:q4_1", "gguf:q8_0"])
def test_weights_beyond_the_scales_are_refused(name: str, value: float) -> None:
    weight = weights(0)
    weight[1, 7] = value
    with pytest.raises(InputError, match=f"not finite, or too large for the scales of {name}"):
        fit(weight, GridFormat.parse(name))


def test_a_part_of_a_matrix_is_fitted_under_its_outer_scale() -> None:
    fmt = GridFormat.parse("nvfp4")
    weight = weights(0)
    grid = fit(weight, fmt)
    some = fit(weight[:, 64:128].contiguous(), fmt, outer=grid.outer)
    assert torch.equal(some.scales, grid.scales[:, 4:8])
    assert torch.equal(some.outer, grid.outer)


KINDS = ["random", "bfloat16", "outlier", "tiny"]


def library_weights(kind: str) -> Tensor:
    weight = weights(5, rows=16, columns=512)
    if kind == "bfloat16":  # many exact ties
        return weight.bfloat16().float()
    if kind == "outlier":
        weight[::3, ::37] *= 1e3
    return weight * (1e-4 if kind == "tiny" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int4-g32-sym", "int8-g64-sym", "int4-g32-zp", "int8-g128-zp", "fp8-e4m3", "nvfp4"])
def test_compressed_tensors_has_the_same_weights(name: str, kind: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    fmt, weight = GridFormat.parse(name), library_weights(kind)
    kwargs = {"num_bits": fmt.bits, "symmetric": not name.endswith("-zp")}
    if name == "nvfp4":
        kwargs |= {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
        kwargs |= {"zp_dtype": torch.float8_e4m3fn}
    else:
        kwargs |= {"strategy": "group", "group_size": fmt.group} if fmt.group else {"strategy": "channel"}
    args = library.QuantizationArgs(type="int" if name.startswith("int") else "float", **kwargs)
    codes, grid = quantize(weight, fmt)
    outer = None if grid.outer is None else grid.outer.view(1)
    zeros = torch.zeros_like(grid.scales) if grid.zeros is None else grid.zeros - 2 ** (fmt.bits - 1)
    theirs = their_quantize(weight, grid.scales, zeros, args, global_scale=outer)
    again = dequantize(theirs, grid.scales, zeros, args, dtype=torch.float32, global_scale=outer)
    ours = decode(codes, grid, fmt)
    # of integers, a weight halfway between codes may fall to either side: the library's codes are signed
    assert (again != ours).sum() <= (2 if name.startswith("int") else 0)
    grouped = weight.view(16, -1, groups_of(fmt) if fmt.group else 512)
    if name == "nvfp4":
        assert torch.equal(generate_gparam(weight.min(), weight.max()), outer)
    scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=outer)
    exact = not name.startswith("int")  # theirs stay float32
    small = torch.finfo(torch.float16).smallest_normal if not exact else 0
    torch.testing.assert_close(grid.scales, scales.clamp(min=small), rtol=0 if exact else 2**-11, atol=0)


@pytest.mark.parametrize("kind", ["random", "outlier", "tiny", "quiet block"])
def test_torchao_has_the_same_nvfp4(kind: str) -> None:
    """Its scale of the matrix is the reciprocal, so weights agree to float32's rounding, and ties may differ."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    fmt, weight = GridFormat.parse("nvfp4"), library_weights(kind)
    if kind == "quiet block":
        weight[3, :16] *= 1e-6
    codes, grid = quantize(weight, fmt)
    whole = nv.per_tensor_amax_to_scale(weight.abs().max())
    scales, _ = nv.nvfp4_quantize(weight, 16, whole)
    assert torch.equal(scales.float(), grid.scales)
    theirs = nv.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole).dequantize(torch.float32)
    torch.testing.assert_close(theirs, decode(codes, grid, fmt), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_torchao_has_the_same_mxfp4(kind: str) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    fmt, weight = GridFormat.parse("mxfp4"), library_weights(kind)
    codes, grid = quantize(weight, fmt)
    scales, _ = mx.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    assert torch.equal(scales.view(torch.uint8), store(grid, fmt)["scales"])
    theirs = mx.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(theirs, decode(codes, grid, fmt))


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_has_the_same_nf4(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    fmt, weight = GridFormat.parse("nf4"), library_weights(kind)
    codes, grid = quantize(weight, fmt)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(state.absmax.view(grid.scales.shape), grid.scales)
    assert torch.equal(bnb.dequantize_4bit(packed, state), decode(codes, grid, fmt))
