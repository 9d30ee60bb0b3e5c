"""The pages of measurements that are written from committed rows say what these rows say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["after_repair"])
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module(request.param)


def test_the_page_is_current(benchmark: Any) -> None:
    text = benchmark.PAGE.read_text(encoding="utf-8")
    records = benchmark.RECORDS / benchmark.PAGE.stem
    assert benchmark.page(records) == text, f"python benchmarks/{benchmark.__name__}.py --page"
    for row in benchmark.rows(records):
        assert row["commit"][:7] in text


def test_a_cell_that_is_worse_after_repair_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    architectures = import_module("architectures")
    cell = {
        "architecture": "gemma3",
        "damage": "2:4",
        "degraded": 0.5,
        "repaired": 0.6,
        "kept": False,
        "held_back": [0],
        "recovered": 0.4,
        "won_by_repair": [-0.3, -0.1],
        "gap_closed": 0.2,
        "gap_closed_95": [0.1, 0.3],
    }
    assert "by more than the interval: gemma3 2:4." in architectures.table([cell])
    assert "Median gap closed on the rest: 0.20 (1 cells)." in architectures.table([cell])
    even = {**cell, "won_by_repair": [-0.3, 0.1]}
    assert "by more than the interval: none." in architectures.table([even])
