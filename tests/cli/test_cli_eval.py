"""remend eval on the command line: scores and what qualifies them are shown, and what can't be is exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.task_rows import letter_rows, tool_rows, write


@pytest.fixture
def evaluate(run: Any, reference_dir: Path) -> Any:
    return lambda *words: run("eval", reference_dir, *words, "--device", "cpu")


def test_scores_are_shown_with_their_intervals(evaluate: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", tool_rows(6))
    words = ("--task", "tooluse", "--data", data, "--max-new-tokens", 6, "--grader", "both")
    code, out, _ = evaluate(*words, "--out", tmp_path / "r.json")
    assert code == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert "95% interval (Wilson)" in out
    for part in found["results"]:
        low, high = part["interval_95"]
        row = next(line for line in out.splitlines() if part["grader"] in line and "tooluse" in line)
        assert f"{part['score']:.1%}" in row
        assert f"{low:.1%} to {high:.1%}" in row
        assert (f"{part['clipped']} clipped" in row) == bool(part["clipped"])
    assert f"remend compare ANOTHER_MODEL.json {tmp_path / 'r.json'}" in out
    code, out, _ = evaluate(*words, "--out", tmp_path / "s.json")
    assert code == 0
    assert f"remend compare {tmp_path / 'r.json'} {tmp_path / 's.json'}" in out


def test_letters_are_shown_against_chance_and_samples_with_pass_at_k(evaluate: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "q.jsonl", letter_rows(8))
    code, out, _ = evaluate("--task", "science", "--data", data, "--how", "choices", "--out", tmp_path / "l.json")
    assert code == 0
    assert "letter log-likelihood" in out
    assert "chance (25.0%; its letters at random" in " ".join(out.split())
    words = ("--task", "science", "--data", data, "--samples", 2, "--max-new-tokens", 4)
    code, out, _ = evaluate(*words, "--out", tmp_path / "s.json")
    assert code == 0
    assert "pass@1" in out
    assert "pass@2" in out


def test_what_cannot_be_evaluated_is_exit_code_2(evaluate: Any, tmp_path: Path) -> None:
    data, out = write(tmp_path / "t.jsonl", tool_rows(3)), tmp_path / "r.json"
    for words, message in (
        (("--task", "tooluze", "--data", data), 'unknown task "tooluze"; known: general, '),
        (("--task", "science", "--data", data), 'the column "answer" is missing'),
        (("--task", "tooluse", "--data", tmp_path / "none.jsonl"), "can't be read"),
        (("--task", "tooluse", "--data", data, "--data", data), "need the task before each"),
    ):
        code, said, err = evaluate(*words, "--out", out)
        assert (code, said) == (2, "")
        assert "\nerror: " in "\n" + err
        assert message in err
        assert not out.exists()


def test_a_grader_that_raises_is_exit_code_2_with_results_written(evaluate: Any, tmp_path: Path) -> None:
    rows = [
        *tool_rows(3),
        *({**row, "golden_answer": "none", "id": f"odd-{i}"} for i, row in enumerate(tool_rows(5)[3:])),
    ]
    data, out = write(tmp_path / "t.jsonl", rows), tmp_path / "r.json"
    words = ("--task", "tooluse", "--data", data, "--max-new-tokens", 4, "--out", out)
    code, said, err = evaluate(*words)
    assert code == 2
    assert "2 raised" in said
    assert "error: tooluse: the paper grader raised on 2 of 5 answers, which count as wrong; rows odd-0, odd-1;" in err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["n"], found["raised"]) == (5, 2)
    assert evaluate(*words)[0] == 2  # the finished file says so too
