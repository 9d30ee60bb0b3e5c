"""Put a model's linear layers onto a grid: the methods, and what describes the result.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Size, Tensor

from remend.compression.grids import Grid, GridFormat, decode, store
from remend.compression.grids import quantize as quantize_matrix
from remend.compression.solvers import gptq
from remend.compression.stored_grid import StoredGrid, planned_grid
from remend.degrade.making.job import (
    DENSE_BITS,
    Changed,
    Damage,
    Methods,
    change_each,
    chosen_matrices,
    share_of_zeros,
    undivided,
)
from remend.degrade.making.shares import shares
from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.models.blocks.writing import PlannedFile
from remend.models.layers import count_parameters
from remend.models.matrices import Matrix, matrices
from remend.models.protocols import CausalLM

METHODS: Methods[Callable[[Tensor, Tensor | None, GridFormat], tuple[Tensor, Grid]]] = Methods("quantization method")
"""(weight [O, I], Gram matrix of its inputs [I, I] or None, format) -> (codes [O, I], the grid that they refer to)."""


@METHODS.register("rtn", source="round to nearest; the baseline of GPTQ, arXiv 2210.17323")
def round_to_nearest(weight_OI: Tensor, gram_II: Tensor | None, fmt: GridFormat) -> tuple[Tensor, Grid]:
    """Codes and grid from each group's own weights, as the format's own writer makes them."""
    return quantize_matrix(weight_OI, fmt)


@METHODS.register("gptq", source="arXiv 2210.17323", calibrated=True)
def compensated(weight_OI: Tensor, gram_II: Tensor | None, fmt: GridFormat) -> tuple[Tensor, Grid]:
    """Each column's rounding error is made good by the columns not yet rounded."""
    assert gram_II is not None
    rounded = gptq(weight_OI, gram_II, fmt)
    return rounded.codes, rounded.grid


def quantize_in_place(
    model: CausalLM,
    fmt: GridFormat,
    method: str = "rtn",
    *,
    skip: Sequence[str] = (),
    damage: Damage | None = None,
) -> StoredGrid:
    """Put every linear layer of the decoder on the grid; returns what describes it.

    Experts that no calibration token came to are rounded to nearest.

    Args:
        model: changed in place.
        fmt, method: the grid, and a name of METHODS.
        skip: patterns of layer names that stay as they are.
        damage: where a calibrated method gets its text; not needed by 'rtn'.

    Raises InputError that names the layers whose rows the group size does not divide.
    """
    layers, chosen = matrices_for(model, fmt, skip), METHODS.get(method)
    assert damage is not None or not chosen.calibrated
    stored = {}

    def settle(matrix: Matrix, gram_II: Tensor | None) -> None:
        apply = round_to_nearest if chosen.calibrated and gram_II is None else chosen.apply
        codes, grid = apply(matrix.weight_OI, gram_II, fmt)
        matrix.weight_OI.copy_(decode(codes, grid, fmt))
        stored[matrix.key] = (codes, grid)

    change_each(model, layers, settle, damage if chosen.calibrated else None, f"quantizing ({method})")
    return StoredGrid(fmt, stored)


def matrices_for(model: CausalLM, fmt: GridFormat, skip: Sequence[str]) -> dict[str, Matrix]:
    """The matrices that are put on the grid, by name. Raises InputError for those whose rows its group cuts."""
    layers = chosen_matrices(model, skip)
    if named := undivided(layers, fmt.group or 1):
        raise InputError(
            f"group {fmt.group} of {fmt.name} does not divide the input width of {named}; choose a format with a "
            "smaller group, or skip those layers"
        )
    return layers


@dataclass(frozen=True)
class OntoGrid:
    """`quantize_in_place` block by block; see by_block.BlockWork."""

    format: GridFormat
    method: str
    skip: Sequence[str]

    def chosen(self, model: CausalLM) -> dict[str, Matrix]:
        """See BlockWork."""
        return matrices_for(model, self.format, self.skip)

    def beside(self, chosen: Mapping[str, Matrix], directory: Path) -> list[PlannedFile]:
        """The grid's file."""
        return [planned_grid(self.format, {m.key: m.weight_OI.shape for m in chosen.values()}, directory)]

    def change(self, matrix: Matrix) -> dict[str, Tensor]:
        """See BlockWork."""
        codes, grid = METHODS.get(self.method).apply(matrix.weight_OI, None, self.format)
        matrix.weight_OI.copy_(decode(codes, grid, self.format))
        stored = {"codes": codes, **store(grid, self.format)}
        return {f"{matrix.key}.{name}": tensor.cpu() for name, tensor in stored.items()}

    def changed(self, model: CausalLM, chosen: Mapping[str, Matrix], zeros: Mapping[str, int]) -> Changed:
        """See BlockWork."""
        entry = {"format": self.format.name, "method": self.method, "skip": list(self.skip)}
        every = matrices(model).values()
        share = sum(zeros[m.key] for m in every) / max(1, sum(m.weight_OI.numel() for m in every))
        return _described(model, self.format, {m.key: m.weight_OI.shape for m in chosen.values()}, entry, share)


def described(student: CausalLM, stored: StoredGrid, entry: JsonObject) -> Changed:
    """A quantized model with its part of degradation.json: `entry`, and what lies on the grid.

    Raises InputError where matrices are not on it that no skip pattern names.
    """
    stored.check(student)
    shapes = {key: codes.shape for key, (codes, _) in stored.matrices.items()}
    zeros = share_of_zeros([matrix.weight_OI for matrix in matrices(student).values()])
    return replace(_described(student, stored.format, shapes, entry, zeros), files=stored.write)


def _described(
    student: CausalLM, fmt: GridFormat, shapes: Mapping[str, Size], entry: JsonObject, zeros: float
) -> Changed:
    """`shapes`: of the matrices on the grid, by key; `zeros`: their share in all of the decoder's."""
    decoder = shares(student, "on_grid", shapes, entry["skip"])
    quantized = sum(shape.numel() for shape in shapes.values())
    bits = sum(shape.numel() * fmt.bits_per_weight(shape[1]) for shape in shapes.values())
    parameters = count_parameters(student)
    entry = {
        "kind": "quantization",
        **entry,
        "matrices": len(shapes),
        "weights_on_grid": quantized,
        "weights_in_all": parameters,
        "sparsity": zeros,
        "decoder": decoder,
    }
    packed = round(bits / 8) + DENSE_BITS // 8 * (parameters - quantized)
    whole = (bits + DENSE_BITS * (decoder["weights"] - quantized)) / decoder["weights"]
    return Changed(student, entry, bits_per_weight=whole, packed_bytes=packed)
