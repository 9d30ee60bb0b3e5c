"""A diagnosis of the real model: a copy is undamaged to the last bit, round to nearest at 3 bits is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

import remend

pytestmark = pytest.mark.slow


def test_smollm2_against_its_copy_and_its_ruin(
    smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    remend.quantize("smollm2", tmp_path / "int3", format="int3-g64", probe=False)
    students = [str(smollm2_dir), str(tmp_path / "int3")]
    found = remend.diagnose("smollm2", students, tmp_path / "out", rows=48, max_new_tokens=16, device="cpu")
    assert found["severity"] == "none"
    assert [layer["cka"] for layer in found["layers"]] == [1.0] * 30
    assert found["behaviour"]["top1_agreement"] == 1.0
    (ruin,) = found["others"]
    assert ruin["severity"] == "broken"
    assert ruin["kind"] == "grid"
    assert ruin["behaviour"]["kl"] > 1.5
    assert max(layer["random"] for layer in ruin["layers"]) < 0.5
    assert ruin["layers"][-1]["cka"] < 0.95
    assert (tmp_path / "out" / "report.html").stat().st_size < 2 * 2**20
