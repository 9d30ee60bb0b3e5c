"""The model that a study trains itself: its rows are split, and it is made once."""

from __future__ import annotations

from pathlib import Path

from remend.data.examples import load_examples
from remend.data.tasks import form
from remend.studies import tiny_model


def test_held_out_rows_are_asked_nowhere_else() -> None:
    for rows in (tiny_model.general_rows, tiny_model.task_rows):
        train, held_out = ({row["prompt"] for row in rows(side)} for side in (False, True))
        assert not train & held_out
        assert 0.05 < len(held_out) / len(train) < 0.2
    known, new = (tiny_model.task_rows(False, known=side) for side in (True, False))
    assert len(known) + len(new) == len(tiny_model.task_rows(False))
    for row in known[:3]:
        form("science").check(row, "row")


def test_it_is_made_once(tmp_path: Path) -> None:
    made = tiny_model.make(tmp_path / "tiny", steps=2)
    assert len(load_examples(made["held_out"])) == len(tiny_model.general_rows(True))
    weights = Path(made["model"]) / "model.safetensors"
    first = weights.stat().st_mtime_ns
    assert tiny_model.make(tmp_path / "tiny", steps=2) == made
    assert weights.stat().st_mtime_ns == first
