"""Where a run is to write: what is tried there, and what a killed process left of the trial."""

from __future__ import annotations

from pathlib import Path

from remend.files.run_directory import occupied
from remend.recovery.output_directory import unwritable


def test_what_a_killed_process_left_of_the_trial_occupies_nothing(tmp_path: Path) -> None:
    left = tmp_path / ".remend-tmp-probe-abc"
    left.mkdir()
    assert occupied(tmp_path) is None
    assert unwritable(str(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_above_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file" in str(unwritable(str(tmp_path / "file" / "run")))
