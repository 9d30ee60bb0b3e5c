"""Read what may be damaged, or a stranger's: JSON, JSON lines, and whatever a library reads.

Whatever is wrong with a file becomes one message: which file (and line), what is wrong, and what to do.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remend.errors import FileError, RemendError, shortened
from remend.files.atomic import JsonObject

AGAIN = "copy it again, or make it again with the command that wrote it"
"""What to do about a damaged file of which nothing better is known."""

FETCH = "fetch or copy it again"
"""What to do about one that somebody else made."""

MOST_BYTES = 2**30
"""Of a text file; a larger one is none of those that are read whole."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, remedy: str = AGAIN) -> str:
    """The text of a file, UTF-8 with or without a mark at its start.

    Raises FileError for what can't be read, is no file (a device never ends), is too large or no text.
    """
    try:
        require_finite(path)
        if path.stat().st_size > MOST_BYTES:
            raise FileError(f"{path} can't be read: it has over {MOST_BYTES // 2**20} MiB, which no such file has")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} can't be read: no UTF-8 text at byte {error.start}; {remedy}") from None
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{shortened(path)} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # a zero byte in the name
        raise FileError(f"{str(path)!r} can't be read: {error}") from None


def require_finite(path: Path) -> None:
    """Raise FileError for a device, which may never end, and for a pipe or socket, which may never begin."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "pipe or socket"
        raise FileError(f"{path} can't be read: it is a {kind}; give a file")


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError with what is wrong: it is no JSON, holds lists or objects nested too deeply, a whole number of too
    many digits, or half a character (a lone surrogate), which can't be written.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate, \\ud800 to \\udfff)") from None
    except RecursionError:
        raise ValueError("it holds lists or objects nested too deeply to be read") from None
    except ValueError:
        raise ValueError("it holds a whole number of too many digits to be read") from None
    return value


def object_of(text: str) -> JsonObject:
    """The object of a JSON text. Raises ValueError with what is wrong."""
    value = parsed(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {kind_of(value)}, and an object belongs there")
    return value


def kind_of(value: object) -> str:
    """A JSON value's type in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def read_object(path: Path, remedy: str = AGAIN) -> JsonObject:
    """The object of a JSON file. Raises FileError that names the file, and says what to do."""
    text = read_text(path, remedy)
    try:
        return object_of(text)
    except ValueError as error:
        raise FileError(f"{path} can't be read: {error}; {remedy}") from None


def read_objects(path: Path, remedy: str = AGAIN) -> list[JsonObject]:
    """The objects of a JSON lines file; a last line without its end, as a killed process leaves it, is left out.

    Raises FileError that names file and line, also where a number is not finite: no such file is written so.
    """
    rows = []
    for number, line in enumerate(read_text(path, remedy).split("\n")[:-1], start=1):
        if not line:
            continue
        try:
            row = object_of(line)
            rows.append(_finite(row))
        except ValueError as error:
            raise FileError(f"{path}, line {number}, can't be read: {error}; {remedy}") from None
    return rows


def _finite(row: JsonObject) -> JsonObject:
    try:
        json.dumps(row, allow_nan=False)
    except ValueError:
        raise ValueError("it holds a number that is not finite") from None
    return row


def stays_inside(name: object) -> bool:
    """Whether a name that a file gives is that of a file in the same directory: what it leads to is hashed with it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


MISSHAPEN = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What code raises that is handed a file's values and finds others than belong there."""


@contextmanager
def understood(what: object, remedy: str = AGAIN, kinds: tuple[type[Exception], ...] = MISSHAPEN) -> Iterator[None]:
    """Inside, values from a file are used; what they raise where they are none that belong there becomes one message.

    Args:
        what: the file or directory.
        remedy: what to do about it.
        kinds: of exceptions; a library that reads a file of a stranger's may raise any.

    Raises FileError.
    """
    try:
        yield
    except RemendError:
        raise
    except kinds as error:
        reason = f"{type(error).__name__}: {shortened(error)}"
        if isinstance(error, KeyError):
            reason = f"it lacks {error}"
        raise FileError(
            f"{what} can't be understood ({reason}): it is damaged, was changed by hand, or is of another version; "
            f"{remedy}"
        ) from error
