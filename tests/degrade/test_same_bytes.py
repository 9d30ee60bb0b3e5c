"""The same command writes the same bytes: a student that is made again is the same student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.task_rows import write
from remend.degrade.kinds import degrade
from remend.files.hashes import hash_directory


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("quantize", {"format": "int4-g32-sym", "method": "gptq", "samples": 2}),
        ("prune", {"sparsity": "2:4", "method": "magnitude"}),
        ("depth", {"layers": 1}),
        ("width", {"ffn": 0.25, "samples": 2}),
        ("finetune", {"steps": 2, "dtype": "float32"}),
    ],
)
def test_a_degradation_made_twice_is_equal_byte_by_byte(
    kind: str, settings: dict[str, Any], reference_dir: Path, tmp_path: Path
) -> None:
    if kind == "finetune":
        write(tmp_path / "pairs.jsonl", [{"prompt": f"Hello {i}", "completion": "Hi there"} for i in range(6)])
        settings = {**settings, "data": str(tmp_path / "pairs.jsonl")}
    made = []
    for name in ("first", "second"):
        degrade(kind, str(reference_dir), tmp_path / name / "student", {**settings, "device": "cpu"})
        made.append(hash_directory(tmp_path / name / "student"))
    assert made[0] == made[1]
    assert {"degradation.json", "model.safetensors"} <= made[0].keys()
