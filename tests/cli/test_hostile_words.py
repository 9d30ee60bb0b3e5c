"""Errors of the system, and lines that never end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_an_error_of_the_system_is_one_message(run: Any) -> None:
    code, _, err = run("report", "x" * 300)
    assert code == 2
    assert err.startswith("error: " + "x" * 200 + " …: File name too long; give another path")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [["steps=" + "x" * 50_000], ["x" * 50_000 + "=1"], ["student=" + "[" * 50_000]])
def test_long_values_are_cut(words: list[str], run: Any, tmp_path: Path) -> None:
    code, _, err = run("check", "student=a", "teacher=b", f"out={tmp_path / 'o'}", *words)
    assert code == 2
    assert max(map(len, err.splitlines())) < 2200


def test_an_error_steers_no_terminal(run: Any) -> None:
    code, _, err = run("check", "a\x1b[31mb.yaml")
    assert code == 2
    assert "a?[31mb.yaml can't be read" in err
