"""Training begins with the answers that repair was fitted to: the reference's own, and already there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.killing import kill_at
from remend.files.run_directory import METRICS, RunDirectory
from remend.files.settings import build
from remend.recovery import recover
from remend.recovery.bootstrap import repair_budget, reuses_repair
from remend.recovery.pools import REPAIR_ANSWERS
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import resolve

NAMES = {"student": "s", "teacher": "t", "data": "d", "out": "o", "bootstrap": "repair"}
GIVEN: dict[str, Any] = {
    "bootstrap": "repair",
    "repair": True,
    "repair_samples": 6,
    "steps": 5,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "updates_per_rollout": 1,
}


def shares(out: Path) -> list[float | None]:
    """Of each step: how much of it was on-policy; None where there is no pool."""
    return [row.get("on_policy") for row in RunDirectory(out).rows(METRICS) if "loss" in row]


def repaired(recipe: dict[str, Any], out: Path, **changed: Any) -> Any:
    return recover(**{**recipe, **GIVEN, "out": str(out), **changed})


def test_the_first_steps_train_on_them_and_the_rest_on_policy(recipe: dict[str, Any], tmp_path: Path) -> None:
    """6 answers twice are 12 completions: three steps of 4."""
    out = repaired(recipe, tmp_path / "a").out
    answers = RunDirectory(out).rows(REPAIR_ANSWERS)
    assert len(answers) == 6
    assert shares(out) == [0.0, 0.0, 0.0, 1.0, 1.0]
    more = repaired(recipe, tmp_path / "b", off_policy_passes=3).out
    assert shares(more) == [0.0] * 4 + [1.0]
    fewer = repaired(recipe, tmp_path / "c", bootstrap_steps=1).out
    assert shares(fewer) == [0.0] + [1.0] * 4


def test_bootstrap_off_leaves_them_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert shares(repaired(recipe, tmp_path / "off", bootstrap="off").out) == [None] * 5


def test_without_repair_training_is_on_policy(recipe: dict[str, Any], tmp_path: Path) -> None:
    """An adapter beside frozen weights has nothing repaired."""
    out = repaired(recipe, tmp_path / "plain", lora={"rank": 2}).out
    assert shares(out) == [None] * 5
    assert not (Path(out) / REPAIR_ANSWERS).exists()


def test_a_resumed_run_takes_up_the_same_answers(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = recover(**{**recipe, **GIVEN, "out": str(tmp_path / "whole")})
    kill_at({**recipe, **GIVEN, "out": str(tmp_path / "torn")}, 2)
    resumed = recover(resume=str(tmp_path / "torn"))
    assert (tmp_path / "torn" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    ours, theirs = (load_file(r.model / "model.safetensors") for r in (whole, resumed))
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("mode", ["plain", "spoil"])
def test_two_processes_equal_one(recipe: dict[str, Any], tmp_path: Path, mode: str) -> None:
    """Also where the main process finds that repair made things worse, and all undo it."""
    given = {**recipe, **GIVEN, "steps": 4}
    undone = {} if mode == "plain" else {"repair": False, "bootstrap": "off"}
    single = recover(**{**given, **undone, "out": str(tmp_path / "single")})
    halves = json.dumps({**given, "batch_size": 2, "out": str(tmp_path / "pair")})
    worker = str(Path(__file__).parents[1] / "helpers" / "worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, mode]
    done = subprocess.run([*command, halves], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = ([r for r in RunDirectory(p).rows(METRICS) if "loss" in r] for p in (single.out, tmp_path / "pair"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["clipped_share"] == pytest.approx(b["clipped_share"])
        assert a["tokens"] == b["tokens"]
    summary = json.loads((tmp_path / "pair" / "summary.json").read_text())
    assert summary["recovered"]["kl"] == pytest.approx(single.summary["recovered"]["kl"], rel=1e-2)
    assert summary["tokens_trained"] == single.summary["tokens_trained"]
    assert shares(tmp_path / "pair") == ([0.0, 0.0, 0.0, 1.0] if mode == "plain" else [None] * 4)


@pytest.mark.parametrize(
    ("changed", "answers", "steps"),
    [
        ({"steps": 48}, 192, 48),
        ({"steps": 100}, 192, 48),
        ({"steps": 100, "gradient_accumulation": 3}, 192, 16),
        ({"steps": 100, "off_policy_passes": 1}, 192, 24),
        ({"steps": 100, "bootstrap_steps": 30}, 192, 30),
        ({"steps": 100, "updates_per_rollout": 5, "save_every": 0}, 192, 45),
        ({}, 0, 0),
    ],
)
def test_answers_serve_whole_steps(changed: dict[str, Any], answers: int, steps: int) -> None:
    assert repair_budget(build(RecoverConfig, {**NAMES, **changed}, "test"), answers, 1) == steps


def test_processes_share_the_answers_of_a_step() -> None:
    assert repair_budget(build(RecoverConfig, {**NAMES, "steps": 100}, "test"), 192, 4) == 12


@pytest.mark.parametrize(
    ("changed", "reused"),
    [
        ({}, True),
        ({"bootstrap": "off"}, False),
        ({"bootstrap": "on"}, False),
        ({"temperature": 0.7}, False),
        ({"streams": {"a": {"policy": 0.5}}}, False),
        ({"streams": {"a": {"demonstrations": True}}}, False),
        ({"streams": {"a": {"teacher": "other"}}}, False),
        ({"streams": {"a": {}, "b": {"teacher": "initial"}}}, False),
    ],
)
def test_only_a_plain_stream_of_the_reference_can_use_them(changed: dict[str, Any], reused: bool) -> None:
    config = build(RecoverConfig, {**NAMES, **json.loads(json.dumps(changed))}, "test")
    assert reuses_repair(config, resolve(config)) is reused
