"""Answers are kept as they come, by one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from remend.errors import InputError
from remend.evaluation.generation import open_answers


def test_one_process_at_a_time_adds_answers(tmp_path: Path) -> None:
    first = open_answers(tmp_path / "a.answers.jsonl")
    first.add([{"key": "k"}])
    with pytest.raises(InputError, match="another process adds to"):
        open_answers(tmp_path / "a.answers.jsonl")
    del first
    assert "k" in open_answers(tmp_path / "a.answers.jsonl")
