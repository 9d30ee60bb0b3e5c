"""Every row of the table in export.md, on two blocks of SmolLM2: transformers alone opens it at each dtype claimed."""

from __future__ import annotations

from pathlib import Path

import pytest

from remend.degrade.depth import prune_depth
from remend.degrade.quantize import quantize
from remend.exporting import export

pytestmark = pytest.mark.slow

ARTIFACTS = {
    "int4-g32-sym": ("dense", "compressed-tensors", "gguf:q4_0"),
    "int8-g32-sym": ("dense", "compressed-tensors", "gguf:q8_0"),
    "int4-g64-sym": ("compressed-tensors",),
    "int4-g64-zp": ("dense", "compressed-tensors"),
    "int8-g64-zp": ("compressed-tensors",),
    "int3-g64-asym": ("dense",),
    "gguf:q4_0": ("gguf",),
    "gguf:q4_1": ("gguf",),
    "gguf:q5_0": ("gguf",),
    "gguf:q5_1": ("gguf",),
    "gguf:q8_0": ("gguf",),
    "gguf:mxfp4": ("compressed-tensors", "gguf"),
    "mxfp4": ("compressed-tensors", "gguf:mxfp4"),
    "nvfp4": ("dense", "compressed-tensors"),
    "fp8-e4m3": ("dense", "compressed-tensors"),
    "nf4": ("dense",),
}


@pytest.fixture(scope="module")
def short(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with two of its thirty blocks."""
    path = tmp_path_factory.mktemp("short") / "smollm2"
    prune_depth(str(smollm2_dir), path, layers=list(range(2, 30)), probe=False)
    return path


@pytest.mark.parametrize("grid", ARTIFACTS)
def test_transformers_alone_opens_every_artifact_at_every_dtype(
    short: Path, tmp_path: Path, own_process: None, grid: str
) -> None:
    quantize(str(short), tmp_path / "student", format=grid, method="rtn", probe=False)
    for container in ARTIFACTS[grid]:
        done = export(str(tmp_path / "student"), tmp_path / container, format=container)
        assert "(auto, which is float32; bfloat16; float16)" in done["check"]["read_by"], (container, done["check"])
