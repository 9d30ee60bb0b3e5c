"""Write files atomically: each to a temporary name first and then renamed. The system's errors become one message."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from remend.errors import FileError

JsonObject = dict[str, Any]
"""An object of a JSON file, by its keys."""

JsonRow = Mapping[str, Any]
"""The same where it is only read."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the system's errors while writing `target` into one message. What stood there before is untouched."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileError):
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


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: temporary name, flush to disk, rename."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(row: JsonRow) -> str:
    """One line of a JSON lines file. NaN and infinities are refused."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read JSON. Raises FileError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well, and vanishes when it does not."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            temporary.chmod(0o755)
            yield temporary
            for file in temporary.rglob("*"):  # some writers create files that only their owner can read
                if file.is_file():
                    file.chmod(0o644)
            if target.exists():
                old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".old-{target.name}."))
                target.replace(old / "x")
                temporary.replace(target)
                shutil.rmtree(old)
            else:
                temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
