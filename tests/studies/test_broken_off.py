"""What a study's process leaves that was ended in the midst is made anew in its place, and nothing else is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from remend.studies import made
from remend.studies.cell import state_of
from remend.studies.made import is_made, make_student


@pytest.fixture(autouse=True)
def degrading(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Stands for a degradation; it ends with what is in the list."""
    ends: list[BaseException] = []

    def degrade(kind: str, model: str, out: Path, arguments: Mapping[str, object]) -> None:
        out.mkdir()
        (out / "made").write_text(kind)
        if ends:
            raise ends.pop()

    monkeypatch.setattr(made, "degrade", degrade)
    return ends


def test_a_student_whose_making_was_broken_off_is_made_again(tmp_path: Path, degrading: list[BaseException]) -> None:
    student = tmp_path / "int3"
    degrading.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_student("model", str(student), "quantize", {}, {"bits": 3})
    assert student.is_dir()
    assert not is_made(student, {"bits": 3})
    make_student("model", str(student), "quantize", {}, {"bits": 3})
    assert is_made(student, {"bits": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int3", "int3.json"]


def test_a_student_of_other_inputs_or_of_nobody_is_moved_aside(tmp_path: Path) -> None:
    student = tmp_path / "int3"
    make_student("model", str(student), "quantize", {}, {"bits": 3})
    make_student("model", str(student), "prune", {}, {"bits": 4})
    assert ((tmp_path / "int3.aside-1" / "made").read_text(), (student / "made").read_text()) == ("quantize", "prune")
    (tmp_path / "int3.json").unlink()
    make_student("model", str(student), "quantize", {}, {"bits": 3})
    assert (tmp_path / "int3.aside-2" / "made").read_text() == "prune"


def test_a_cell_that_only_began_to_be_written_is_new(tmp_path: Path) -> None:
    cell = tmp_path / "0"
    assert state_of(cell, {}) == "new"
    (cell / "inputs").mkdir(parents=True)
    (cell / "inputs" / ".remend-tmp-cell.json-abc").write_text("{")
    assert state_of(cell, {}) == "new"
    (cell / "notes.txt").write_text("the user's own")
    assert state_of(cell, {}) == "stale"
