"""Recoveries that train the scales of a grid, or norms, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import remend
from helpers.recovering import assert_equal_runs, torn_copy
from remend.compression.stored_grid import StoredGrid
from remend.errors import CheckError
from remend.recovery.job import RecoverResult, recover


@pytest.fixture(scope="module")
def scales_run(repaired_recipe: dict[str, Any], place: Path) -> RecoverResult:
    rest = {"train": "scales", "learning_rate": 1e-2, "save_every": 2, "keep_checkpoints": 9, "bootstrap": "off"}
    return recover(**{**repaired_recipe, **rest, "diagnose_every": 0, "out": str(place / "scales")})


def test_scales_recover_and_only_scales_and_vectors_have_masters(scales_run: RecoverResult) -> None:
    summary = scales_run.summary
    assert summary["constraint"] == "int3-g64-asym; codes stay, scales and norms move"
    assert summary["recovered"]["kl"] < summary["degraded"]["kl"]
    masters = load_file(scales_run.out / "checkpoints" / "step-000006" / "masters.safetensors")
    assert all(t.ndim == 1 or name.endswith((".scales", ".zeros")) for name, t in masters.items())
    assert any(float(t.abs().max()) > 0 for name, t in masters.items() if name.endswith(".scales"))


def test_the_saved_model_lies_on_its_grid_and_is_exported(scales_run: RecoverResult, tmp_path: Path) -> None:
    stored = StoredGrid.read(scales_run.out / "model")
    assert stored is not None
    exported = remend.export(scales_run.out, tmp_path / "dense", format="dense")
    assert exported["check"]["weights_equal"]
    assert exported["matrices_on_grid"] == len(stored.matrices)


def test_a_torn_run_goes_on_as_if_nothing_had_happened(scales_run: RecoverResult, tmp_path: Path) -> None:
    assert_equal_runs(scales_run, recover(resume=torn_copy(scales_run.out, tmp_path / "torn", 4)))


def test_norms_alone_leave_every_matrix(repaired_recipe: dict[str, Any], tmp_path: Path) -> None:
    rest = {"train": "norms", "repair": False, "learning_rate": 1e-2, "diagnose_every": 0, "bootstrap": "off"}
    run = recover(**{**repaired_recipe, **rest, "out": str(tmp_path / "norms")})
    before = load_file(Path(repaired_recipe["student"]) / "model.safetensors")
    after = load_file(run.out / "model" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name, tensor in before.items() if tensor.ndim == 1
    }


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"student": "smollm2", "train": "scales"}, "the student lies on none that is held"),
        ({"train": "scales", "train_embeddings": True}, "train_embeddings has no effect with train: scales"),
        ({"train": "norms", "lora": {"rank": 2}}, "train: norms trains no adapter"),
        ({"train": "last"}, "train: last moves weights freely, and the student is held to int3-g64-asym"),
    ],
)
def test_what_cannot_be_trained_is_refused(repaired_recipe: dict[str, Any], keys: dict[str, Any], why: str) -> None:
    student = {"student": repaired_recipe["teacher"]} if "student" in keys else {}
    with pytest.raises(CheckError, match=why):
        recover(**{**repaired_recipe, **keys, **student})
