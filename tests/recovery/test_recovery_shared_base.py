"""Adapters over a base that keeps its files' dtype, and that a teacher of the same files shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.patching import replace_everywhere
from helpers.recovering import assert_equal_runs, torn_copy, weights
from helpers.task_rows import write
from helpers.tiny import prompts, small_recipe
from remend.models.frozen_base import narrow
from remend.models.load import load_model
from remend.recovery.base import is_base
from remend.recovery.job import RecoverResult, recover


@pytest.fixture(scope="module")
def halved(reference_dir: Path, tokenizer: Any, place: Path) -> Path:
    """The reference in bfloat16."""
    path = place / "halved"
    AutoModelForCausalLM.from_pretrained(reference_dir, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shown(place: Path) -> Path:
    rows = [{"prompt": p, "demonstration": f"Action: look at {i}."} for i, p in enumerate(prompts(30))]
    write(place / "shown.jsonl", rows)
    return place / "shown.jsonl"


@pytest.fixture(scope="module")
def taught_by_itself(halved: Path, shown: Path, place: Path) -> dict[str, Any]:
    """An adapter on a model whose teacher is that model, shown demonstrations."""
    values = small_recipe(halved, halved, shown, place / "shared")
    stream = {"data": values.pop("data"), "held_out": values.pop("held_out"), "demonstrations": True}
    return {**values, "streams": {"task": stream}, "lora": {"rank": 4}, "learning_rate": 1e-2, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def shared_run(taught_by_itself: dict[str, Any]) -> RecoverResult:
    return recover(**taught_by_itself)


def manifest(run: RecoverResult) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.out / "manifest.json").read_text())
    return content


def test_one_copy_in_the_files_dtype_and_the_manifest_says_so(
    taught_by_itself: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[str] = []

    def counted(source: Any, **rest: Any) -> Any:
        read.append(source.kind)
        return load_model(source, **rest)

    replace_everywhere(monkeypatch, load_model, counted)
    run = recover(**{**taught_by_itself, "out": str(tmp_path / "run")})
    assert read == ["directory", "adapter"]  # the base once, and the saved adapter
    name = taught_by_itself["teacher"]
    assert manifest(run)["frozen_base"] == {"linear_layers": "bfloat16", "shared_with": [name]}
    said = " ".join(capsys.readouterr().err.split())
    assert f"frozen base: linear layers in bfloat16, in one memory with teacher {name}" in said


def test_a_torn_run_goes_on_as_if_nothing_had_happened(shared_run: RecoverResult, tmp_path: Path) -> None:
    assert_equal_runs(shared_run, recover(resume=torn_copy(shared_run.out, tmp_path / "torn", 2)))


@pytest.mark.parametrize("apart", ["teacher", "teacher and dtype"])
def test_shared_or_not_and_narrow_or_not_every_figure_is_the_same(
    apart: str,
    shared_run: RecoverResult,
    taught_by_itself: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        replace_everywhere(patched, is_base, lambda plan, source: False)
        if "dtype" in apart:
            replace_everywhere(patched, narrow, lambda model, dtype: None)
        other = recover(**{**taught_by_itself, "out": str(tmp_path / "apart")})
    assert "frozen_base" not in manifest(other)
    assert_equal_runs(shared_run, other)


def test_merged_it_is_a_plain_model_in_float32(
    taught_by_itself: dict[str, Any], shared_run: RecoverResult, tmp_path: Path
) -> None:
    run = recover(**{**taught_by_itself, "merge": True, "out": str(tmp_path / "merged")})
    assert {tensor.dtype for tensor in weights(run.model).values()} == {torch.float32}
    assert run.summary["degraded"] == shared_run.summary["degraded"]
    assert run.summary["recovered"]["kl"] == pytest.approx(shared_run.summary["recovered"]["kl"], rel=1e-3)


def test_an_adapter_shares_its_base_with_a_teacher_that_is_named(
    shared_run: RecoverResult, halved: Path, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    write(data, [{"prompt": p} for p in prompts()])
    recipe = {**small_recipe(shared_run.model, halved, data, tmp_path / "run"), "save_every": 0}
    run = recover(**recipe)
    assert manifest(run)["frozen_base"] == {"linear_layers": "bfloat16", "shared_with": [str(halved)]}
    base = recover(**{**recipe, "teacher": "base", "out": str(tmp_path / "base")})
    for name in ("degraded", "recovered"):
        assert run.summary[name]["kl"] == base.summary[name]["kl"]
