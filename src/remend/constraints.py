"""What training must not give back: the quantization grid that a student came on.

A constraint stands between model and optimizer. The model holds the weights as they are served; the optimizer moves
float32 masters. After the backward pass the gradients at the served weights are handed to the masters unchanged
(the straight-through estimator, Bengio et al., arXiv 1308.3432), and after the update the served weights are written
anew. So a weight is quantized once per update, and sampling, scoring and saving see plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from remend.errors import FileError, InputError
from remend.grids import Grid, GridFormat, decode, encode, snap, within_cell

GRID_FILE = "grid.safetensors"
_FORMULA = "w = scales * (codes - zeros), one scale and zero for `group` neighbours in a row"


class Constraint(Protocol):
    """What the loop needs to know of a constraint."""

    def masters(self) -> dict[str, Tensor]:
        """The float32 tensors that the optimizer moves, by parameter name; a checkpoint holds these."""
        ...

    def take_gradients(self) -> None:
        """After the last backward pass of a step: make every master's `.grad` hold its gradient."""
        ...

    def project(self) -> None:
        """After an update, or after masters were loaded: write the weights as served, on the constraint."""
        ...

    def save(self, directory: Path) -> None:
        """Write what describes the constraint beside a saved model."""
        ...


class Free:
    """No constraint: every trainable parameter is its own master."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def masters(self) -> dict[str, Tensor]:
        """See Constraint."""
        return dict(self._parameters)

    def take_gradients(self) -> None:
        """See Constraint."""

    def project(self) -> None:
        """See Constraint."""

    def save(self, directory: Path) -> None:
        """See Constraint."""


class OnGrid:
    """Some matrices stay on the quantization grid that they came on; all other parameters are free.

    Scales and zeros stay as stored: re-deriving them from trained weights is not idempotent.

    Args:
        model: holds the quantized weights already.
        stored: the grid as read from the student's directory.
        origin: parameters of the model before quantization (the teacher's), by name. Where names and shapes agree, a
            master starts at the original weight, moved as far as its code demands: it still rounds to the student's
            code, but remembers on which side of it the lost weight was. Elsewhere it starts on the grid point.

    Raises:
        InputError: the model lacks a matrix of the grid, or its weights are not the ones that the grid describes.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: StoredGrid,
        *,
        origin: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.format = stored.format
        self._grids: dict[str, Grid] = {}
        self._weights: dict[str, Tensor] = {}
        self._masters: dict[str, Tensor] = {}
        parameters = dict(model.named_parameters())
        for name, (codes, grid) in stored.matrices.items():
            weight = parameters.get(name)
            if weight is None or weight.shape != codes.shape:
                raise InputError(f"the grid describes {name} {tuple(codes.shape)}, which the model does not have")
            grid = Grid(grid.scales.to(weight.device), grid.zeros.to(weight.device))
            codes = codes.to(weight.device)
            if not torch.equal(decode(codes, grid, self.format), weight.detach().float()):
                raise InputError(f"{name} does not lie on its grid: {GRID_FILE} belongs to another model")
            source = (origin or {}).get(name)
            if source is not None and source.shape == codes.shape:
                master = within_cell(source.detach().to(weight.device), codes, grid, self.format)
            else:
                master = weight.detach().clone()
            self._grids[name], self._weights[name], self._masters[name] = grid, weight, master
        self._free = {n: p for n, p in parameters.items() if n not in self._masters and p.requires_grad}

    def masters(self) -> dict[str, Tensor]:
        """See Constraint."""
        return {**self._masters, **self._free}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """See Constraint. Straight-through: the gradient at the served weight, unchanged."""
        for name, master in self._masters.items():
            master.grad, self._weights[name].grad = self._weights[name].grad, None

    @torch.no_grad()
    def project(self) -> None:
        """See Constraint."""
        for name, master in self._masters.items():
            snap(master, self._grids[name], self.format, out=self._weights[name])

    def save(self, directory: Path) -> None:
        """See Constraint: codes, scales and zeros as `grid.safetensors`."""
        matrices = {n: (encode(m, self._grids[n], self.format), self._grids[n]) for n, m in self._masters.items()}
        StoredGrid(self.format, matrices).write(directory)


class StoredGrid:
    """The content of `grid.safetensors`: for every quantized matrix its codes (uint8), scales and zeros (float16)."""

    def __init__(self, fmt: GridFormat, matrices: dict[str, tuple[Tensor, Grid]]) -> None:
        self.format = fmt
        self.matrices = matrices

    def write(self, directory: Path) -> None:
        """Write the file into `directory` (which the caller moves into place)."""
        tensors: dict[str, Tensor] = {}
        for name, (codes, grid) in self.matrices.items():
            tensors[f"{name}.codes"] = codes.cpu().contiguous()
            tensors[f"{name}.scales"] = grid.scales.to(torch.float16).cpu().contiguous()
            tensors[f"{name}.zeros"] = grid.zeros.to(torch.float16).cpu().contiguous()
        metadata = {"remend_grid": "1", "format": self.format.name, "formula": _FORMULA}
        save_file(tensors, directory / GRID_FILE, metadata=metadata)

    @staticmethod
    def read(directory: Path) -> StoredGrid | None:
        """The grid beside a model, or None where there is none. Raises FileError for a file that can't be used."""
        path = directory / GRID_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            fmt = GridFormat.parse(metadata.get("format", "without a format"))
            names = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
            matrices = {
                n: (tensors[f"{n}.codes"], Grid(tensors[f"{n}.scales"].float(), tensors[f"{n}.zeros"].float()))
                for n in names
            }
            for name, (codes, grid) in matrices.items():
                shape = (codes.shape[0], codes.shape[1] // fmt.group)
                if codes.dtype != torch.uint8 or grid.scales.shape != shape or grid.zeros.shape != shape:
                    raise InputError(f"codes, scales and zeros of {name} don't fit each other")
        except (SafetensorError, OSError, KeyError, IndexError, InputError) as error:
            raise FileError(f"{path} can't be read as a quantization grid: {error}") from None
        return StoredGrid(fmt, matrices)


def constraint_of(model: nn.Module, directory: Path | None, *, origin: Any = None) -> Free | OnGrid:
    """The constraint that a student's directory declares. `origin` is the teacher's model, or None."""
    stored = StoredGrid.read(directory) if directory is not None else None
    if stored is None:
        return Free(model)
    originals = dict(origin.named_parameters()) if origin is not None else None
    return OnGrid(model, stored, origin=originals)
