"""An interrupted run goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.killing import kill_at
from remend.errors import InputError
from remend.files.run_directory import METRICS, RunDirectory
from remend.models.find import find_model
from remend.models.load import load_model
from remend.recovery import recover
from remend.training.constraints import Free
from remend.training.loop import restore_masters


@pytest.mark.parametrize("kill", [5, 1])
def test_killed_and_resumed_equals_uninterrupted(recipe: dict[str, object], tmp_path: Path, kill: int) -> None:
    """Killed between checkpoints (5) and before the first one (1)."""
    values = {**recipe, "steps": 6, "eval_every": 3}
    whole = recover(**{**values, "out": str(tmp_path / "whole")})
    torn = {**values, "out": str(tmp_path / "torn")}
    kill_at(torn, kill)
    with (tmp_path / "torn" / METRICS).open("a") as stream:
        stream.write('{"step": 99, "lo')  # a row that the kill cut short
    resumed = recover(resume=str(tmp_path / "torn"))
    assert (tmp_path / "torn" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    for name in ("model.safetensors", "grid.safetensors"):
        ours, theirs = load_file(whole.model / name), load_file(resumed.model / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[k].equal(theirs[k]) for k in ours)
    same = ("degraded", "recovered", "gap_closed", "tokens_trained")
    assert {k: whole.summary[k] for k in same} == {k: resumed.summary[k] for k in same}


def test_an_adapter_killed_and_resumed_equals_uninterrupted(recipe: dict[str, object], tmp_path: Path) -> None:
    values = {**recipe, "steps": 6, "lora": {"rank": 4}, "learning_rate": 5e-3}
    whole = recover(**{**values, "out": str(tmp_path / "whole")})
    torn = {**values, "out": str(tmp_path / "torn")}
    kill_at(torn, 5)
    resumed = recover(resume=str(tmp_path / "torn"))
    assert (tmp_path / "torn" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    ours, theirs = (load_file(r.model / "adapter_model.safetensors") for r in (whole, resumed))
    assert ours.keys() == theirs.keys()
    assert all(ours[k].equal(theirs[k]) for k in ours)
    assert whole.summary["recovered"] == resumed.summary["recovered"]
    masters = RunDirectory(whole.out).checkpoints()[-1].masters()
    assert len(masters) == len(ours)
    assert all("lora_" in name for name in masters)


def test_keep_checkpoints(recipe: dict[str, object]) -> None:
    result = recover(**{**recipe, "steps": 6, "save_every": 1, "keep_checkpoints": 3})
    assert [c.step for c in RunDirectory(result.out).checkpoints()] == [4, 5, 6]


def test_resuming_a_complete_run_changes_nothing(recipe: dict[str, object]) -> None:
    first = recover(**recipe)
    before = {p: p.stat().st_mtime_ns for p in first.out.rglob("*")}
    again = recover(resume=first.out)
    assert again.summary == first.summary
    assert {p: p.stat().st_mtime_ns for p in first.out.rglob("*")} == before


def test_a_run_of_an_older_version_resumes(recipe: dict[str, object]) -> None:
    """Version 0.1 wrote keys that are gone, each with its default, and lacked those that are newer."""
    first = recover(**recipe)
    manifest = json.loads((first.out / "manifest.json").read_text())
    manifest["recipe"] |= {"importance_clip": None, "scales": "fixed"}
    (first.out / "manifest.json").write_text(json.dumps(manifest))
    (first.out / "recipe.yaml").write_text(yaml.safe_dump(manifest["recipe"]))
    assert recover(resume=first.out).summary == first.summary


def test_resume_on_something_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no remend run"):
        recover(resume=tmp_path)


def test_resume_with_a_changed_recipe_is_refused(recipe: dict[str, object]) -> None:
    result = recover(**{**recipe, "steps": 1, "save_every": 1})
    (result.out / "summary.json").unlink()
    with pytest.raises(InputError, match=r"changed since the run began \(steps: 1 became 3\)"):
        recover(resume=result.out, steps=3)
    edited = yaml.safe_load((result.out / "recipe.yaml").read_text())
    (result.out / "recipe.yaml").write_text(yaml.safe_dump({**edited, "learning_rate": 0.5}))
    with pytest.raises(InputError, match=r"learning_rate: 0.001 became 0.5"):
        recover(resume=result.out)


def test_a_checkpoint_that_holds_more_than_is_trained_is_refused(recipe: dict[str, object]) -> None:
    """It is of a version that trained more, and what it learned there would be lost in silence."""
    result = recover(**recipe)  # type: ignore[arg-type]
    checkpoint = RunDirectory(result.out).checkpoints()[-1]
    model = load_model(find_model(str(result.model)), dtype=torch.float32, device=torch.device("cpu"))
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"not trained here \(model\.norm\.weight\)"):
        restore_masters(checkpoint, Free(model))


def test_changed_inputs_are_not_resumed(recipe: dict[str, object], tmp_path: Path) -> None:
    kill_at({**recipe, "out": str(tmp_path / "torn")}, 3)
    data = Path(str(recipe["data"]))
    data.write_text(data.read_text().replace("number 1.", "number one."))
    with pytest.raises(InputError, match=r"the files of data changed.*start a new run"):
        recover(resume=str(tmp_path / "torn"))
