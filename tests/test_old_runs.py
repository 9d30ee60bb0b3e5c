"""Runs that version 13d6498 wrote, one complete and one killed after its first checkpoint, are still taken.

`python benchmarks/golden.py --old 13d6498 --fixture DIRECTORY` made them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import remend
from helpers.golden import assert_same, figures
from remend.report import report

FIXTURE = Path(__file__).parent / "fixtures" / "run-13d6498"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the fixture as the working directory, and one thread, as they had when they were made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(shutil.copytree(FIXTURE, tmp_path / "copy"))
    yield tmp_path / "copy"
    torch.set_num_threads(threads)


def test_a_killed_run_ends_as_the_complete_one() -> None:
    result = remend.recover(resume="killed")
    assert_same(figures(result.out), figures(Path("complete")), json.loads(Path("cpu.json").read_text()))


def test_a_complete_run_is_complete() -> None:
    before = {path: path.read_bytes() for path in Path("complete").rglob("*") if path.is_file()}
    assert remend.recover(resume="complete").summary["selected"]["step"] == 6
    assert {path: path.read_bytes() for path in Path("complete").rglob("*") if path.is_file()} == before


def test_its_report_says_the_same() -> None:
    """The tables of the gap have other rows and columns since; every figure of a model is still there."""
    page = Path("complete/report.md")
    before = _tables(page)
    page.unlink()
    report(["complete"])
    after = _tables(page)
    assert len(before) > 20
    columns = next(i for i, row in enumerate(before) if row[0] == "on held-out prompts")
    labels = {row[0]: row[1:] for row in after}
    for label, degraded, recovered, _, gap in before[columns + 3 : columns + 7]:
        cells = " ".join(labels[label]).split()
        assert {degraded, recovered, gap} <= {*cells, "–"}
    assert [row for row in before[columns + 7 :] if row not in after] == []


def _tables(page: Path) -> list[list[str]]:
    text = page.read_text(encoding="utf-8").replace("nats a token", "nats per token")  # as it read then
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_it_is_exported() -> None:
    done = remend.export("complete", "exported", format="dense")
    assert done["container"] == "dense"
    ours, theirs = (load_file(Path(name) / "model.safetensors") for name in ("exported", "complete/model"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_it_is_evaluated() -> None:
    done = remend.evaluate("complete", ["science"], "grades.json", data="letters.jsonl", how="choices", device="cpu")
    assert done["n"] == len(done["items"]) == 12
    assert "grid.safetensors" in done["files"]
