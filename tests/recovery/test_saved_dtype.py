"""In which dtype and in how many files a recovered model is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.recovering import weights
from helpers.tiny import small_recipe
from remend.errors import InputError
from remend.exporting import export
from remend.models.find import find_model
from remend.models.load import inexact_in, stored_dtype
from remend.recovery.job import check, recover


@pytest.fixture(scope="module")
def halved(forgotten: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose files hold bfloat16."""
    path = tmp_path_factory.mktemp("halved")
    AutoModelForCausalLM.from_pretrained(forgotten, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_untouched_weights_keep_the_student_s_dtype_and_lie_in_shards(
    halved: Path, reference_dir: Path, place: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(halved, reference_dir, place / "prompts.jsonl", tmp_path / "run")
    run = recover(**{**recipe, "steps": 0, "max_shard_size": "100KB"})
    said = {key: run.summary["saved"][key] for key in ("dtype", "why")}
    assert said == {"dtype": "bfloat16", "why": "the student's files are, and it rounds nothing"}
    assert (run.model / "model.safetensors.index.json").is_file()
    assert len(list(run.model.glob("*.safetensors"))) > 1
    saved, before = weights(run.model), load_file(halved / "model.safetensors")
    assert all(saved[name].equal(before[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(run.model).dtype == torch.bfloat16
    done = export(str(run.out), tmp_path / "dense", format="dense", max_shard_size="100KB")
    assert done["check"]["weights_equal"]
    assert (tmp_path / "dense" / "model.safetensors.index.json").is_file()


def test_trained_weights_are_float32_unless_another_dtype_is_given(
    halved: Path, reference_dir: Path, place: Path, tmp_path: Path
) -> None:
    recipe = {**small_recipe(halved, reference_dir, place / "prompts.jsonl", tmp_path / "run"), "steps": 1}
    run = recover(**recipe)
    assert run.summary["saved"]["dtype"] == "float32"
    assert "own bfloat16 would round" in run.summary["saved"]["why"]
    rounded = recover(**{**recipe, "out": str(tmp_path / "rounded"), "save_dtype": "float16"})
    assert rounded.summary["saved"]["why"].startswith("as given; it rounds ")
    ours, theirs = weights(run.model), weights(rounded.model)
    assert all(ours[name].half().equal(theirs[name]) for name in ours)


def test_a_grid_is_saved_exactly_or_not_at_all(
    student_dir: Path, reference_dir: Path, place: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(student_dir, reference_dir, place / "prompts.jsonl", tmp_path / "run")
    (problem,) = check(**{**recipe, "save_dtype": "bfloat16"}).problems
    assert "would take the student off its grid (int3-g64-asym)" in problem
    with pytest.raises(InputError, match="allowed: a size such as 5GB"):
        check(**{**recipe, "max_shard_size": "big"})
    with pytest.raises(InputError, match="has no effect on gguf"):
        export(str(reference_dir), tmp_path / "x", format="gguf", max_shard_size="5GB")


def test_what_a_dtype_rounds_is_found(halved: Path) -> None:
    assert stored_dtype(find_model(str(halved))) == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(halved, dtype=torch.float32)
    assert inexact_in(model, torch.bfloat16) == []
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert inexact_in(model, torch.bfloat16) == ["model.norm.weight"]
