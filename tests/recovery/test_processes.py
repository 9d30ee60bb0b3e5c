"""Two processes that share each step come to what one comes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import remend
from helpers.processes import two_processes
from helpers.recovering import keeping
from remend.files.run_directory import METRICS, RunDirectory
from remend.recovery.bootstrap import GATE
from remend.recovery.job import RecoverResult, recover


@pytest.fixture(scope="module")
def recipes(repaired_recipe: dict[str, Any], both_streams: dict[str, Any], place: Path) -> dict[str, dict[str, Any]]:
    """By name, for one process: 4 rows a step; 5 and 3 rows, which two processes share unequally."""
    repaired = {**repaired_recipe, "steps": 4, "eval_every": 0, "diagnose_every": 0, "save_every": 2}
    streams = {**keeping(both_streams, policy=0.5, share=0.6), "bootstrap": "auto", "batch_size": 8, "steps": 3}
    every = {"repaired": repaired, "undone": repaired, "streams": streams}
    return {name: {**recipe, "out": str(place / f"one-{name}")} for name, recipe in every.items()}


@pytest.fixture(scope="module")
def diagnosis(reference_dir: Path, student_dir: Path, place: Path) -> dict[str, Any]:
    """What is asked of a diagnosis, without `out`."""
    models = {"reference": str(reference_dir), "students": [str(student_dir)]}
    return {**models, "data": str(place / "prompts.jsonl"), "max_new_tokens": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def pairs(recipes: dict[str, dict[str, Any]], diagnosis: dict[str, Any], place: Path) -> dict[str, Path]:
    """The runs and the diagnosis of two processes, all by one launch; in `undone` repair makes the student worse."""
    out = {name: place / f"two-{name}" for name in recipes}
    halves = {
        name: {**recipe, "batch_size": recipe["batch_size"] // 2, "out": str(out[name])}
        for name, recipe in recipes.items()
    }
    jobs = {"repaired": "recover", "undone": "spoiled", "streams": "recover"}
    out["diagnosed"] = place / "two-diagnosed"
    diagnosed = {**diagnosis, "out": str(out["diagnosed"]), "cache": str(place / "cache-of-two")}
    two_processes(*((jobs[name], values) for name, values in halves.items()), ("diagnose", diagnosed))
    return out


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in RunDirectory(run).rows(METRICS) if "loss" in row]


def assert_alike(single: RecoverResult, pair: Path) -> None:
    for a, b in zip(single.metrics, rows_of(pair), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a.keys() == b.keys()
        shares = {key: a[key] for key in a if key.endswith(("tokens", "clipped_share", "on_policy"))}
        assert {key: b[key] for key in shares} == pytest.approx(shares, rel=1e-12)
    summary = json.loads((pair / "summary.json").read_text())
    assert summary["recovered"]["kl"] == pytest.approx(single.summary["recovered"]["kl"], rel=1e-2)
    assert summary["tokens_trained"] == single.summary["tokens_trained"]


def test_repair_and_the_answers_that_it_was_fitted_to(
    recipes: dict[str, dict[str, Any]], pairs: dict[str, Path]
) -> None:
    assert_alike(recover(**recipes["repaired"]), pairs["repaired"])
    assert [row["on_policy"] for row in rows_of(pairs["repaired"])] == [0.0, 0.0, 0.0, 1.0]


def test_a_repair_that_makes_things_worse_is_undone_by_all(
    recipes: dict[str, dict[str, Any]], pairs: dict[str, Path]
) -> None:
    assert_alike(recover(**{**recipes["undone"], "repair": False, "bootstrap": "off"}), pairs["undone"])
    assert not any("on_policy" in row for row in rows_of(pairs["undone"]))


def test_pools_gate_and_streams(recipes: dict[str, dict[str, Any]], pairs: dict[str, Path]) -> None:
    single = recover(**recipes["streams"])
    assert_alike(single, pairs["streams"])
    assert RunDirectory(single.out).rows(GATE) == RunDirectory(pairs["streams"]).rows(GATE)


def test_a_diagnosis(diagnosis: dict[str, Any], pairs: dict[str, Path], tmp_path: Path) -> None:
    single = remend.diagnose(**diagnosis, out=str(tmp_path / "one"), cache=str(tmp_path / "cache"))
    pair = json.loads((pairs["diagnosed"] / "diagnosis.json").read_text())
    for key in ("layers", "behaviour", "positions", "stretches", "norms", "severity", "rows"):
        assert pair[key] == single[key], key
