"""Write files so that neither a kill nor a power cut leaves half of one.

Each is written under a temporary name, flushed to the disk, and renamed; then the directory is flushed that holds the
name. Only what is durable replaces what stood there. The system's errors become one message.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from remend.errors import FileError, InputError
from remend.files.lock import LOCK, take

JsonObject = dict[str, Any]
"""An object of a JSON file, by its keys."""

JsonRow = Mapping[str, Any]
"""The same where it is only read."""

TEMPORARY = ".remend-tmp-"
"""How every name begins that is not final yet. Nothing else is ever removed as a leftover."""
OLD = f"{TEMPORARY}old-"
"""Of a directory that holds what is being replaced."""

UNFINISHED = ".remend-unfinished-"
"""How the name of a directory begins that is written part by part, and gone on with after a kill."""
ASKED = f"{TEMPORARY}asked.json"
"""In it: what was asked for, so that only the same command goes on with it."""

_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the system's errors while writing `target` into one message. What stood there before is untouched."""
    try:
        yield
    except Exception as error:
        # tokenizers raises a plain Exception, with the system's words
        of_system = isinstance(error, OSError | SafetensorError) or "(os error " in str(error)
        if isinstance(error, FileError) or not of_system:
            raise
        full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error)
        if full:
            free = shutil.disk_usage(_existing(target)).free / 2**20
            raise FileError(
                f"the disk is full: {target} could not be written ({free:.0f} MiB are free). "
                "Nothing that stood there was overwritten. Free some space and run the command again; an interrupted "
                "run continues with remend recover --resume."
            ) from None
        raise FileError(f"{target} can't be written: {getattr(error, 'strerror', None) or error}") from None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def flush(path: Path) -> None:
    """Have the system write a file's content, or a directory's names, to the disk. Durable once it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:  # a file system without it
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file that becomes `target`, durably, when the block ends well, and vanishes when it does not.

    What a killed process left of an earlier try is removed.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_temporary(target.parent, target.name)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f"{TEMPORARY}{_short(target.name)}-")
        temporary = Path(name)
        try:
            take(descriptor)  # says that its maker lives
            yield temporary
            temporary.chmod(0o666 & ~_UMASK)
            flush(temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        flush(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically and durably."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(row: JsonRow) -> str:
    """One line of a JSON lines file. NaN and infinities are refused."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well, and vanishes when it does not.

    A directory that stands there is replaced once the new one is durable. Links are followed. Where the place can't be
    replaced, since something is mounted on it, it must be empty, and the files are moved into it one by one,
    config.json last. What a killed process left of an earlier try is removed.
    """
    target = target.resolve() if target.is_symlink() else target
    with writing(target):
        fixed = target.is_dir() and not _replaceable(target)
        place = target if fixed else target.parent
        place.mkdir(parents=True, exist_ok=True)
        remove_temporary(place, target.name)
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f"{TEMPORARY}{_short(target.name)}-"))
        with _held(temporary):
            try:
                temporary.chmod(0o777 & ~_UMASK)
                yield temporary
                _make_durable(temporary)
                _finish(temporary, target, fixed=fixed)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


@contextmanager
def resumable_directory(target: Path, asked: JsonRow) -> Iterator[Path]:
    """A directory that becomes `target` when the block ends well, and whose content stays when the process is killed.

    The next time that the same is asked for, it is there with what was durable by then. Otherwise as `new_directory`.

    Args:
        target: the name to come.
        asked: JSON of all that the content depends on; what was begun for something else is removed.

    Raises FileError where another process is writing it. An InputError inside removes it.
    """
    target = target.resolve() if target.is_symlink() else target
    with writing(target):
        fixed = target.is_dir() and not _replaceable(target)
        place = target if fixed else target.parent
        place.mkdir(parents=True, exist_ok=True)
        unfinished = place / f"{UNFINISHED}{_short(target.name)}"
        unfinished.mkdir(exist_ok=True)
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            if take(descriptor) is False:
                raise FileError(f"another process is writing {target}; wait until it has ended, or end it")
            _begin_unless_same(unfinished, json.loads(json.dumps(asked)))
            yield unfinished
            (unfinished / ASKED).unlink()
            _make_durable(unfinished)
            _finish(unfinished, target, fixed=fixed)
        except InputError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)


def _begin_unless_same(unfinished: Path, asked: JsonObject) -> None:
    try:
        same = json.loads((unfinished / ASKED).read_text(encoding="utf-8")) == asked
    except (OSError, ValueError):
        same = False
    if not same:
        for path in list(unfinished.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_json(unfinished / ASKED, asked)


def _replaceable(directory: Path) -> bool:
    return not os.path.ismount(directory) and os.access(directory.parent, os.W_OK)


def _short(name: str) -> str:
    return name[:60]  # a name has 255 bytes at most, and a letter up to four


def _finish(made: Path, target: Path, *, fixed: bool) -> None:
    """A durable directory becomes `target`; one that is fixed, such as a mount point, takes its files instead."""
    if fixed:
        for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(target / path.name)
        made.rmdir()
    else:
        _put(made, target)
    flush(target if fixed else target.parent)


def _put(temporary: Path, target: Path) -> None:
    """Rename it; what stood there is removed only once the new name is on the disk."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{OLD}{_short(target.name)}-"))
    with _held(aside):
        try:
            target.rename(aside / target.name)
            temporary.rename(target)
            flush(target.parent)
        finally:
            if not target.exists() and (aside / target.name).exists():  # an error, or a signal, in between
                (aside / target.name).rename(target)
            shutil.rmtree(aside)


def remove_directory(path: Path) -> None:
    """Remove a directory so that a kill leaves it whole or under a temporary name; of a link only the link."""
    if path.is_symlink():
        path.unlink()
        return
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{TEMPORARY}gone-"))
    path.rename(temporary / "gone")
    shutil.rmtree(temporary)


def put_aside(path: Path) -> Path:
    """Give a file or directory a name beside its own that is free, and return that."""
    names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return aside


def visible(directory: Path) -> list[Path]:
    """What lies in a directory, but for temporary names and the lock."""
    return [path for path in directory.iterdir() if not path.name.startswith((TEMPORARY, UNFINISHED, LOCK))]


def _make_durable(directory: Path) -> None:
    """Flush every file and directory; some writers create files that only their owner can read."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_UMASK)
            flush(path)
        elif path.is_dir():
            flush(path)
    flush(directory)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a lock on a temporary directory, which says that its maker lives."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        take(descriptor)
        yield
    finally:
        os.close(descriptor)


def _abandoned(path: Path) -> bool:
    """Whether the process that made a temporary file or directory is gone; without locks that can't be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # it was renamed in the meantime
        return False
    try:
        return take(descriptor) is True
    finally:
        os.close(descriptor)


def remove_temporary(place: Path, name: str | None = None) -> None:
    """Remove what processes that are gone left under temporary names in a directory.

    What one had moved aside, and not replaced yet, is put back.

    Args:
        place: the directory.
        name: only what was to become this; without it every file, so no other process may be at work there.
    """
    begins = (TEMPORARY,) if name is None else (f"{TEMPORARY}{_short(name)}-", f"{OLD}{_short(name)}-")
    for path in [path for path in place.iterdir() if path.name.startswith(begins)] if place.is_dir() else []:
        if path.is_symlink() or path.is_file():
            if name is None or _abandoned(path):
                path.unlink(missing_ok=True)
        elif path.is_dir() and _abandoned(path):
            for aside in path.iterdir() if path.name.startswith(OLD) else ():
                if not (place / aside.name).exists():
                    aside.rename(place / aside.name)
            shutil.rmtree(path)
