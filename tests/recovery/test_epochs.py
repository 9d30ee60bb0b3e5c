"""Epochs in place of steps: how they are counted, what is printed and recorded, and a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.recovering import torn_copy
from remend.errors import InputError
from remend.files.run_directory import RunDirectory
from remend.recovery.epochs import Epochs
from remend.recovery.job import check, recover, settings
from remend.recovery.plan import Plan


def without_steps(recipe: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The recipe with epochs and other settings, and no steps."""
    return {**{key: value for key, value in recipe.items() if key not in ("steps", "save_every")}, **more}


def plan_of(values: dict[str, Any]) -> Plan:
    checked = check(**values)
    assert checked.plan is not None, checked.problems
    return checked.plan


@pytest.mark.parametrize(("epochs", "steps"), [(1, 9), (2, 17), (0.5, 5), ("0.1", 1), (8 / 34 * 3, 6)])
def test_epochs_are_counted_in_steps(recipe: dict[str, Any], epochs: float, steps: int) -> None:
    """34 prompts are trained on, 4 a step."""
    plan = plan_of(without_steps(recipe, epochs=epochs))
    assert (plan.config.steps, plan.config.epochs) == (steps, None)
    assert plan.chosen[0] == f"{steps} steps: {float(epochs):g} epochs of 34 training prompts, 4 a step"


@pytest.mark.parametrize(("changed", "steps"), [({"gradient_accumulation": 2}, 5), ({"prompts_per_step": 16}, 3)])
def test_an_epoch_is_as_long_for_any_number_of_processes(
    recipe: dict[str, Any], changed: dict[str, int], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan_of(without_steps(recipe, epochs=1, **changed)).config.steps == steps


def test_of_several_streams_the_longest_counts(both: dict[str, Any]) -> None:
    plan = plan_of(without_steps(both, num_train_epochs=1, save_every=0))
    prompts = {s.stream.name: len(s.train) for s in plan.prompts.streams}
    assert plan.epochs == Epochs(1.0, max(prompts.values()), 2)
    assert plan.config.steps == -(-max(prompts.values()) // 2)


def test_prompts_to_be_written_count_as_asked_for(recipe: dict[str, Any]) -> None:
    values = without_steps(recipe, data="self", epochs=1)
    plan = plan_of({**values, "self_prompts": 30, "held_out": None})
    assert (plan.config.steps, plan.config.self_prompts) == (-(-(30 - 3) // 4), 30)
    plan = plan_of({**values, "held_out": None})
    assert (plan.config.steps, plan.config.self_prompts) == (-(-(512 - 51) // 4), 512)


def test_epochs_beside_steps_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"steps \(4\) and epochs \(2\) are both given.*epochs=2 steps=null"):
        settings(overrides={**recipe, "epochs": 2})
    assert settings(overrides={**recipe, "epochs": 2, "steps": None}).epochs == 2.0
    with pytest.raises(InputError, match="num_train_epochs is another name of epochs"):
        settings(overrides=without_steps(recipe, epochs=2, num_train_epochs=2))


def test_what_depends_on_the_steps_is_asked_once_they_are_known(recipe: dict[str, Any]) -> None:
    values = without_steps(recipe, epochs=1)
    assert check(**{**values, "select": "best", "eval_every": 10}).problems == [
        "select: best would never look: eval_every 10 is above steps 9"
    ]
    said = check(**{**values, "warmup_steps": 20}).warnings
    assert any(warning.startswith("warmup_steps 20 is above steps 9") for warning in said)
    assert check(files=False, **{**values, "select": "best", "eval_every": 10}).problems == []


def test_a_run_of_epochs(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files have the steps, and say how they were counted; it is resumed with the same epochs."""
    values = without_steps(recipe, epochs=0.5)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = recover(tmp_path / "recipe.yaml")
    assert "5 steps: 0.5 epochs of 34 training prompts, 4 a step" in capsys.readouterr().err
    assert [row["step"] for row in result.metrics] == [1, 2, 3, 4, 5]
    record = {"asked": 0.5, "prompts": 34, "a_step": 4, "self_prompts": None, "steps": 5}
    assert result.summary["epochs"] == json.loads((result.out / "manifest.json").read_text())["epochs"] == record
    assert yaml.safe_load((result.out / "recipe.yaml").read_text())["steps"] == 5
    torn = torn_copy(result.out, tmp_path / "torn", RunDirectory(result.out).checkpoints()[0].step)
    assert recover(tmp_path / "recipe.yaml", resume=torn).metrics == result.metrics
    assert recover(resume=torn, epochs=0.5).summary["steps"] == 5
    longer = recover(resume=torn, epochs=1)
    assert longer.metrics[:5] == result.metrics
    assert ([s["steps"] for s in longer.summary["segments"]], longer.summary["steps"]) == ([9], 9)
