"""Recovery and diagnosis of models that are not built like a Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import remend
from helpers.architectures import build
from helpers.tiny import small_recipe
from remend.errors import CheckError
from remend.files.run_directory import TRACK, RunDirectory


@pytest.fixture
def pair(request: pytest.FixtureRequest, tokenizer: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A student and its teacher."""
    model = build(request.param, vocabulary=len(tokenizer))
    for name, noise in (("teacher", 0.0), ("student", 0.2)):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in model.parameters():
                p += noise * p.std() * torch.randn(p.shape, generator=generator) if p.ndim > 1 else 0
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "student", tmp_path / "teacher"


@pytest.mark.parametrize("pair", ["falcon-h1", "gemma3n", "mamba", "qwen3-next"], indirect=True)
def test_they_are_recovered_and_diagnosed(pair: tuple[Path, Path], prompt_file: Path, tmp_path: Path) -> None:
    student, teacher = pair
    recipe = small_recipe(student, teacher, prompt_file, tmp_path / "run")
    length = {"steps": 4, "batch_size": 8, "max_new_tokens": 8, "save_every": 0, "diagnose_every": 4}
    result = remend.recover(**{**recipe, **length})
    assert result.summary["recovered"]["kl"] < result.summary["degraded"]["kl"]
    diagnosis = remend.diagnose(
        str(teacher), [str(teacher)], tmp_path / "diagnosis", data=str(prompt_file), max_new_tokens=8
    )
    assert diagnosis["behaviour"]["kl"] == pytest.approx(0, abs=1e-9)
    assert {layer["cka"] for layer in diagnosis["layers"]} == {1.0}


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_too_few_rows_to_compare_layers_do_not_stop_a_run(
    pair: tuple[Path, Path],
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too few prompts are told beforehand; rows may also be lost on the way, where answers are empty."""
    recipe = {**small_recipe(*pair, prompt_file, tmp_path / "run"), "steps": 2, "held_out": 3, "diagnose_every": 1}
    with pytest.raises(CheckError, match="4 at least, and there are 3; raise held_out"):
        remend.recover(**recipe)
    monkeypatch.setattr("remend.recovery.preflight.LEAST_ROWS", 1)
    result = remend.recover(**recipe)
    assert {tuple(row["cka"]) for row in RunDirectory(result.out).rows(TRACK)} == {(None, None)}
    assert "are not compared" in capsys.readouterr().err
