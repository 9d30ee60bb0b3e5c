"""compressed-tensors, the directory of vLLM and llm-compressor: packed weights beside plain ones.

The library that reads it writes it: its own compressor packs the codes and describes them in config.json.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remend.compression.containers.measured import CONTAINERS, Measured
from remend.compression.grids import Grid, GridFormat
from remend.errors import InputError
from remend.models.load import save_model
from remend.models.packed_weights import require_compressed_tensors

_INT = re.compile(r"int(\d)-g(\d+)-(sym|zp)")


def scheme_of(grid: str) -> dict[str, Any]:
    """The library's QuantizationArgs for a grid. Raises InputError with the reason when it has none."""
    match = _INT.fullmatch(grid)
    if match and match[1] in "48":
        return {
            "num_bits": int(match[1]),
            "type": "int",
            "strategy": "group",
            "group_size": int(match[2]),
            "symmetric": match[3] == "sym",
        }
    if grid == "fp8-e4m3":
        return {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    if grid == "nvfp4":
        return {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
                "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}  # fmt: skip
    if grid in ("mxfp4", "gguf:mxfp4"):
        return {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}  # fmt: skip
    raise InputError(f"{_why_not(grid)}; use --format dense")


def _why_not(grid: str) -> str:
    if grid == "none":
        return "the model lies on no grid, so there is nothing to pack"
    if grid.endswith("-asym"):
        return f"{grid} fits no compressed-tensors format: its zero is a real number, and theirs is an integer"
    if re.match("int[23]-", grid):
        return f"{grid} fits no compressed-tensors format that engines read: pack-quantized holds 4 or 8 bits there"
    return f"{grid} fits no compressed-tensors format: none has its values and groups"


@CONTAINERS.register("compressed-tensors", source="https://github.com/vllm-project/compressed-tensors")
def write_compressed(measured: Measured, target: Path, kind: str) -> dict[str, Any]:
    """Write packed safetensors and `quantization_config`. Raises InputError for a grid that does not fit."""
    if kind:
        raise InputError(f'format "compressed-tensors:{kind}" is unknown; the grid decides, write compressed-tensors')
    require_compressed_tensors("--format compressed-tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    args = scheme_of(measured.grid)
    model, stored = measured.model, measured.stored
    assert stored is not None
    matrices = {name.removesuffix(".weight"): matrix for name, matrix in stored.matrices.items()}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": args}},
        ignore=[n for n in linear if n not in matrices],
        quantization_status="frozen",
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        apply_quantization_config(model, config, show_progress=False)
        for name, (_, grid) in matrices.items():
            _set_parameters(model.get_submodule(name), grid, stored.format)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        save_model(model, measured.tokenizer, target)
        compressor.update_config(str(target))
    return {"container": f"compressed-tensors ({compressor.quantization_config.format.value})"}


def _set_parameters(module: nn.Module, grid: Grid, fmt: GridFormat) -> None:
    """Hand scales and zeros to the library. Scales stay float32: it multiplies in their dtype; float16 would round."""
    parameters: dict[str, Tensor] = {"weight_scale": grid.scales}
    if fmt.name.endswith("-zp"):
        assert grid.zeros is not None
        bits = int(fmt.name[3])
        parameters["weight_zero_point"] = (grid.zeros - 2 ** (bits - 1)).to(torch.int8)
    if grid.outer is not None:
        parameters["weight_global_scale"] = grid.outer.reshape(1)
    for name, value in parameters.items():
        setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))
