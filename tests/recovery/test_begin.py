"""A plan does not change once it is made, and nothing samples or writes because it was built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from helpers.steps import encoded, source
from helpers.tiny import build_model
from remend.data.templates import Encoded
from remend.files.run_directory import RunDirectory
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.recovery.begin import Run
from remend.recovery.bootstrap import Gate, Verdict
from remend.recovery.distillation import Distillation
from remend.recovery.job import check
from remend.recovery.judge import Judge, SideJudge
from remend.recovery.rounds import Rounds
from remend.recovery.selection import Selection
from remend.recovery.tracking import Tracker
from remend.training.constraints import Free
from remend.training.teachers.frozen import Frozen


def test_a_plan_is_frozen(recipe: dict[str, Any]) -> None:
    checked = check(**recipe)
    plan: Any = checked.plan
    assert isinstance(plan.prompts.streams, tuple)
    for changed, name in ((plan, "shared"), (plan.prompts.main, "train"), (plan.facts, "layer_map"), (checked, "plan")):
        with pytest.raises(FrozenInstanceError):
            setattr(changed, name, None)


def test_one_process_is_on_the_device_that_the_recipe_names(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Not on the one that accelerate takes first."""
    plan = check(**recipe).plan
    assert plan is not None
    second = replace(plan, device=torch.device("cuda:1"))
    assert Run(second, RunDirectory(tmp_path), Accelerator(cpu=True), None, plan.prompts).device == second.device


def test_a_recipe_with_problems_has_no_plan(recipe: dict[str, Any]) -> None:
    checked = check(**{**recipe, "top_k": 10_000})
    assert (checked.plan, len(checked.problems)) == (None, 1)


def test_constructors_neither_sample_nor_write(recipe: dict[str, Any], tmp_path: Path) -> None:
    def asked(*args: object, **rest: object) -> Any:
        raise AssertionError("a constructor asked a model")

    class Silent:
        def __call__(
            self, prompts: Sequence[Encoded], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
        ) -> list[Rollout]:
            return list(asked())

    model = build_model(320)
    parts = scorer(model)  # which asks it whether head and body fit
    model.register_forward_pre_hook(asked)
    model.model.register_forward_pre_hook(asked)
    plan = check(**recipe).plan
    assert plan is not None
    (tmp_path / "empty").mkdir()
    directory, accelerator = RunDirectory(tmp_path / "empty"), Accelerator(cpu=True)
    run, teacher = Run(plan, directory, accelerator, None, plan.prompts), Frozen(parts)
    taught, completions = source(teacher, encoded(4), 2), [Rollout("a", (3,), (4, 5), False)]
    rounds = Rounds([taught], Silent(), 4, 0, nullcontext())
    judge = Judge(run, teacher, plan.prompts.main.held_out, completions)
    built: list[object] = [
        rounds,
        judge,
        Distillation(parts, rounds, 2, nullcontext()),
        SideJudge(run, {"recover": taught}, parts, {"recover": completions}),
        Tracker(run, parts, completions, [0], None),
        Selection(directory, Free(model), keep=True, patience=2),
        Gate("auto", 4, lambda: Verdict(asked()), directory, accelerator),
    ]
    assert len(built) == 7
    assert list(directory.path.iterdir()) == []
    assert not Path(recipe["out"]).exists()
