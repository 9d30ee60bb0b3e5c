"""Is a model that remend wrote still what remend wrote?

SHA-256 of its files stands in what is written beside it: degradation.json, export.json, or the summary of the run whose
model it is. The first two hold their own too. Files that are not recorded there (notes, a card) are no matter.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

from remend.console import warn
from remend.errors import FileError
from remend.files.atomic import JsonObject
from remend.files.hashes import hash_directory, hash_file
from remend.files.reading import read_object
from remend.files.run_directory import SUMMARY
from remend.files.signed import SIGNATURE, as_signed

RECORD = "degradation.json"
"""Beside a degraded model: how it was damaged."""
EXPORT_FILE = "export.json"
"""Beside an exported model: what was written, and how that was checked."""
MODEL = "model"
"""In a run: the recovered model."""
FILES = "files"
"""The key of the hashes, by name."""


def hashes_of(directory: Path) -> dict[str, str]:
    """SHA-256 of what lies in a model's directory, but for the cards and the records that it belongs into."""
    every = hash_directory(directory)
    return {n: digest for n, digest in every.items() if n not in (RECORD, EXPORT_FILE) and not n.endswith(".md")}


def recorded(directory: Path) -> Mapping[str, str] | None:
    """The hashes that were recorded when remend wrote a directory; None where there are none."""
    summary = directory.parent / SUMMARY if directory.name == MODEL else None
    if summary and summary.is_file():
        saved = read_object(summary).get("saved")
        files = saved.get(FILES) if isinstance(saved, dict) else None
        return files if isinstance(files, dict) else None
    for name in (EXPORT_FILE, RECORD):
        if (directory / name).is_file():
            record = read_object(directory / name)
            if isinstance(record.get(FILES), dict):
                return dict(record[FILES])
    return None


def changed(directory: Path) -> list[str]:
    """The names of files that are missing or have another content than was recorded, and of records that changed."""
    names = [name for name, digest in (recorded(directory) or {}).items() if _digest(directory / name) != digest]
    return names + [path.name for path in _records(directory) if not as_signed(_record(path))]


def _records(directory: Path) -> list[Path]:
    """The files that say what a model's directory holds: beside its weights, and of a run its summary."""
    of_run = [directory.parent / SUMMARY] if directory.name == MODEL else []
    return [path for path in (*of_run, directory / EXPORT_FILE, directory / RECORD) if path.is_file()]


def _record(path: Path) -> JsonObject:
    return read_object(path) if path.is_file() else {}


def require_as_written(directory: Path) -> None:
    """Raise FileError where a file of a model that remend wrote changed since then."""
    names = changed(directory)
    of_run = directory.name == MODEL and (directory.parent / SUMMARY).is_file()
    if not names:
        _warn_without_hashes(directory, of_run)
        return
    again = (
        f"move {directory} aside and give remend recover --resume {directory.parent}, which writes it again from the "
        "last checkpoint"
        if of_run
        else "copy it again, or make it again with the command that made it"
    )
    present = _records(directory)
    holder = present[0]
    records = [path for path in present if path.name in names]
    keys = [] if len(records) == len(names) else [f'"{FILES}" from {holder}']
    keys += [f'"{SIGNATURE}" from {p}' for p in present if p in records or (keys and p == holder)]
    raise FileError(
        f"{' and '.join(names[:5])} of {directory} changed or can't be read since remend wrote it: {again}. If you "
        f"changed it yourself and mean it, remove {' and '.join(keys)}"
    )


@cache
def _warn_without_hashes(directory: Path, of_run: bool) -> None:
    """Once for each model."""
    records = [record for name in (EXPORT_FILE, RECORD) if (record := _record(directory / name))]
    if recorded(directory) is None and (of_run or records) and not any(SIGNATURE in record for record in records):
        warn(f"{directory} is of a version without hashes, or they were taken away: damage to it would not be seen")


def _digest(path: Path) -> str | None:
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a device or a pipe gives no end
            return None
        return _hashed(str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


@lru_cache(maxsize=1024)
def _hashed(path: str, size: int, changed_at: int, number: int) -> str:
    """A command opens a model several times; size, time and inode only tell whether it must be read again."""
    del size, changed_at, number
    return hash_file(Path(path))
