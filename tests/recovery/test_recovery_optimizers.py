"""Recoveries with moments on the host and in 8 bits: checkpoints go on from them, and nothing else does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from helpers.recovering import assert_equal_runs, torn_copy
from remend.cli import build_app
from remend.recovery.job import RecoverResult, recover

BITS = pytest.param(
    "adamw-8bit", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
)


@pytest.fixture(scope="module")
def recipe_of_weights(forgotten: Path, reference_dir: Path, place: Path) -> dict[str, Any]:
    """All weights of a student on no grid, with decay."""
    from helpers.tiny import small_recipe

    values = small_recipe(forgotten, reference_dir, place / "prompts.jsonl", place)
    return {**values, "keep_checkpoints": 9, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def runs(recipe_of_weights: dict[str, Any], place: Path) -> dict[str, RecoverResult]:
    return {}


def run_of(name: str, runs: dict[str, RecoverResult], recipe_of_weights: dict[str, Any], place: Path) -> RecoverResult:
    """The run with an optimizer, once in this file, by the command line."""
    if name not in runs:
        out = place / f"optimizer-{name}"
        words = [f"{key}={value}" for key, value in {**recipe_of_weights, "optimizer": name, "out": out}.items()]
        done = CliRunner().invoke(build_app(), ["recover", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        runs[name] = recover(resume=out)
    return runs[name]


@pytest.mark.parametrize("name", ["adamw", "adamw-host", BITS])
def test_a_torn_run_goes_on_as_if_nothing_had_happened(
    name: str, runs: dict[str, RecoverResult], recipe_of_weights: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    run = run_of(name, runs, recipe_of_weights, place)
    assert_equal_runs(run, recover(resume=torn_copy(run.out, tmp_path / "torn", 2)))


def test_on_the_host_the_run_is_that_of_adamw(
    runs: dict[str, RecoverResult], recipe_of_weights: dict[str, Any], place: Path
) -> None:
    one, other = (run_of(name, runs, recipe_of_weights, place) for name in ("adamw", "adamw-host"))
    assert_equal_runs(one, other)
    saved = [load_file(r.out / "checkpoints" / "step-000004" / "optimizer.safetensors") for r in (one, other)]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][name].equal(saved[1][name]) for name in saved[0])


def test_another_optimizer_is_refused_on_resume_with_one_sentence(
    runs: dict[str, RecoverResult], recipe_of_weights: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    torn = torn_copy(run_of("adamw", runs, recipe_of_weights, place).out, tmp_path / "torn", 2)
    words = ["recover", "--resume", str(torn), "optimizer=adamw-host"]
    done = CliRunner().invoke(build_app(), words, env={"COLUMNS": "400"})
    assert done.exit_code != 0
    assert "optimizer: 'adamw' became 'adamw-host'" in str(done.exception)
    assert not (torn / "summary.json").exists()
    recover(resume=torn)  # as it was it goes on


def test_where_8_bits_can_t_be_had_nothing_is_begun(
    recipe_of_weights: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    words = [f"{k}={v}" for k, v in {**recipe_of_weights, "optimizer": "adamw-8bit", "out": tmp_path / "run"}.items()]
    done = CliRunner().invoke(build_app(), ["recover", *words])
    assert done.exit_code != 0
    assert str(done.exception).count("pip install bitsandbytes") == 1
    assert not (tmp_path / "run").exists()
