"""What a run has logged, as a checkpoint knows it: files that are written once, or only grow.

A checkpoint holds the weights; the figures of the steps before it lie in files beside. With their SHA-256 in the
checkpoint, a run does not go on with figures that changed on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

REFERENCE = "reference.jsonl"
"""What the reference says to the held-out prompts; it can be asked again."""
NAMES = (
    *("metrics.jsonl", "gate.jsonl", "baseline.json", "streams-baseline.json", "repair.json", REFERENCE),
    *("held_out_repaired.jsonl", "repair-answers.jsonl", "off-policy-*.jsonl"),
)
"""Below a run's directory. Not track.jsonl, whose rows may be put in another order, nor what a clock says."""


def logged(directory: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of what is there, by name."""
    files = sorted({path for name in NAMES for path in directory.glob(name) if path.is_file()})
    sizes = {path.name: path.stat().st_size for path in files}
    return {name: {"bytes": size, "sha256": _digest(directory / name, size)} for name, size in sizes.items()}


def changed(directory: Path, recorded: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """The names of files that do not begin with what was there any more."""
    return [name for name, was in recorded.items() if _digest(directory / name, was["bytes"]) != was["sha256"]]


def understandable(recorded: object) -> bool:
    """Whether this is what `logged` gives: names of such files, each with bytes and SHA-256."""
    return isinstance(recorded, Mapping) and all(
        any(fnmatchcase(str(name), known) for known in NAMES)
        and "/" not in name
        and isinstance(was, Mapping)
        and isinstance(was.get("bytes"), int)
        and isinstance(was.get("sha256"), str)
        for name, was in recorded.items()
    )


def _digest(path: Path, size: int) -> str | None:
    """SHA-256 of the first `size` bytes; None where it has fewer, or can't be read. No bytes need no file."""
    if not size:
        return hashlib.sha256().hexdigest()
    try:
        if not path.is_file() or path.stat().st_size < size:
            return None
        with path.open("rb") as stream:
            return hashlib.sha256(stream.read(size)).hexdigest()
    except OSError:
        return None
