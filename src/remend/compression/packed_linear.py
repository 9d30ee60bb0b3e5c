"""A linear layer on a grid that is not trained: it holds codes, and decodes them where it is multiplied.

The weight that comes of it is the one that the grid describes, in every bit (grids.decode), so the product is that of
the dense layer. It is alive for one product, of one layer, forwards and backwards.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remend.compression.formats import GridFormat
from remend.compression.grids import Grid, decode, restore, store
from remend.compression.stored_grid import StoredGrid
from remend.models.frozen_linear import FrozenLinear
from remend.models.matrices import matrices
from remend.models.protocols import CausalLM

CHUNK, GPU_CHUNK = 2**17, 2**24
"""Weights that are decoded together: as many as a CPU's cache holds with what is between, and few launches of a GPU."""


class PackedLinear(FrozenLinear):
    """The layer; see the module.

    Args:
        layer: a plain layer of the same shape, whose bias is taken over.
        codes_OI: uint8.
        grid: what the groups share.
        fmt: of the grid.

    Attributes:
        packed: the codes: uint8 [O, I], or where they have 4 bits at most [O, I / 2], the first half of a row's columns
            in the low bits and the second in the high ones.
        scales, zeros, outer: the grid in its file's types, as far as the format has them.
    """

    packed: Tensor

    def __init__(self, layer: nn.Linear, codes_OI: Tensor, grid: Grid, fmt: GridFormat) -> None:
        super().__init__(layer)
        self.format, self.paired = fmt, _pairs(fmt, codes_OI.shape[1])
        self.register_buffer("packed", _paired(codes_OI) if self.paired else codes_OI.clone())
        self._shared = list(stored := store(grid, fmt))
        for name, tensor in stored.items():
            self.register_buffer(name, tensor.clone())

    @property
    def held_as(self) -> str:
        return self.format.name

    @torch.no_grad()
    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        shape = (self.out_features, self.in_features)
        weight_OI = torch.empty(shape, dtype=dtype, device=self.packed.device) if out is None else out
        step = max(1, (CHUNK if weight_OI.device.type == "cpu" else GPU_CHUNK) // self.in_features)
        for row in range(0, self.out_features, step):
            rows = slice(row, row + step)
            codes = _apart(self.packed[rows]) if self.paired else self.packed[rows]
            weight_OI[rows] = decode(codes, self._grid(rows), self.format)
        return weight_OI

    def _grid(self, rows: slice) -> Grid:
        parts = {name: self.get_buffer(name) for name in self._shared}
        return restore({name: tensor[rows] if tensor.ndim else tensor for name, tensor in parts.items()}, self.format)


def _pairs(fmt: GridFormat, columns: int) -> bool:
    return fmt.bits <= 4 and columns % 2 == 0


def packed_bytes(fmt: GridFormat, columns: int, codes: int, scales: int) -> int:
    """Bytes in which a `PackedLinear` holds so many codes, of rows with so many columns, and so many scales."""
    each = fmt.scale.itemsize + (fmt.zero.itemsize if fmt.zero is not None else 0)
    return codes // (2 if _pairs(fmt, columns) else 1) + scales * each


def _paired(codes_OI: Tensor) -> Tensor:
    low, high = codes_OI.chunk(2, dim=1)
    return low | (high << 4)


def _apart(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=1)


@torch.no_grad()
def pack_layers(model: CausalLM, stored: StoredGrid) -> None:
    """Hold the decoder's linear layers that lie on a grid by their codes, in place. None of them can be trained then.

    Matrices that are no nn.Linear (experts, GPT-2's Conv1D), and the head, stay as they are.

    Args:
        model: holds the quantized weights.
        stored: the grid; its tensors are copied.

    Raises:
        InputError: the weights are not the ones that the grid describes.
    """
    stored.check(model)
    for name, matrix in matrices(model).items():
        layer, on_grid = matrix.module, stored.matrices.get(matrix.key)
        if on_grid is not None and isinstance(layer, nn.Linear):
            packed = PackedLinear(layer, *on_grid, stored.format)
            model.set_submodule(name, packed.to(matrix.weight_OI.device))
