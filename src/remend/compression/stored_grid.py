"""The file that describes the grid on which a model's weights lie.

Legend: O rows (outputs), I columns (inputs), K groups a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor, nn

from remend.compression.grids import Grid, GridFormat, decode, quantize, restore, store
from remend.errors import FileError, InputError
from remend.files.atomic import JsonObject
from remend.models.blocks import part_of, parts_of
from remend.models.blocks.writing import PlannedFile
from remend.models.find import OWN_FOLDER, own_file
from remend.models.matrices import by_key
from remend.models.protocols import CausalLM

GRID_FILE = "grid.safetensors"

_FORMULAS = {
    "scaled": "w = scales * value of a code",
    "zero": "w = scales * (codes - zeros)",
    "minimum": "w = scales * codes + zeros",
}


_CARRIED = "carried."


@dataclass(frozen=True)
class Carried:
    """What came with another tool's grid and is no part of it: how engines quantize activations and the KV cache.

    `settings` are compressed-tensors' own, by their key in config.json; `tensors` their scales, by name in the files.
    Neither is trained or measured; both stay beside the grid and go into an export to compressed-tensors.
    """

    settings: JsonObject = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StoredGrid:
    """The content of `remend/grid.safetensors`: one format, and for every quantized matrix its codes and its grid.

    For a matrix of key W (see `models.matrices`) the file holds 'W.codes' (uint8 [O, I]), 'W.scales' and, where the
    format has them, 'W.zeros' (each [O, K]) and 'W.outer' ([]), in the types that `store` gives. The header's
    entry `remend_grid` is JSON with version, format and formula.
    """

    def __init__(
        self, fmt: GridFormat, matrices: dict[str, tuple[Tensor, Grid]], carried: Carried | None = None
    ) -> None:
        self.format = fmt
        self.matrices = matrices
        self.carried = carried or Carried()

    def check(self, model: CausalLM) -> None:
        """Raise InputError when the model lacks a matrix, or its weights are not the ones that this grid describes."""
        known = by_key(model)
        for name, (codes, _) in self.matrices.items():
            if name not in known or known[name].weight_OI.shape != codes.shape:
                raise InputError(f"the grid describes {name} {tuple(codes.shape)}, which the model does not have")
        for number in parts_of(model):
            with part_of(model, number) as modules:
                inside = {id(module) for module in modules.values()}
                for name in self.matrices:
                    if id(known[name].module) in inside:
                        self._require_on_grid(name, known[name].weight_OI)

    def _require_on_grid(self, name: str, weight_OI: Tensor) -> None:
        codes, grid = self.matrices[name]
        codes, grid = codes.to(weight_OI.device), grid.to(weight_OI.device)
        if not torch.equal(decode(codes, grid, self.format), weight_OI.float()):
            raise InputError(
                f"{name} does not lie on its grid: {GRID_FILE} belongs to another model; remove it to take the "
                "weights as they are"
            )

    def write(self, directory: Path) -> None:
        """Write the file into a model's `directory` (which the caller moves into place), in the folder `remend`."""
        tensors: dict[str, Tensor] = {}
        for name, (codes, grid) in self.matrices.items():
            for key, tensor in {"codes": codes, **store(grid, self.format)}.items():
                tensors[f"{name}.{key}"] = tensor.cpu().contiguous()
        tensors |= self.carried_tensors()
        path = directory / OWN_FOLDER / GRID_FILE
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata=header_of(self.format, self.carried))

    def carried_tensors(self) -> dict[str, Tensor]:
        """What the file holds beside the grid."""
        return {f"{_CARRIED}{name}": t.cpu().contiguous() for name, t in self.carried.tensors.items()}

    def parts_in(self, model: CausalLM, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """What the file holds of the matrices that some of a model's modules have."""
        known, inside = by_key(model), {id(module) for module in modules.values()}
        tensors: dict[str, Tensor] = {}
        for key, (codes, grid) in self.matrices.items():
            if id(known[key].module) in inside:
                parts = {"codes": codes, **store(grid, self.format)}
                tensors |= {f"{key}.{name}": tensor.cpu() for name, tensor in parts.items()}
        return tensors

    def planned(self, directory: Path) -> PlannedFile:
        """The file that `write` writes, to be written part by part."""
        shapes = {key: codes.shape for key, (codes, _) in self.matrices.items()}
        return planned_grid(self.format, shapes, directory, self.carried)

    @staticmethod
    def read(directory: Path) -> StoredGrid | None:
        """The grid in a model's directory, or None where there is none. Raises FileError for one that can't be used."""
        path = own_file(directory, GRID_FILE)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            told = _told_in(metadata)
            fmt = GridFormat.parse(str(told.get("format", "without a format")))
            scales = {key.removeprefix(_CARRIED): t for key, t in tensors.items() if key.startswith(_CARRIED)}
            names = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
            matrices = {name: _matrix_of(name, tensors, fmt) for name in names}
        except (SafetensorError, OSError, InputError) as error:
            raise FileError(f"{path} can't be read as a quantization grid: {error}") from None
        return StoredGrid(fmt, matrices, Carried(told.get("carried", {}), scales))


def header_of(fmt: GridFormat, carried: Carried | None = None) -> dict[str, str]:
    """What the header of the file says: one entry, since several are written in a random order."""
    formula = f"{_FORMULAS[fmt.form]}, one scale for {fmt.group or 'all'} neighbours in a row"
    told: JsonObject = {"version": 3, "format": fmt.name, "formula": formula}
    settings = carried.settings if carried else {}
    return {"remend_grid": json.dumps(told | ({"carried": settings} if settings else {}))}


def planned_grid(
    fmt: GridFormat, shapes: Mapping[str, Size], directory: Path, carried: Carried | None = None
) -> PlannedFile:
    """The file of a grid, to be written part by part; `shapes` [O, I] are the matrices', by key."""
    parts = {key: stored_shapes(fmt, *shape) for key, shape in shapes.items()}
    tensors = {f"{key}.{name}": tensor for key, some in parts.items() for name, tensor in some.items()}
    beside = StoredGrid(fmt, {}, carried).carried_tensors()
    tensors |= {name: torch.empty_like(tensor, device="meta") for name, tensor in beside.items()}
    path = directory / OWN_FOLDER / GRID_FILE
    path.parent.mkdir(exist_ok=True)
    return PlannedFile(path, tensors, header_of(fmt, carried))


def stored_shapes(fmt: GridFormat, rows: int, columns: int) -> dict[str, Tensor]:
    """What the file holds of a matrix [rows, columns], by the name behind its key: tensors without numbers."""
    codes, grid = quantize(torch.zeros(1, columns), fmt)
    some = {"codes": codes, **store(grid, fmt)}
    shapes = {name: t.shape if t.ndim == 0 else (rows, *t.shape[1:]) for name, t in some.items()}
    return {name: torch.empty(shapes[name], dtype=t.dtype, device="meta") for name, t in some.items()}


def _told_in(metadata: Mapping[str, str]) -> JsonObject:
    """What the header says; version 2 had the format as an entry of its own."""
    try:
        about = json.loads(metadata.get("remend_grid", "{}"))
    except ValueError:
        about = {}
    return {**metadata, **about} if isinstance(about, dict) else dict(metadata)


def _matrix_of(name: str, tensors: Mapping[str, Tensor], fmt: GridFormat) -> tuple[Tensor, Grid]:
    codes = tensors[f"{name}.codes"]
    parts = {key: tensors[f"{name}.{key}"] for key in ("scales", "zeros", "outer") if f"{name}.{key}" in tensors}
    try:
        grid = restore(parts, fmt)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise InputError(f"the codes of {name} are no matrix of type uint8")
    rows, columns = codes.shape
    group = fmt.group or columns
    if columns % group or grid.scales.shape != (rows, columns // group):
        raise InputError(
            f"codes {tuple(codes.shape)} and scales {tuple(grid.scales.shape)} of {name} don't fit each other"
        )
    if codes.numel() and int(codes.max()) >= fmt.levels:
        raise InputError(f"{name} holds codes up to {int(codes.max())}; {fmt.name} has {fmt.levels}")
    return codes, grid
