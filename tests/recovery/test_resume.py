"""An interrupted run goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.processes import kill_at
from helpers.recovering import assert_equal_runs, torn_copy
from remend.errors import InputError
from remend.files.run_directory import METRICS, RunDirectory
from remend.models.find import find_model
from remend.models.load import load_model
from remend.recovery.job import RecoverResult, recover
from remend.training.constraints import Free
from remend.training.loop import restore_masters


def test_killed_and_resumed_equals_uninterrupted(
    repaired_recipe: dict[str, Any], repaired_run: RecoverResult, tmp_path: Path
) -> None:
    """Killed between checkpoints, with repair and the answers that it was fitted to."""
    torn = tmp_path / "torn"
    kill_at({**repaired_recipe, "out": str(torn)}, 5)
    with (torn / METRICS).open("a") as stream:
        stream.write('{"step": 99, "lo')  # a row that the kill cut short
    assert_equal_runs(repaired_run, recover(resume=torn))


@pytest.mark.parametrize(
    ("run", "step"),
    [
        ("grid_run", 16),
        ("repaired_run", 0),  # before the first checkpoint: repair is made again
        ("ema_run", 2),  # where bootstrap ends
        ("ema_run", 4),  # the average has moved
        ("gated_run", 2),
        ("adapter_run", 2),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    run: str, step: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole: RecoverResult = request.getfixturevalue(run)
    assert_equal_runs(whole, recover(resume=torn_copy(whole.out, tmp_path / "torn", step)))


def test_a_default_run_that_was_interrupted_late_goes_on_from_anywhere(
    repaired_recipe: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has saved without being told to, so repair is not made again; relative paths hold from anywhere."""
    monkeypatch.chdir(place)
    here = {key: os.path.relpath(repaired_recipe[key], place) for key in ("student", "teacher", "data")}
    rest = {"save_every": None, "warmup_steps": None, "updates_per_rollout": None, "diagnose_every": 0, "steps": 4}
    whole = recover(**{**repaired_recipe, **here, **rest, "eval_every": 0, "out": os.path.relpath(tmp_path / "whole")})
    assert [c.step for c in RunDirectory(tmp_path / "whole").checkpoints()] == [2, 4]
    torn_copy(tmp_path / "whole", tmp_path / "torn", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("remend.recovery.run.repair_if_it_helps", None)
    other = recover(resume="torn")
    assert other.out == tmp_path / "torn"
    assert Path.cwd() == tmp_path
    assert_equal_runs(replace(whole, out=tmp_path / "whole", model=tmp_path / "whole/model"), other)
    assert f"cd {place}\nremend recover {tmp_path}/torn/recipe.yaml" in (tmp_path / "torn/report.md").read_text()


def test_a_moved_project_goes_on(
    repaired_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for key in ("student", "teacher"):
        shutil.copytree(repaired_recipe[key], project / key)
    shutil.copy(repaired_recipe["data"], project / "prompts.jsonl")
    monkeypatch.chdir(project)
    inside = {"student": "student", "teacher": "teacher", "data": "prompts.jsonl", "out": "runs/one"}
    quick = {"repair": False, "bootstrap": "off", "diagnose_every": 0, "steps": 4}
    whole = recover(**{**repaired_recipe, **quick, **inside})
    torn_copy(project / "runs/one", project / "runs/torn", 2)
    shutil.rmtree(project / "runs/one")
    (project / "runs/torn").rename(project / "runs/one")
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "elsewhere")
    metrics = whole.metrics
    again = recover(resume="elsewhere/runs/one")
    assert again.metrics == metrics
    assert f"working in {tmp_path}/elsewhere, since the run" in capsys.readouterr().err


def test_only_the_adapter_is_in_its_checkpoints(adapter_run: RecoverResult) -> None:
    masters = RunDirectory(adapter_run.out).checkpoints()[-1].masters()
    assert len(masters) > 0
    assert all("lora_" in name for name in masters)


def test_resume_on_something_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no remend run"):
        recover(resume=tmp_path)


def test_resume_with_a_changed_recipe_is_refused(grid_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(grid_run.out, tmp_path / "torn", 8)
    with pytest.raises(InputError, match=r"changed since the run began \(seed: 0 became 1\).*but for steps"):
        recover(resume=torn, seed=1, steps=30)
    edited = yaml.safe_load((torn / "recipe.yaml").read_text())
    (torn / "recipe.yaml").write_text(yaml.safe_dump({**edited, "learning_rate": 0.5}))
    with pytest.raises(InputError, match=r"learning_rate: 0.004 became 0.5"):
        recover(resume=torn)


def test_a_checkpoint_that_holds_more_than_is_trained_is_refused(grid_run: RecoverResult) -> None:
    """It is of a version that trained more, and what it learned there would be lost in silence."""
    checkpoint = RunDirectory(grid_run.out).checkpoints()[-1]
    model = load_model(find_model(str(grid_run.model)), dtype=torch.float32, device=torch.device("cpu"))
    dict(model.named_parameters())["model.norm.weight"].requires_grad_(False)
    with pytest.raises(InputError, match=r"not trained here \(model\.norm\.weight\)"):
        restore_masters(checkpoint, Free(model))


def test_changed_inputs_are_not_resumed(recipe: dict[str, Any], tmp_path: Path) -> None:
    done = recover(**{**recipe, "steps": 0})
    data = Path(recipe["data"])
    data.write_text(data.read_text().replace("number 1.", "number one."))
    with pytest.raises(InputError, match=r"the files of data changed.*start a new run"):
        recover(resume=torn_copy(done.out, tmp_path / "torn", 0))
