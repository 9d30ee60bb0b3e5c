"""compressed-tensors: written by its library, read back by transformers, equal bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from helpers.packed import needs_exact_unpacking
from helpers.tiny import SKIPPED
from remend.compression.grids import decode
from remend.compression.stored_grid import StoredGrid
from remend.exporting import check, export

pytest.importorskip("compressed_tensors")

PACKED = {
    "int4-g32-sym": ("pack-quantized", 4, 32),
    "int4-g64-zp": ("pack-quantized", 4, 64),
    "int8-g32-sym": ("pack-quantized", 8, 32),
    "int8-g64-zp": ("pack-quantized", 8, 64),
    "fp8-e4m3": ("naive-quantized", 8, None),
    "nvfp4": ("nvfp4-pack-quantized", 4, 16),
    "mxfp4": ("mxfp4-pack-quantized", 4, 32),
    "gguf:mxfp4": ("mxfp4-pack-quantized", 4, 32),
}


ROUNDED = "nvfp4", "gguf:mxfp4"
"""What plain transformers unpacks to bfloat16, or does not know by this name."""

DTYPES = {"auto": "float32", "bfloat16": "bfloat16", "float16": "float16"}


@needs_exact_unpacking
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", PACKED)
def test_reads_back_equal_and_describes_itself_as_llm_compressor_does(
    on_grid: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = on_grid(name)
    monkeypatch.setattr(check, "DTYPES", ("auto", "float32", "bfloat16", "float16"))
    result = export(str(student), tmp_path / "out", format="compressed-tensors")
    assert result["check"]["weights_equal"]
    assert result["check"]["max_logit_difference"] == 0
    (transformers,) = result["check"]["strangers"]
    assert {asked: found["dtype"] for asked, found in transformers["dtypes"].items()} == DTYPES
    assert all(found["kl"] < 0.01 for found in transformers["dtypes"].values())
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    form, bits, group = PACKED[name]
    assert described["format"] == form
    assert sorted(described["ignore"]) == ["lm_head", SKIPPED]
    weights = described["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (bits, group)
    assert described["dequantize"] is True
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{SKIPPED}.weight" in tensors
    packed = [n for n, t in tensors.items() if "q_proj.weight" in n and t.numel() == 64 * 64]
    assert all(tensors[n].element_size() == 1 for n in packed), "no packed matrix is stored as floats"
    stored = StoredGrid.read(student)
    if name in ROUNDED or stored is None:
        return
    plain = AutoModelForCausalLM.from_pretrained(  # without remend
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for parameter, (codes, grid) in stored.matrices.items():
        assert torch.equal(plain.get_parameter(parameter), decode(codes, grid, stored.format))


@needs_exact_unpacking
def test_the_packed_directory_is_smaller_by_the_bits(on_grid: Any, tmp_path: Path) -> None:
    student = on_grid("int4-g64-zp")
    dense = export(str(student), tmp_path / "dense", format="dense")["bytes"]
    packed = export(str(student), tmp_path / "packed", format="compressed-tensors")["bytes"]
    assert packed < 0.45 * dense
