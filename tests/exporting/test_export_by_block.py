"""An export with one block in memory writes the same files, and reads them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import remend
from helpers.packed import needs_exact_unpacking
from helpers.tiny import build_model
from remend.errors import FileError, InputError
from remend.models.blocks import writing


@pytest.fixture
def healthy(tmp_path: Path, tokenizer: Any) -> Path:
    build_model(320, layers=3, tied=False, width=128).to(torch.bfloat16).save_pretrained(tmp_path / "healthy")
    tokenizer.save_pretrained(tmp_path / "healthy")
    return tmp_path / "healthy"


def content(directory: Path) -> dict[str, bytes]:
    """Every file but what tells of the check."""
    told = ("export.json", "README.md")
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in told]
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


@needs_exact_unpacking
@pytest.mark.parametrize(
    ("grid", "container", "size"),
    [
        ("int4-g64-sym", "compressed-tensors", None),
        ("int4-g64-zp", "compressed-tensors", "50KB"),
        ("int8-g32-sym", "compressed-tensors", None),
        ("fp8-e4m3", "compressed-tensors", None),
        ("nvfp4", "compressed-tensors", None),
        ("mxfp4", "compressed-tensors", None),
        ("int3-g32", "dense", "50KB"),
        ("2:4", "dense", None),
    ],
)
def test_an_export_block_by_block_is_the_same(
    healthy: Path, tmp_path: Path, grid: str, container: str, size: str | None
) -> None:
    if ":" in grid:
        remend.prune(healthy, tmp_path / "student", sparsity=grid, probe=False)
    else:
        skip = ["*.1.mlp.up_proj"]
        remend.quantize(healthy, tmp_path / "student", format=grid, skip=skip, probe=False)
    options: dict[str, Any] = {"format": container, "max_shard_size": size}
    whole = remend.export(tmp_path / "student", tmp_path / "whole", **options)
    parts = remend.export(tmp_path / "student", tmp_path / "parts", placement="disk", **options)
    assert content(tmp_path / "whole") == content(tmp_path / "parts")
    assert {k: v for k, v in whole.items() if k not in ("check", "sha256")} == {
        k: v for k, v in parts.items() if k not in ("check", "sha256")
    }
    assert parts["check"]["weights_equal"]
    assert parts["check"]["max_logit_difference"] == 0
    assert parts["check"]["strangers"] == []


@pytest.mark.parametrize("container", ["compressed-tensors", "dense"])
def test_a_wrong_number_in_what_is_written_is_found(
    healthy: Path, tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remend.quantize(healthy, tmp_path / "student", format="int4-g64-sym", probe=False)
    whole = writing.PlannedFiles.write

    def write(self: Any, tensors: Any) -> None:
        name = next((n for n in tensors if n.endswith(("2.mlp.up_proj.weight_packed", "2.mlp.up_proj.weight"))), None)
        whole(self, {**tensors, name: tensors[name].roll(1, 0)} if name else tensors)

    monkeypatch.setattr(writing.PlannedFiles, "write", write)
    with pytest.raises(FileError, match=r"1 tensors differ \(model\.layers\.2\.mlp\.up_proj\.weight\)"):
        remend.export(tmp_path / "student", tmp_path / "parts", placement="disk", format=container)
    assert not (tmp_path / "parts").exists()


def test_gguf_is_written_as_a_whole(healthy: Path, tmp_path: Path) -> None:
    remend.quantize(healthy, tmp_path / "student", format="gguf:q4_0", probe=False)
    with pytest.raises(InputError, match="placement disk can't be had for gguf"):
        remend.export(tmp_path / "student", tmp_path / "parts", placement="disk", format="gguf")
