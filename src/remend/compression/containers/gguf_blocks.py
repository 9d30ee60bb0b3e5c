"""The bytes of GGUF's quantized blocks: codes and grids to bytes and back, as the gguf package lays them out.

Legend: O rows (outputs), I columns (inputs), N blocks of the matrix, S bytes a block.

A row is a run of blocks of 32 weights (tq2_0: 256). Sizes and places of the parts (ggml-common.h):

    q4_0    d float16, 16 bytes: code j in the low half, code j + 16 in the high half of byte j      18 bytes
    q4_1    d, m float16, 16 bytes as q4_0                                                           20
    q5_0    d, 4 bytes: the fifth bits, least significant first, 16 bytes: the low four as q4_0      22
    q5_1    d, m, 4 bytes, 16 bytes                                                                  24
    q8_0    d, 32 signed bytes                                                                       34
    mxfp4   exponent byte, 16 bytes as q4_0                                                          17
    tq2_0   64 bytes: weights j, j + 32, j + 64, j + 96 of each 128 in byte j, lowest first; d       66
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remend.compression.grids import Grid, GridFormat, restore, store
from remend.errors import InputError

Bytes = npt.NDArray[np.uint8]


def to_gguf_blocks(codes_OI: Tensor, grid: Grid, fmt: GridFormat) -> Bytes:
    """Bytes [O, bytes a row] from which `gguf.quants.dequantize` gives decode(codes, grid, fmt).

    Raises InputError when the format is none of GGUF's, or codes and grid are not of one matrix.
    """
    _require(fmt)
    rows, columns = codes_OI.shape
    if columns % fmt.group or grid.scales.shape != (rows, columns // fmt.group):
        raise InputError(f"codes {tuple(codes_OI.shape)} and scales {tuple(grid.scales.shape)} don't fit each other")
    codes_NG = codes_OI.cpu().reshape(-1, fmt.group)
    stored = store(grid, fmt)
    head = [_raw(stored[key]) for key in ("scales", "zeros") if key in stored]
    if fmt.bits == 8:
        parts = [*head, (codes_NG.to(torch.int16) - fmt.offset).to(torch.int8).view(torch.uint8)]
    elif fmt.bits == 2:
        parts = [_interleave(codes_NG.view(-1, 2, 4, 32), 2), *head]
    else:
        parts = [*head, _interleave((codes_NG & 15).view(-1, 1, 2, 16), 4)]
        if fmt.bits == 5:
            fifth = _interleave((codes_NG >> 4).view(-1, 4, 8, 1), 1)
            parts.insert(-1, fifth)
    return np.asarray(torch.cat(parts, dim=1).view(rows, -1).numpy())


def from_gguf_blocks(blocks: Bytes, fmt: GridFormat, shape: Sequence[int]) -> tuple[Tensor, Grid]:
    """Codes (uint8 [O, I]) and grid of a matrix as a GGUF file holds it: the inverse of `to_gguf_blocks`.

    Args:
        blocks: the tensor's bytes, of any shape (a GGUFReader's `data`).
        fmt: 'gguf:q4_0' …
        shape: (O, I) as torch counts, rows first; GGUF's own shape is the other way round.

    Raises:
        InputError: not a GGUF format, bytes that don't make up the shape, or codes and scales that no writer makes.
    """
    _require(fmt)
    rows, columns = shape
    head = (1 if fmt.table else 2) * (2 if fmt.zero else 1)
    size = head + fmt.group * fmt.bits // 8
    if columns % fmt.group or blocks.nbytes != rows * columns // fmt.group * size:
        raise InputError(f"{blocks.nbytes} bytes are no {rows} x {columns} weights in {fmt.name}")
    bytes_NS = torch.from_numpy(np.array(blocks).view(np.uint8).reshape(-1, size))
    if fmt.bits == 2:
        body_NS, head_NS = bytes_NS[:, :-head], bytes_NS[:, -head:]
    else:
        head_NS, body_NS = bytes_NS[:, :head], bytes_NS[:, head:]
    if fmt.bits == 8:
        codes_NG = (body_NS.contiguous().view(torch.int8).to(torch.int16) + fmt.offset).to(torch.uint8)
    elif fmt.bits == 2:
        codes_NG = _separate(body_NS.reshape(-1, 2, 1, 32), 2)
    else:
        codes_NG = _separate(body_NS[:, -16:].reshape(-1, 1, 1, 16), 4)
        if fmt.bits == 5:
            codes_NG |= _separate(body_NS[:, :4].reshape(-1, 4, 1, 1), 1) << 4
    words_NH = head_NS.contiguous().view(torch.uint8 if fmt.table else fmt.scale)
    places = {key: words_NH[:, i].reshape(rows, -1) for i, key in enumerate(("scales", "zeros")[: words_NH.shape[1]])}
    if int(codes_NG.max()) >= fmt.levels or (fmt.table and int(places["scales"].max()) == 255):
        raise InputError(f"the bytes hold codes or scales that {fmt.name} does not have")
    return codes_NG.reshape(rows, columns), restore(places, fmt)


def _require(fmt: GridFormat) -> None:
    if not fmt.gguf or not fmt.group:
        raise InputError(f"{fmt.name} is no block format of GGUF")


def _raw(values_OK: Tensor) -> Tensor:
    """The bytes [N, size of one] of one number a block."""
    return values_OK.cpu().reshape(-1, 1).contiguous().view(torch.uint8)


def _interleave(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, runs, parts, bytes] → [N, runs · bytes]: part p of a run in bits p · `bits` of its bytes."""
    out = torch.zeros_like(codes[:, :, 0])
    for place in range(codes.shape[2]):
        out |= codes[:, :, place] << (place * bits)
    return out.flatten(1)


def _separate(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_interleave`: uint8 [N, runs, 1, bytes] → [N, codes]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    parts: Tensor = (packed >> shifts) & (2**bits - 1)
    return parts.flatten(1)
