"""An adapter over a base on a grid: codes alone are in memory, and the run is that of the dense base."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from helpers.patching import replace_everywhere
from helpers.recovering import assert_equal_runs, torn_copy, weights
from helpers.tiny import small_recipe
from remend.cli import build_app
from remend.compression.packed_linear import pack_layers
from remend.errors import CheckError, InputError
from remend.exporting import export
from remend.models.sampling.prepacked import packed_linears
from remend.recovery.job import RecoverResult, recover


@pytest.fixture(scope="module")
def packed_recipe(student_dir: Path, reference_dir: Path, place: Path) -> dict[str, Any]:
    values = small_recipe(student_dir, reference_dir, place / "prompts.jsonl", place / "packed")
    return {**values, "learning_rate": 1e-2, "steps": 6, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def packed_run(packed_recipe: dict[str, Any]) -> RecoverResult:
    """By the command line."""
    words = [f"{key}={value}" for key, value in packed_recipe.items()]
    done = CliRunner().invoke(build_app(), ["recover", *words, "--lora-rank", "4"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return recover(resume=packed_recipe["out"])


def test_it_recovers_over_codes_and_says_so(packed_run: RecoverResult, student_dir: Path) -> None:
    manifest = json.loads((packed_run.out / "manifest.json").read_text())
    assert manifest["frozen_base"] == {"linear_layers": "int3-g64-asym", "shared_with": []}
    assert packed_run.summary["recovered"]["kl"] < packed_run.summary["degraded"]["kl"]
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights(packed_run.model))


def test_a_torn_run_goes_on_as_if_nothing_had_happened(packed_run: RecoverResult, tmp_path: Path) -> None:
    assert_equal_runs(packed_run, recover(resume=torn_copy(packed_run.out, tmp_path / "torn", 4)))


def test_every_figure_is_the_one_of_a_dense_base(
    packed_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both sample by plain products; laid out beforehand, sums are taken in another order."""
    replace_everywhere(monkeypatch, packed_linears, lambda model: nullcontext())
    packed = recover(**{**packed_recipe, "lora": {"rank": 4}, "out": str(tmp_path / "packed")})
    replace_everywhere(monkeypatch, pack_layers, lambda model, stored: None)
    dense = recover(**{**packed_recipe, "lora": {"rank": 4}, "out": str(tmp_path / "dense")})
    assert_equal_runs(packed, dense)


def test_it_stays_an_adapter_beside_its_base(packed_run: RecoverResult, student_dir: Path, tmp_path: Path) -> None:
    """peft lays it on the base by itself; nothing merges it, and nothing exports the two as one."""
    plain = AutoModelForCausalLM.from_pretrained(student_dir)
    assert PeftModel.from_pretrained(plain, packed_run.model).peft_config["default"].r == 4
    assert packed_run.summary["exports"] == []
    with pytest.raises(InputError, match="is an adapter, which stays apart from its base"):
        export(packed_run.out, tmp_path / "exported", format="compressed-tensors")


def test_merging_onto_a_grid_is_refused_beforehand(packed_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="merge: true would take the student off what it is held to"):
        recover(**{**packed_recipe, "lora": {"rank": 4}, "merge": True, "out": str(tmp_path / "merged")})
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_came_over_a_grid_goes_on_over_codes(
    packed_run: RecoverResult, packed_recipe: dict[str, Any], tmp_path: Path
) -> None:
    again = recover(**{**packed_recipe, "student": str(packed_run.model), "steps": 2, "out": str(tmp_path / "again")})
    manifest = json.loads((again.out / "manifest.json").read_text())
    assert manifest["frozen_base"]["linear_layers"] == "int3-g64-asym"
    assert again.summary["degraded"]["kl"] == packed_run.summary["recovered"]["kl"]
