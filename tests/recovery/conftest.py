"""Whole recoveries, one of each kind, that many tests look at, and recipes for those of their own.

A run is made once per session, by the first test that asks for it. Nobody changes its directory: who wants to resume or
damage it takes a copy (helpers/recovering.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import remend
from helpers.recovering import LoopCall, keeping, loop_call
from helpers.task_rows import write
from helpers.tiny import prompts, small_recipe
from remend.recovery.job import RecoverResult, recover


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts.jsonl, task.jsonl (with demonstrations) and tools.jsonl (rows of a task)."""
    path = tmp_path_factory.mktemp("recovery")
    write(path / "prompts.jsonl", [{"prompt": p} for p in prompts()])
    tasks = [{"prompt": f"Task {p}", "demonstration": f"Action: look at {i}."} for i, p in enumerate(prompts(30))]
    write(path / "task.jsonl", tasks)
    write(path / "tools.jsonl", remend.tasks.get("tooluse-short").rows("train", 12))
    return path


@pytest.fixture(scope="session")
def forgotten(reference_dir: Path, tokenizer: Any, place: Path) -> Path:
    """The reference, moved off by noise: a student on no grid."""
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(place / "forgotten")
    tokenizer.save_pretrained(place / "forgotten")
    return place / "forgotten"


@pytest.fixture(scope="session")
def both_streams(forgotten: Path, reference_dir: Path, place: Path) -> dict[str, Any]:
    """A recipe of two streams, without `out`: recover from the reference, keep the student as it came in."""
    values = small_recipe(forgotten, reference_dir, place / "prompts.jsonl", place)
    streams = {
        "recover": {"data": values["data"], "held_out": 6},
        "keep": {"data": str(place / "task.jsonl"), "teacher": "initial", "held_out": 4, "weight": 0.5},
    }
    plain = {k: v for k, v in values.items() if k not in ("data", "held_out", "out")}
    return {**plain, "streams": streams, "save_every": 0, "eval_every": 2}


@pytest.fixture
def both(both_streams: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """`both_streams` with a directory of the test's own."""
    return {**both_streams, "out": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def grid_run(student_dir: Path, reference_dir: Path, place: Path) -> RecoverResult:
    """A student on a grid, measured and tracked on the way, without repair."""
    recipe = small_recipe(student_dir, reference_dir, place / "prompts.jsonl", place / "grid")
    length = {"steps": 24, "save_every": 8, "keep_checkpoints": 9, "max_new_tokens": 12, "held_out": 12}
    rates = {"learning_rate": 4e-3, "warmup_steps": 3, "final_learning_rate": 0.5}
    return recover(**{**recipe, **length, **rates, "eval_every": 8, "diagnose_every": 8})


@pytest.fixture(scope="session")
def repaired_recipe(student_dir: Path, reference_dir: Path, place: Path) -> dict[str, Any]:
    """A student on a grid is repaired, and training begins with the answers that repair was fitted to."""
    recipe = small_recipe(student_dir, reference_dir, place / "prompts.jsonl", place / "repaired")
    rest = {"repair": True, "repair_samples": 6, "bootstrap": "repair", "updates_per_rollout": 1}
    return {**recipe, **rest, "steps": 6, "eval_every": 3, "diagnose_every": 3}


@pytest.fixture(scope="session")
def repaired_run(repaired_recipe: dict[str, Any]) -> RecoverResult:
    return recover(**repaired_recipe)


@pytest.fixture(scope="session")
def streams_run(both_streams: dict[str, Any], place: Path) -> RecoverResult:
    """Two streams, and a gate that lets the fluent student pass at once."""
    return recover(**both_streams, bootstrap="auto", out=str(place / "streams"))


@pytest.fixture(scope="session")
def ema_run(both_streams: dict[str, Any], place: Path) -> RecoverResult:
    """A moving teacher with demonstrations, half off-policy; two steps of bootstrap; the best step is kept."""
    values = keeping(both_streams, teacher="ema", demonstrations=True, policy=0.5)
    rest = {"steps": 6, "save_every": 2, "keep_checkpoints": 9, "bootstrap": "on", "bootstrap_steps": 2}
    return recover(**{**values, **rest, "ema": {"rate": 0.5, "every": 2}, "out": str(place / "ema")})


@pytest.fixture(scope="session")
def gated_run(both_streams: dict[str, Any], place: Path) -> RecoverResult:
    """The gate asks whether demonstrations help the teacher, by a task's score too."""
    data = {"data": str(place / "tools.jsonl"), "task": "tooluse-short"}
    values = keeping(both_streams, teacher="ema", demonstrations=True, policy=0.5, **data)
    return recover(**{**values, "bootstrap": "auto", "save_every": 2, "out": str(place / "gated")})


@pytest.fixture(scope="session")
def adapter_recipe(both_streams: dict[str, Any]) -> dict[str, Any]:
    """A fresh adapter, kept near its own base; without `out`."""
    return {**keeping(both_streams, teacher="base"), "lora": {"rank": 4}, "learning_rate": 1e-2}


@pytest.fixture(scope="session")
def adapter_run(adapter_recipe: dict[str, Any], place: Path) -> RecoverResult:
    return recover(**{**adapter_recipe, "save_every": 2, "out": str(place / "adapter")})


@pytest.fixture
def at_the_loop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoopCall]:
    """Runs a recovery up to its first step, and gives what the loop would be called with."""
    return lambda **recipe: loop_call(monkeypatch, recipe)
