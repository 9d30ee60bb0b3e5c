"""bitsandbytes: the nf4 grid of weights that it packed is read; nothing is written so."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from remend.compression.containers import CONTAINERS, Container, Recognised, held_as_dense, packed_by
from remend.compression.grids import Grid, GridFormat
from remend.compression.stored_grid import StoredGrid
from remend.errors import InputError
from remend.models.find import ModelSource
from remend.models.packed_weights import packing, require_openable


def _reads(source: ModelSource) -> bool:
    return packed_by(source) == "bitsandbytes"


def _recognise(source: ModelSource, as_dense: bool) -> Recognised:
    assert source.path is not None
    require_openable(source.path)
    try:
        stored = _nf4(source.path)
    except InputError as reason:
        return held_as_dense("bitsandbytes", source, reason, as_dense)
    return Recognised("bitsandbytes", stored, False, "bitsandbytes: the grid nf4")


def _nf4(directory: Path) -> StoredGrid:
    """The grid; double quantization of its scales is undone.

    Raises InputError for anything but nf4 in blocks of 64 that divide the rows.
    """
    config = packing(directory)
    if not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
        kind = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else "int8"
        raise InputError(f"bitsandbytes packed its weights as {kind}; held is nf4")
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    matrices: dict[str, tuple[Tensor, Grid]] = {}
    for name, parts in _packed_weights(directory).items():
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
    return StoredGrid(GridFormat.parse("nf4"), matrices)


def _packed_weights(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Of every packed weight its bytes ('packed') and what describes them, by what follows the weight's name."""
    weights: dict[str, dict[str, Tensor]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                name, dot, part = key.partition(".weight.")
                if dot:
                    weights.setdefault(f"{name}.weight", {})[part] = tensors.get_tensor(key)
            for name in weights.keys() & set(tensors.keys()):
                weights[name]["packed"] = tensors.get_tensor(name)
    return weights


CONTAINERS.register("bitsandbytes", source="https://github.com/bitsandbytes-foundation/bitsandbytes")(
    Container(_reads, _recognise)
)
