"""The campaign's record, and the page that is written from it.

python tests/campaign/reliability.py          (the campaign calls it with --record; a test says when it is out of date)
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "measurements"
RECORD, PAGE = FOLDER / "campaign.jsonl", FOLDER / "reliability.md"

WHAT = {
    "kills": "killed by SIGKILL, at a random time or at the n-th file operation, and given again: equal bit for bit",
    "powercuts": "the power cut on a small ext4: at most `save_every` steps lost, and the end equal bit for bit",
    "flips": "one bit flipped in a file, and the command that reads it: found, or the result is equal",
    "fuzz": "damaged and hostile inputs: one message or an answer, within ten seconds",
    "writers": "two processes with one `out`: one writes, and the result is equal",
    "disk": "full, or read-only, in the middle: one message, and equal once there is room",
    "signals": "SIGTERM and Ctrl-C at any moment: what is left is what the message says",
}
HEAD = """# Crashes, damage, hostile input

<!-- Written by tests/campaign/reliability.py from campaign.jsonl. -->

`make campaign MINUTES=30 SEED=0` disturbs remend on a tiny model in every way that follows, and adds a row here.
`tests/campaign/` says what is done and what counts as having fallen short. The sums are over all rows, whichever their
commit; what fell short at an older commit may be mended since, and the rows tell that.

"""


@dataclass(frozen=True)
class Row:
    """One run of the campaign."""

    date: str
    commit: str
    machine: str
    seed: int
    minutes: float
    parts: dict[str, dict[str, Any]]
    """Of each part `tried` (a count by kind), `fell_short`, and perhaps `skipped` with the reason."""

    def add(self) -> None:
        """Into the record."""
        with RECORD.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dataclasses.asdict(self)) + "\n")


def rows() -> list[Row]:
    """The record."""
    if not RECORD.is_file():
        return []
    return [Row(**json.loads(line)) for line in RECORD.read_text(encoding="utf-8").splitlines()]


def page(record: Sequence[Row]) -> str:
    """The page as Markdown."""
    lines = ["## In all", "", "| part | what | tried | fell short |", "| --- | --- | --- | --- |"]
    for part, what in WHAT.items():
        own = [row.parts[part] for row in record if part in row.parts]
        tried = sum(sum(one["tried"].values()) for one in own)
        lines.append(f"| {part} | {what} | {tried:,} | {sum(one['fell_short'] for one in own)} |")
    for part in WHAT:
        kinds: collections.Counter[str] = collections.Counter()
        for row in record:
            kinds.update(row.parts.get(part, {}).get("tried", {}))
        if kinds:
            lines += ["", f"## {part}", "", "| what | tried |", "| --- | --- |"]
            lines += [f"| {kind} | {count:,} |" for kind, count in sorted(kinds.items())]
    lines += ["", "## The runs", "", "| date | commit | seed | minutes | machine | tried | fell short | skipped |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in record:
        tried = sum(sum(part["tried"].values()) for part in row.parts.values())
        short = {name: part["fell_short"] for name, part in row.parts.items() if part["fell_short"]}
        told = ", ".join(f"{name} {count}" for name, count in short.items()) or "0"
        skipped = "; ".join(f"{name}: {part['skipped']}" for name, part in row.parts.items() if "skipped" in part)
        cells = (row.date, row.commit, row.seed, row.minutes, row.machine, f"{tried:,}", told, skipped)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return HEAD + "\n".join(lines) + "\n"


def write_page() -> None:
    """Write it."""
    PAGE.write_text(page(rows()), encoding="utf-8")


if __name__ == "__main__":
    write_page()
