"""GGUF's blocks: codes, grids and bytes bit for bit as the gguf package makes and reads them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.grid_reference import BLOCKS
from remend.compression.containers.gguf_blocks import from_gguf_blocks, to_gguf_blocks
from remend.compression.formats import GridFormat
from remend.compression.grids import Grid, decode, encode, quantize, snap
from remend.errors import InputError

KINDS = ["random", "zero", "denormal scale", "no scale", "constant", "outlier", "ties", "bfloat16", "below a power"]


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    weight = torch.randn(24, 512, generator=generator) * 0.05
    if kind == "zero":
        weight[::2] = 0
        weight[:, :256] = 0
    elif kind == "denormal scale":
        weight *= 1e-5
    elif kind == "no scale":  # below what float16 holds
        weight *= 1e-9
    elif kind == "constant":
        weight[:] = torch.randn(24, 1, generator=generator)
    elif kind == "outlier":
        weight[:, ::37] *= 1e4
    elif kind == "ties":
        weight = torch.randint(-8, 9, (24, 512), generator=generator) / 4
    elif kind == "bfloat16":
        weight = weight.bfloat16().float()
    elif kind == "below a power":
        top = 2.0 ** torch.arange(-12, 12).view(24, 1)
        for _ in range(3):
            top = top.nextafter(torch.zeros(1))
        weight = weight.clamp(-0.2, 0.2) * top
        weight[:, ::32] = top
    return weight


def their_type(fmt: GridFormat) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[fmt.name[5:].upper()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_and_weights_are_the_gguf_packages(name: str, kind: str) -> None:
    fmt, weight = GridFormat.parse(name), weights(kind)
    theirs = gguf.quants.quantize(weight.numpy(), their_type(fmt))
    their_weight = torch.from_numpy(gguf.quants.dequantize(theirs, their_type(fmt)))
    codes, grid = quantize(weight, fmt)
    ours = to_gguf_blocks(codes, grid, fmt)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, theirs)
    assert same_bits(decode(codes, grid, fmt), their_weight)
    read_codes, read_grid = from_gguf_blocks(theirs, fmt, weight.shape)
    assert torch.equal(read_codes, codes)
    assert same_bits(read_grid.scales, grid.scales)
    assert (read_grid.zeros is None) == (grid.zeros is None)
    assert grid.zeros is None or same_bits(read_grid.zeros, grid.zeros)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_what_the_package_reads_is_on_the_grid(name: str, kind: str) -> None:
    """Encoding a dequantized weight gives it back, also in blocks without a scale, where codes are any."""
    fmt, weight = GridFormat.parse(name), weights(kind)
    codes, grid = quantize(weight, fmt)
    on_grid = decode(codes, grid, fmt)
    out = torch.empty_like(on_grid)
    snap(on_grid, grid, fmt, out=out)
    assert torch.equal(out, on_grid)
    alive = (grid.scales != 0).repeat_interleave(fmt.group, 1)
    assert torch.equal(encode(on_grid, grid, fmt)[alive], codes[alive])


@pytest.mark.parametrize("name", BLOCKS)
def test_any_codes_on_any_grid_come_back_as_the_package_reads_them(name: str) -> None:
    """After training, codes are no longer what a writer would choose."""
    fmt = GridFormat.parse(name)
    codes, grid = quantize(weights("random"), fmt)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(fmt.levels, codes.shape, generator=generator).to(torch.uint8)
    read = gguf.quants.dequantize(to_gguf_blocks(codes, grid, fmt), their_type(fmt))
    assert same_bits(torch.from_numpy(read), decode(codes, grid, fmt))


def test_foreign_formats_shapes_and_codes_are_refused() -> None:
    fmt = GridFormat.parse("gguf:q4_0")
    codes, grid = quantize(weights("random"), fmt)
    blocks = to_gguf_blocks(codes, grid, fmt)
    with pytest.raises(InputError, match="int4-g32-sym is no block format of GGUF"):
        to_gguf_blocks(codes, grid, GridFormat.parse("int4-g32-sym"))
    with pytest.raises(InputError, match="don't fit each other"):
        to_gguf_blocks(codes, Grid(grid.scales[:, :3]), fmt)
    with pytest.raises(InputError, match="bytes are no 24 x 480 weights in gguf:q4_0"):
        from_gguf_blocks(blocks, fmt, (24, 480))
    ternary = GridFormat.parse("gguf:tq2_0")
    three = to_gguf_blocks(*quantize(weights("random"), ternary), ternary)
    three[0, 0] = 255
    with pytest.raises(InputError, match="codes or scales that gguf:tq2_0 does not have"):
        from_gguf_blocks(three, ternary, (24, 512))
