"""Rows of a benchmark that takes hours: each is kept in the repository as it ends, so that several sessions add up.

A row is one JSON file in docs/measurements/records/BENCHMARK/. It is not run again while the settings that it was made
with are the ones asked for.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from record import ROOT, commit, machine
from remend.files.atomic import write_json

RECORDS = ROOT / "docs" / "measurements" / "records"


def place(records: Path, *name: str) -> Path:
    """The file of a row: its name's parts, fit for a file."""
    return records / f"{'-'.join(part.replace(':', '-').replace(',', '').replace(' ', '-') for part in name)}.json"


def kept(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The row of `file`, where it is there and was made with these settings."""
    if not file.is_file():
        return None
    row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return row if row["settings"] == settings else None


def keep(file: Path, settings: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Write a row, with its settings, and where and when it was made; what was written."""
    threads = os.environ.get("OMP_NUM_THREADS")
    made = {
        "settings": settings,
        "commit": commit(),
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "machine": machine() + (f", OMP_NUM_THREADS={threads}" if threads else ""),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**row, **made})
    return {**row, **made}


def rows(records: Path) -> list[dict[str, Any]]:
    """All rows, by their files' names."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(records.glob("*.json"))]
