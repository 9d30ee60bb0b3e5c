"""Open files that are to be written in place: a plain file of that name, and nothing that it may lead to."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from remend.errors import FileError


def open_own(path: Path, flags: int = 0) -> int:
    """A descriptor to read and write a file, which is made where it is missing.

    A stranger's directory may hold a link, and what it leads to would be changed, or a pipe, which never ends.

    Args:
        path: of the file.
        flags: further ones of os.open, such as os.O_APPEND.

    Raises FileError where it is a link, a directory or no plain file, and OSError as os.open does.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_own(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_own(path)
    return descriptor


def _not_own(path: Path) -> FileError:
    return FileError(f"{path} is a link, or no plain file, and is not written; remove it and give the command again")
