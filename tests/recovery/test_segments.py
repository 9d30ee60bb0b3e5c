"""A run that goes on for more steps than its recipe says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.recovering import assert_equal_runs, weights
from remend.errors import InputError, TrainingError
from remend.files.run_directory import METRICS, NEXT, SUMMARY, TRACK, RunDirectory, planned_steps
from remend.files.signed import signed
from remend.recovery import segments
from remend.recovery.job import RecoverResult, recover, track
from remend.report import report
from remend.report.running import page_now
from remend.training.loop import Optimization


@pytest.fixture(scope="session")
def five_recipe(repaired_recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    """Five steps, an odd number, in rounds of two; measured and tracked on the way."""
    rest = {"steps": 5, "updates_per_rollout": 2, "save_every": 2, "eval_every": 2, "diagnose_every": 2}
    return {**repaired_recipe, **rest, "warmup_steps": 1, "out": str(place / "five")}


@pytest.fixture(scope="session")
def five(five_recipe: dict[str, Any]) -> RecoverResult:
    return recover(**five_recipe)


@pytest.fixture(scope="session")
def nine(five: RecoverResult, place: Path) -> RecoverResult:
    """The same, which then goes on to nine."""
    return recover(resume=shutil.copytree(five.out, place / "nine"), steps=9)


def test_the_steps_before_stay_and_those_added_have_the_last_rate(five: RecoverResult, nine: RecoverResult) -> None:
    assert nine.metrics[:5] == five.metrics
    assert [row["step"] for row in nine.metrics] == list(range(1, 10))
    last = five.metrics[-1]["learning_rate"]
    assert last == pytest.approx(1e-4)
    assert [row["learning_rate"] for row in nine.metrics[5:]] == [last] * 4


def test_what_the_files_say_of_it(five: RecoverResult, nine: RecoverResult) -> None:
    manifest = json.loads((nine.out / "manifest.json").read_text())
    (segment,) = manifest["segments"]
    assert (segment["from"], segment["steps"], segment["learning_rate"]) == (5, 9, pytest.approx(1e-4))
    assert segment["date"].startswith("20")
    assert nine.summary["segments"] == manifest["segments"]
    assert (nine.summary["steps"], planned_steps(manifest)) == (9, 9)
    assert (nine.out / "recipe.yaml").read_text() == (five.out / "recipe.yaml").read_text()
    assert [c.step for c in RunDirectory(nine.out).checkpoints()] == [7, 9]  # of the segment's own rounds
    stages = [(row["step"], row["stage"]) for row in RunDirectory(nine.out).rows(TRACK)]
    assert [stage for _, stage in stages].count("recovered") == 1
    assert not (nine.out / NEXT).exists()
    page = nine.report.read_text(encoding="utf-8")
    assert "The steps after 5 were added later" in page
    assert "steps=9" in page


def test_the_result_is_the_longer_runs(five: RecoverResult, nine: RecoverResult) -> None:
    before, after = weights(five.model), weights(nine.model)
    assert any(not before[name].equal(after[name]) for name in before)
    rows = RunDirectory(nine.out).rows("held_out.jsonl")
    assert sum(r["kl_sum_recovered"] for r in rows) / sum(r["tokens"] for r in rows) == pytest.approx(
        nine.summary["recovered"]["kl"]
    )
    assert five.summary["degraded"] == nine.summary["degraded"]


def test_a_segment_interrupted_and_resumed_is_the_uninterrupted_one(
    five: RecoverResult, nine: RecoverResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the second segment between checkpoints; until it is whole the first result stands."""
    torn = shutil.copytree(five.out, tmp_path / "torn")

    def stops(directory: RunDirectory, name: str, row: dict[str, Any]) -> None:
        if name == "timing.jsonl" and row["step"] == 8:
            raise TrainingError("the power is gone")
        append(directory, name, row)

    append = RunDirectory.append
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", stops)
        with pytest.raises(TrainingError):
            recover(resume=torn, steps=9)
    directory = RunDirectory(torn)
    assert not directory.complete
    assert json.loads((torn / SUMMARY).read_text()) == five.summary
    assert "Step 8 of 9" in page_now(torn).verdict
    report([torn])  # of the first result
    assert "5 steps" in (torn / "report.md").read_text(encoding="utf-8")
    shutil.copytree(torn, tmp_path / "again")
    for resumed in (recover(resume=torn), recover(resume=tmp_path / "again", steps=9)):
        assert resumed.metrics == nine.metrics
        ours, theirs = weights(resumed.model), weights(nine.model)
        assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_run_interrupted_before_is_lengthened_likewise(
    five: RecoverResult, nine: RecoverResult, tmp_path: Path
) -> None:
    torn = shutil.copytree(five.out, tmp_path / "torn")
    (torn / SUMMARY).unlink()
    shutil.rmtree(torn / "model")
    shutil.rmtree(torn / "checkpoints/step-000005")
    assert recover(resume=torn, steps=9).metrics == nine.metrics


