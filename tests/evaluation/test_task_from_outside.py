"""A task from outside the package is listed, written, evaluated, trained on and studied like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import remend
from remend.data.examples import Row
from remend.data.tasks.task import TASKS, Draw, Grade, Mode, Task
from remend.errors import InputError
from remend.studies.plan import read_study

WORDS = {"train": ("tea", "rain"), "held_out": ("maps", "cats")}


def make(draw: Draw) -> dict[str, Any]:
    said = f"{draw.turn(WORDS[draw.split], 'word')} {draw.index}"
    return {"prompt": f"Shout {said}.", "demonstration": f"{said.upper()}!", "answer": said.upper()}


def grade(response: str, row: Row, mode: Mode) -> Grade:
    said = response if mode == "paper" else response.strip().rstrip("!")
    return Grade(said == row["answer"], "correct" if said == row["answer"] else f"said {said!r}")


TASKS.register("shout", source="this test")(
    Task("shout", "say it in capitals", make, grade, columns=("prompt", "answer"), max_new_tokens=5, graded_rows=6)
)

STUDY = """
model: tiny
degradations: {int2: {kind: quantize, format: int2-g64-sym}}
methods: {none: none, sdft: on-policy}
tasks: {shout: {rows: 4, options: {grader: robust}}}
seeds: [0]
budget: {tokens: 64}
"""


def test_it_makes_and_grades_rows(tmp_path: Path) -> None:
    assert "shout" in remend.tasks.names()
    path = remend.tasks.write("shout", tmp_path / "rows.jsonl", split="train", n=4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [row["demonstration"] for row in rows]
    scores = {
        mode: remend.tasks.score(remend.tasks.get("shout"), rows, answers, mode=mode) for mode in ("paper", "robust")
    }
    assert (scores["paper"]["score"], scores["robust"]["score"]) == (0.0, 1.0)


def test_it_is_evaluated(reference_dir: Path, tmp_path: Path) -> None:
    results = remend.evaluate(str(reference_dir), ["shout"], tmp_path / "r.json", device="cpu")
    assert (results["task"], results["n"]) == ("shout", 6)
    assert results["settings"]["answers"]["shout"]["max_new_tokens"] == 5
    assert all(item["reason"].startswith("said ") for item in results["items"])
    with pytest.raises(InputError, match="task shout is no choice between letters"):
        remend.evaluate(str(reference_dir), ["shout"], tmp_path / "l.json", how="choices")


def test_a_recipes_stream_and_a_study_take_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    def streamed(rows: Path) -> dict[str, Any]:
        stream = {"teacher": "ema", "data": str(rows), "demonstrations": True, "held_out": 2, "task": "shout"}
        return {
            **recipe,
            "out": str(tmp_path / rows.stem),
            "steps": 2,
            "streams": {"keep": stream},
            "bootstrap": "auto",
        }

    whole = remend.tasks.write("shout", tmp_path / "whole.jsonl", split="train", n=8)
    result = remend.recover(**streamed(whole))
    assert "score_gain" in "".join((result.out / "gate.jsonl").read_text())
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(f'{{"prompt": "Shout {i}.", "demonstration": "x"}}\n' for i in range(8)))
    (problem,) = remend.check(**streamed(bare)).problems
    assert "task shout of keep, " in problem
    assert 'the column "answer" is missing' in problem
    (tmp_path / "study.yaml").write_text(STUDY)
    assert set(read_study(tmp_path / "study.yaml").tasks) == {"shout"}
