"""The demo on a tiny model: repaired, trained, and beside it the same student by training alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import remend
from remend.files.reading import read_object
from remend.studies import demo


def test_compare_runs_training_alone_on_the_same_student(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"max_new_tokens": 4, "batch_size": 2}
    monkeypatch.setattr(demo, "HELD_OUT", 4)
    monkeypatch.setattr(demo, "RECOVERY", {**demo.RECOVERY, **small, "repair_samples": 8, "warmup_steps": 0})
    monkeypatch.setattr(demo, "PLAIN", {**demo.PLAIN, **small, "steps": 1, "warmup_steps": 0})
    result = remend.demo(tmp_path / "d", model=str(reference_dir), steps=1, compare=True)
    plain = tmp_path / "d" / demo.PLAIN_RUN
    ours, theirs = read_object(result.out / "manifest.json"), read_object(plain / "manifest.json")
    assert (result.out / "repair.json").is_file()
    assert not (plain / "repair.json").exists()
    assert ours["models"] == theirs["models"]
    assert ours["data"] == theirs["data"]
    assert (tmp_path / "d" / demo.COMPARISON / "report.html").is_file()
