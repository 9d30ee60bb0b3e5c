"""`steps: auto`: training after a repair ends where it wins nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from helpers.recovering import assert_equal_runs, torn_copy
from helpers.task_rows import write
from helpers.tiny import prompts, small_recipe
from remend.errors import InputError
from remend.files.run_directory import METRICS, RunDirectory
from remend.models.sampling.rollout import Rollout
from remend.recovery import plateau
from remend.recovery.job import check, recover, settings
from remend.recovery.plateau import Plateau
from remend.recovery.selection import Best, Selection

ANSWER = Rollout("a", (1, 2), (3,), False)


def seen(*kls: float) -> Plateau:
    selection = Selection(RunDirectory(Path()), cast(Any, None), keep=False, patience=None)
    return Plateau(cast(Any, None), cast(Any, None), [ANSWER] * 12, [*kls], selection)


def test_nothing_is_trained_where_repair_came_close() -> None:
    near = seen(0.08)
    assert near.stop()
    assert "nothing is trained: on 12 training prompts set apart repair left 0.080" in near.why


@pytest.mark.parametrize("kls", [[0.5], [0.5, 0.5], [0.5, 0.48, 0.47], [0.5, 0.51, 0.49], [0.5, 0.5, 0.5, 0.4]])
def test_training_goes_on_while_it_wins(kls: list[float]) -> None:
    going = seen(*kls)
    assert not going.stop()
    assert going.why == ""


@pytest.mark.parametrize(("kls", "step"), [([0.5, 0.5, 0.498], 16), ([0.5, 0.4, 0.399, 0.41], 24)])
def test_training_ends_at_a_plateau(kls: list[float], step: int) -> None:
    flat = seen(*kls)
    assert flat.stop()
    assert f"training ends at step {step}" in flat.why


@pytest.fixture
def many(student_dir: Path, reference_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of a student on a grid with prompts enough to set some apart; `steps` is left out."""
    write(tmp_path / "many.jsonl", [{"prompt": p} for p in prompts(80)])
    recipe = small_recipe(student_dir, reference_dir, tmp_path / "many.jsonl", tmp_path / "run")
    return {**recipe, "repair": True, "repair_samples": 16, "steps": "auto", "save_every": 4, "warmup_steps": 1}


def test_a_run_that_repair_brought_close(many: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plateau, "CLOSE", 100.0)
    result = recover(**many)
    assert (result.summary["steps"], result.metrics) == (0, [])
    assert result.summary["recovered"]["kl"] == pytest.approx(result.summary["repair"]["kl"])
    assert result.summary["ended"]["prompts"] == 9
    page = result.report.read_text(encoding="utf-8")
    assert "By steps: auto, nothing is trained" in page
    assert "Repair took" in page
    with pytest.raises(InputError, match="steps: auto saw nothing to win"):
        recover(resume=result.out, steps=60)


def test_a_run_that_ends_at_a_plateau_and_resumes(
    many: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plateau, "EVERY", 2)
    monkeypatch.setattr(plateau, "CLOSE", 0.0)
    monkeypatch.setattr(plateau, "GAIN", 0.9)  # no two looks win so much
    result = recover(**many)
    assert result.summary["steps"] == 4
    assert "training ends at step 4" in result.summary["ended"]["why"]
    looks = [row["step"] for row in RunDirectory(result.out).rows(METRICS) if plateau.APART in row]
    assert looks == [0, 2, 4]
    trained = {row["id"] for row in RunDirectory(result.out).rows("repair-answers.jsonl")}
    assert not trained & {row["id"] for row in RunDirectory(result.out).rows("apart.jsonl")}
    assert_equal_runs(result, recover(resume=torn_copy(result.out, tmp_path / "torn", 4)))


def test_training_that_makes_it_worse_is_undone(many: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plateau, "EVERY", 2)
    monkeypatch.setattr(plateau, "CLOSE", 0.0)
    worse = {**many, "learning_rate": 0.3, "warmup_steps": 0}
    result = recover(**worse)
    assert result.summary["selected"]["step"] == 0
    assert "; the weights of the repair are kept, which are the best there" in result.summary["ended"]["why"]
    assert result.summary["recovered"]["kl"] == pytest.approx(result.summary["repair"]["kl"], rel=1e-4)
    last = recover(**{**worse, "select": "last", "out": str(result.out.with_name("last"))})
    assert last.summary["selected"]["step"] == last.summary["steps"] == 4
    assert last.summary["recovered"]["kl"] > 2 * last.summary["repair"]["kl"]


def test_a_look_that_is_not_the_last_is_named() -> None:
    flat = seen(0.5, 0.4, 0.41, 0.42)
    flat.selection.best = Best(8, -0.4)
    assert flat.stop()
    assert flat.why.endswith("; the weights of step 8 are kept, which are the best there")


def test_steps_are_a_number_or_auto() -> None:
    given = {"student": "s", "teacher": "t", "data": "d", "out": "o"}
    assert settings(overrides=given).model_dump()["steps"] == "auto"
    assert settings(overrides={**given, "steps": "auto"}).steps == 40
    assert settings(overrides={**given, "steps": 12}).model_dump()["steps"] == 12
    for wrong in (-1, "many", True, 1.5, 10**30):
        with pytest.raises(InputError, match="a number of steps from 0 to 1000000, or auto"):
            settings(overrides={**given, "steps": wrong})


def test_a_sentence_has_the_number_of_steps(many: dict[str, Any]) -> None:
    checked = check(**{**many, "bootstrap": "on", "bootstrap_steps": 60})
    assert any("bootstrap_steps 60 is above steps 40" in problem for problem in checked.problems)
