"""Whether a run can write where it is to write."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from remend.files.atomic import TEMPORARY, remove_temporary


def nearest(path: str | Path) -> Path:
    """The path, or the nearest one above it that is there."""
    target = Path(path).absolute()
    while not target.exists():
        target = target.parent
    return target


def unwritable(out: str) -> str | None:
    """Why `out` can't be made, or None. It is tried: a directory is made in the nearest that is there, and removed."""
    parent = nearest(out)
    if not parent.is_dir():
        return f"out {out} can't be written: {parent} is a file; name a directory in another place"
    try:
        remove_temporary(parent, "probe")  # of a process that was killed here
        probe = Path(tempfile.mkdtemp(dir=parent, prefix=f"{TEMPORARY}probe-"))
        with contextlib.suppress(FileNotFoundError):  # another process that asks the same took it for abandoned
            probe.rmdir()
    except OSError as error:
        return f"out {out} can't be written to {parent}: {error.strerror}; name a directory that you may write to"
    return None


def inside(out: str, models: Mapping[str, Path | None]) -> Iterator[str]:
    """A problem for each model, by what it is to the run, in whose own directory `out` lies."""
    target = Path(os.path.realpath(out))  # of a loop of links too
    for what, path in models.items():
        if path is not None and path.is_dir() and path.resolve() in target.parents:
            yield (
                f"out {out} lies inside the own directory of {what}, {path}, which a run only reads; name a directory "
                "outside it"
            )
