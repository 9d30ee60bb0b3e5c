"""A repair is fitted to text that the user gives, and what is said of a file that can't be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import prompts
from remend.errors import CheckError, InputError
from remend.recovery.job import check, recover

ROWS = [{"prompt": f"Say {p}", "completion": p} for p in prompts(20)]
UNANSWERED = [{"prompt": p} for p in prompts(20)]
LONG = [{"prompt": p, "completion": 300 * p} for p in prompts(20)]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def repaired(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A repair alone, on 16 rows of a file."""
    text = written(tmp_path / "text.jsonl", ROWS)
    return {**recipe, "repair": True, "steps": 0, "repair_samples": 16, "repair_text": text}


def test_the_teacher_writes_nothing_where_text_is_given(
    repaired: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remend.recovery.repair.completions", lambda *a, **k: pytest.fail("the teacher was asked"))
    run = recover(**repaired)
    manifest = json.loads((run.out / "manifest.json").read_text())
    assert manifest["repair_answers"] == 16
    assert manifest["recipe"]["repair_text"] == repaired["repair_text"]
    assert run.summary["repair"]["kept"]
    (run.out / "summary.json").unlink()
    written(Path(repaired["repair_text"]), ROWS[1:])
    with pytest.raises(InputError, match="the files of repair_text changed since the run"):
        recover(resume=run.out)


def test_plain_texts_are_taken_and_held_out_prompts_are_left_out(repaired: dict[str, Any], tmp_path: Path) -> None:
    plain = check(**{**repaired, "repair_text": [{"text": f"{p} and {p}"} for p in prompts(16)]}).plan
    assert plain is not None
    assert plain.repair_text is not None
    assert len(plain.repair_text.rows) == plain.repair_answers == 16
    measured = written(tmp_path / "measured.jsonl", ROWS[:3])
    checked = check(**{**repaired, "eval_data": measured, "held_out": None})
    assert checked.plan is not None
    assert any("3 rows have prompts that are held out, and are left out" in said for said in checked.warnings)


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        (UNANSWERED, {}, r"can't be used as calibration text: .*:1, .*: the row has no completion"),
        ([{"image": "a.png"}], {}, r"can't be used as calibration text: .*:1: the row has no \"prompt\""),
        (ROWS[:5], {}, "5 rows are left, and repair is fitted to 16; give more, or set repair_samples to 5"),
        (ROWS[:5], {"repair_samples": None}, "repair is fitted to [46]00; give more, or set repair_samples to 5"),
        (LONG, {}, "20 of 20 rows have over max_prompt_tokens = .*0 rows are left, .* give more$"),
        (ROWS, {"repair_text": "self"}, "repair_text self: it is a file of rows"),
        (ROWS, {"repair_text": "nowhere.jsonl"}, "repair_text nowhere.jsonl can't be used"),
        (ROWS, {"bootstrap": "repair", "steps": 2}, "trains on answers of the teacher, and repair_text"),
    ],
)
def test_text_that_can_not_be_used_is_refused_by_name(
    repaired: dict[str, Any], rows: list[dict[str, Any]], more: dict[str, Any], said: str
) -> None:
    written(Path(repaired["repair_text"]), rows)
    with pytest.raises(CheckError, match=said):
        recover(**{**repaired, **more})
    assert not Path(repaired["out"]).exists()


def test_text_without_a_repair_has_no_effect_and_says_so(repaired: dict[str, Any]) -> None:
    said = check(**{**repaired, "repair": False}).warnings
    assert "repair_text has no effect, since the student is not repaired" in said