def test_an_interruption_while_the_results_change_places_loses_nothing(
    five: RecoverResult, nine: RecoverResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = shutil.copytree(five.out, tmp_path / "torn")

    def stops(directory: RunDirectory) -> None:
        raise TrainingError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr("remend.recovery.save.take_place", stops)
        with pytest.raises(TrainingError):
            recover(resume=torn, steps=9)
    assert all(a.equal(weights(five.model)[n]) for n, a in weights(torn / "model").items())
    assert (torn / NEXT / "model").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr("remend.recovery.save.write_report", lambda *a: stops(RunDirectory(torn)))
        with pytest.raises(TrainingError):
            recover(resume=torn)
    assert not (torn / SUMMARY).exists()
    assert not RunDirectory(torn).complete
    resumed = recover(resume=torn)
    assert all(a.equal(weights(nine.model)[n]) for n, a in weights(resumed.model).items())


def test_what_a_linked_model_leads_to_stays(five: RecoverResult, nine: RecoverResult, tmp_path: Path) -> None:
    linked = shutil.copytree(five.out, tmp_path / "linked")
    (linked / "model").rename(tmp_path / "large-disk")
    (linked / "model").symlink_to(tmp_path / "large-disk")
    longer = recover(resume=linked, steps=9)
    assert not (linked / "model").is_symlink()
    assert all(a.equal(weights(nine.model)[n]) for n, a in weights(longer.model).items())
    assert all(a.equal(weights(five.model)[n]) for n, a in weights(tmp_path / "large-disk").items())


def test_a_third_segment_and_a_track(nine: RecoverResult, tmp_path: Path) -> None:
    longer = recover(resume=shutil.copytree(nine.out, tmp_path / "longer"), steps=10)
    assert longer.metrics[:9] == nine.metrics
    assert [s["from"] for s in longer.summary["segments"]] == [5, 9]
    assert track(longer.out)[-1]["stage"] in ("recovered", "training")
    assert recover(resume=longer.out).summary == longer.summary
    assert recover(resume=longer.out, steps=10).summary == longer.summary


def test_what_is_refused(five: RecoverResult, nine: RecoverResult, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 9 steps, and steps=7 would be fewer; steps can be raised"):
        recover(resume=nine.out, steps=7)
    copy = shutil.copytree(five.out, tmp_path / "copy")
    with pytest.raises(InputError, match=r"seed: 0 became 3"):
        recover(resume=copy, steps=9, seed=3)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match=r"checkpoints/step-000005 is not there \(it was removed\).*--student"):
        recover(resume=copy, steps=9)


def test_runs_without_a_schedule_or_checkpoints_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    done = recover(**{**recipe, "steps": 0})
    with pytest.raises(InputError, match="begun with steps: 0, so it has no schedule"):
        recover(resume=done.out, steps=4)
    done = recover(**{**recipe, "steps": 1, "final_learning_rate": 0, "out": str(tmp_path / "ends")})
    with pytest.raises(InputError, match=r"ends at learning rate 0 \(final_learning_rate\)"):
        recover(resume=done.out, steps=4)
    done = recover(**{**recipe, "steps": 1, "save_every": 0, "out": str(tmp_path / "other")})
    with pytest.raises(InputError, match=r"is not there \(save_every: 0 wrote none\)"):
        recover(resume=done.out, steps=4)


def test_a_run_that_patience_stopped_would_stop_again(five: RecoverResult, tmp_path: Path) -> None:
    copy = shutil.copytree(five.out, tmp_path / "copy")
    summary = json.loads((copy / SUMMARY).read_text())
    (copy / SUMMARY).write_text(json.dumps(signed({**summary, "steps": 4})))
    with pytest.raises(InputError, match="stopped at step 4 of 5, since patience"):
        recover(resume=copy, steps=9)


def test_by_the_command_line_and_by_a_recipe_with_more(
    five: RecoverResult, tmp_path: Path, run: Any, five_recipe: dict[str, Any]
) -> None:
    copy = shutil.copytree(five.out, tmp_path / "copy")
    code, _, err = run("recover", "--resume", copy, "--steps", 6)
    assert code == 0, err
    assert "1 more steps, to 6, at learning rate 0.0001, where the schedule ends" in err
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({**five_recipe, "steps": 7}))
    code, _, err = run("recover", tmp_path / "more.yaml", "--resume", copy)
    assert code == 0, err
    assert len([row for row in RunDirectory(copy).rows(METRICS) if "loss" in row]) == 7
    code, _, err = run("recover", "--resume", copy, "steps=2")
    assert code == 2
    assert "steps can be raised on a resumed run, not lowered" in err


def test_equal_segments_are_not_noted_twice(nine: RecoverResult) -> None:
    before = (nine.out / "manifest.json").read_text()
    directory = RunDirectory(nine.out)
    segments.note_segments(directory, segments.segments_of(directory))
    assert (nine.out / "manifest.json").read_text() == before
    assert_equal_runs(nine, recover(resume=nine.out))


def test_when_checkpoints_are_due() -> None:
    optimization = Optimization(5, 1.0, 2, ends=(9, 10))
    assert [step for step in range(1, 11) if optimization.saves_at(step, 2)] == [2, 4, 5, 7, 9, 10]
    assert not any(optimization.saves_at(step, 0) for step in range(1, 11))
    assert optimization.rate_at(5) == optimization.rate_at(9) == pytest.approx(0.1)
    assert Optimization(1, 1.0, 5, ends=(3,)).rate_at(3) == 0.1  # also where the warm-up was not over
