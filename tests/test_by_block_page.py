"""The table of memory by block says what the committed rows say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def by_block(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("by_block")


def row(verb: str, **changed: Any) -> dict[str, Any]:
    known = {"verb": verb, "size": "10m", "layers": 10, "seconds": 21.8, "tries": 1, "peak_mib": 4999}
    made = {"commit": "abcdef0", "date": "2026-11-30", "machine": "two cores"}
    return {**known, "written_mib": 46, "disk_peak_mib": 84, **made, **changed}


def test_the_page_is_current(by_block: Any) -> None:
    text = by_block.PAGE.read_text(encoding="utf-8")
    assert by_block.page(text, by_block.rows(by_block.ROWS)) == text, "python benchmarks/by_block.py --page"


def test_rows_stand_by_size_layers_and_verb(by_block: Any) -> None:
    rows = [row("recover", size="1.5b"), row("export"), row("degrade", layers=2), row("degrade", tries=2)]
    lines = by_block.table(rows).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:6]] == [
        ["| 10m", "2", "`degrade`"],
        ["| 10m", "10", "`degrade`"],
        ["| 10m", "10", "`export`"],
        ["| Qwen2.5-1.5B", "10", "`recover`"],
    ]
    assert "4,999" in lines[2]
    assert "22 in 2 tries" in lines[3]
    assert lines[-1] == "Measured on: two cores, 2026-11-30. Seed 0."


def test_what_stands_around_the_table_stays(by_block: Any) -> None:
    text = f"before\n{by_block.BEGINS}\n\nold\n\n{by_block.ENDS}\nafter\n"
    written = by_block.page(text, [row("export")])
    assert (written[:7], written[-7:]) == ("before\n", "\nafter\n")
    assert "old" not in written
    assert by_block.page(written, [row("export")]) == written
