"""Which step is kept, and when training stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from remend.errors import FileError
from remend.files.run_directory import RunDirectory
from remend.recovery.selection import Best, Selection, score
from remend.training.constraints import Free


def test_the_rule_by_hand() -> None:
    before, now = {"recover": 2.0, "keep": 0.0}, {"recover": 0.5, "keep": 0.1}
    assert score(before, now, {"recover": 1.0, "keep": 0.5}) == pytest.approx((0.75 - 0.5 * 0.1) / 1.5)


def selection(path: Path, model: nn.Module, patience: int | None = None) -> Selection:
    return Selection(RunDirectory.create(path), Free(model), keep=True, patience=patience)


def test_the_best_weights_come_back(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    made = selection(tmp_path / "run", model)
    for step, value in enumerate((0.2, 0.7, 0.7, 0.1), start=1):
        with torch.no_grad():
            model.weight.fill_(step)
        made.seen(step, value)
    assert made.restore() == {"step": 2, "score": 0.7}
    assert model.weight.tolist() == [[2.0, 2.0]]


def test_patience(tmp_path: Path) -> None:
    made = selection(tmp_path / "run", nn.Linear(2, 1), patience=2)
    stops = []
    for step, value in enumerate((0.2, 0.7, 0.6, 0.65, 0.9), start=1):
        made.seen(step, value)
        stops.append(made.stop())
    assert stops == [False, False, False, True, False]


def test_a_record_of_the_best_step_that_changed_is_told(tmp_path: Path) -> None:
    made = selection(tmp_path / "run", nn.Linear(2, 1))
    made.seen(3, 0.5)
    assert Best.read(made.directory) == Best(3, 0.5)
    record = made.directory.path / "best" / "best.json"
    record.write_text(record.read_text().replace("0.5", "0.6"))
    with pytest.raises(FileError, match=r"best\.json changed since it was written"):
        Best.read(made.directory)
