"""Recipes, finished runs that look interrupted, and recoveries that end where the loop would begin."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from remend.files.run_directory import METRICS, SUMMARY, TRACK, RunDirectory
from remend.files.signed import SIGNATURE
from remend.recovery.bootstrap import GATE
from remend.recovery.distillation import Distillation
from remend.recovery.job import RecoverResult, recover
from remend.training.constraints import Constraint
from remend.training.loop import Optimization, Saving


def keeping(recipe: dict[str, Any], **keep: Any) -> dict[str, Any]:
    """The recipe with other settings of its stream `keep`."""
    return {**recipe, "streams": {**recipe["streams"], "keep": {**recipe["streams"]["keep"], **keep}}}


def weights(model: Path) -> dict[str, Any]:
    """All tensors of a saved model or adapter."""
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def torn_copy(finished: Path, to: Path, step: int) -> Path:
    """A copy of a finished run's directory as it was soon after its checkpoint of `step`; 0 is before the first."""
    shutil.copytree(finished, to)
    for checkpoint in RunDirectory(to).checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    shutil.rmtree(to / "model")
    (to / SUMMARY).unlink()
    return to


def forget_hashes(directory: Path) -> None:
    """Take the hashes out of a degraded model's record: its owner changed its files and means it."""
    record = directory / "degradation.json"
    facts = json.loads(record.read_text())
    del facts["files"], facts["sha256"]
    record.write_text(json.dumps(facts))


def assert_equal_runs(one: RecoverResult, other: RecoverResult) -> None:
    """The same in every bit, but for what a clock says."""
    for name in (METRICS, GATE, TRACK):
        assert RunDirectory(one.out).rows(name) == RunDirectory(other.out).rows(name), name
    ours, theirs = weights(one.model), weights(other.model)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    times = ("seconds", "training_seconds", "peak_rss_mib", "repair", SIGNATURE)
    summaries = [{k: v for k, v in run.summary.items() if k not in times} for run in (one, other)]
    assert summaries[0] == summaries[1]
    repairs = [{**(run.summary["repair"] or {}), "seconds": 0} for run in (one, other)]
    assert repairs[0] == repairs[1]


@dataclass
class LoopCall(Exception):
    """What a recovery hands to the optimisation loop; raised in the loop's place."""

    objective: Distillation
    constraint: Constraint
    optimization: Optimization
    saving: Saving


def loop_call(monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]) -> LoopCall:
    """Run a recovery until it calls the loop."""

    def called(objective: Any, constraint: Any, accelerator: Any, optimization: Any, saving: Any, **rest: Any) -> int:
        raise LoopCall(objective, constraint, optimization, saving)

    with monkeypatch.context() as patched:
        patched.setattr("remend.recovery.training.train", called)
        with pytest.raises(LoopCall) as caught:
            recover(**recipe)
    return caught.value
