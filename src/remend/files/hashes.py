"""SHA-256 of files: what was written is told from what lies there now."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from remend.files.atomic import TEMPORARY
from remend.files.lock import LOCK


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_directory(directory: Path) -> dict[str, str]:
    """SHA-256 of each file in a directory and below, by its path from there, sorted; temporary ones are left out."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    names = {path.relative_to(directory): path for path in files}
    return {
        name.as_posix(): hash_file(path)
        for name, path in names.items()
        if name.name != LOCK and not any(part.startswith(TEMPORARY) for part in name.parts)
    }


def damaged(directory: Path, recorded: Mapping[str, str]) -> list[str]:
    """The files, by name, that are missing or have another content than was recorded; other files are no matter."""
    unlike = []
    for name, digest in recorded.items():
        path = directory / name
        try:
            same = path.is_file() and hash_file(path) == digest
        except (OSError, ValueError):  # a disk that can't give the file's bytes, or a name that no file can have
            same = False
        if not same:
            unlike.append(name)
    return unlike
