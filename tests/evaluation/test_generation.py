"""Answers are kept as they come, by one process at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remend.errors import FileError, InputError
from remend.evaluation.generation import open_answers


def test_one_process_at_a_time_adds_answers(tmp_path: Path) -> None:
    first = open_answers(tmp_path / "a.answers.jsonl")
    first.add([{"key": "k"}])
    with pytest.raises(InputError, match="another process adds to"):
        open_answers(tmp_path / "a.answers.jsonl")
    del first
    assert "k" in open_answers(tmp_path / "a.answers.jsonl")


LETTERS = {"key": "l", "log_likelihoods": {"A": -1.5, "B": -2.5}}
WORDS = {"key": "w", "answer": "It is wet.", "tokens": 4, "clipped": False}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "a.answers.jsonl"
    open_answers(path).add([LETTERS, WORDS])
    return path


def test_lines_are_given_back_as_they_were_added(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = open_answers(kept)
    assert (answers["l"], answers["w"]) == (LETTERS, WORDS)
    assert not capsys.readouterr().err


def test_a_line_that_changed_is_refused(kept: Path) -> None:
    kept.write_text(kept.read_text().replace("-1.5", "-1.25"))
    with pytest.raises(FileError, match=r"the line of l changed since it was written\. Move that file away"):
        open_answers(kept)


def test_a_line_whose_signature_was_taken_away_is_refused(kept: Path) -> None:
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    del lines[0]["sha256"]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FileError, match=r"some lines of .* changed since"):
        open_answers(kept)


def test_lines_of_older_versions_are_taken_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.answers.jsonl").write_text(json.dumps(WORDS) + "\n")
    assert open_answers(tmp_path / "a.answers.jsonl")["w"] == WORDS
    assert "carry no signatures" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        {"answer": "no key"},
        {"key": ["k"]},
        {**WORDS, "tokens": "4"},
        {**WORDS, "answer": None},
        {**LETTERS, "log_likelihoods": [1, 2]},
        {**LETTERS, "log_likelihoods": {"A": "x"}},
        {"key": "p", "parts": {}},
    ],
)
def test_a_line_of_another_shape_is_one_message(tmp_path: Path, line: dict[str, Any]) -> None:
    (tmp_path / "a.answers.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(FileError, match=r"can't be used: .*\. Move that file away to begin anew"):
        open_answers(tmp_path / "a.answers.jsonl")


def test_answers_are_never_added_through_a_link(kept: Path, tmp_path: Path) -> None:
    link = tmp_path / "b.answers.jsonl"
    link.symlink_to(kept)
    before = kept.read_bytes()
    with pytest.raises(FileError, match="is a link, or no plain file"):
        open_answers(link)
    assert kept.read_bytes() == before
