"""Read the nf4 grid of weights that bitsandbytes packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from remend.compression.grids import Grid, GridFormat
from remend.compression.stored_grid import StoredGrid
from remend.errors import InputError


def grid_of_bitsandbytes(directory: Path, config: dict[str, Any]) -> tuple[StoredGrid, str]:
    """Read the nf4 grid of a bitsandbytes directory; double quantization of its scales is undone.

    Raises InputError for anything but nf4 in blocks of 64 that divide the rows.
    """
    if not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
        kind = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else "int8"
        raise InputError(f"bitsandbytes packed its weights as {kind}; held is nf4")
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    matrices: dict[str, tuple[Tensor, Grid]] = {}
    for name, parts in _bitsandbytes_parts(directory).items():
        packed, device = parts.pop("packed"), torch.device("cpu")
        state = QuantState.from_dict({f"{name}.{part}": value for part, value in parts.items()}, device=device)
        rows, columns = state.shape
        if state.blocksize != 64 or columns % 64:
            raise InputError(f"{name} has rows of {columns} in blocks of {state.blocksize}; held are 64 in a row")
        scales = state.absmax
        if state.nested:  # the scales are quantized themselves, as QLoRA's double quantization does
            scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).view(rows, columns)
        matrices[name] = (codes, Grid(scales.float().view(rows, -1)))
    return StoredGrid(GridFormat.parse("nf4"), matrices), "bitsandbytes: the grid nf4"


def _bitsandbytes_parts(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Of every packed weight its bytes ('packed') and what describes them, by what follows the weight's name."""
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                name, dot, part = key.partition(".weight.")
                if dot:
                    found.setdefault(f"{name}.weight", {})[part] = tensors.get_tensor(key)
            for name in found.keys() & set(tensors.keys()):
                found[name]["packed"] = tensors.get_tensor(name)
    return found
