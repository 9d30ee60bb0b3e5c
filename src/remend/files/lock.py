"""Advisory locks that the kernel releases when their holder dies, however it dies.

flock is known on Linux and macOS, and by most network file systems. Where it is not, nothing is locked.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remend.errors import InputError
from remend.files.own import open_own

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

LOCK = ".remend-lock"
"""In a directory that one process at a time may write. It stays; what counts is who has it locked."""


def take(descriptor: int) -> bool | None:
    """Lock an open file or directory until it is closed; False if another holds it, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in {errno.EWOULDBLOCK, errno.EACCES} else None
    return True


@contextmanager
def only_writer(directory: Path, what: str) -> Iterator[bool]:
    """Be the one process that writes into a directory, as long as the block runs.

    Args:
        directory: exists already.
        what: for the message, e.g. 'run'.

    Yields:
        Whether the file system knows locks; where it does not, nothing keeps a second process out.

    Raises:
        InputError: another process is at work there; it is named by process id and host.
        FileError: the lock's file is a link, or no file.
    """
    descriptor = open_own(directory / LOCK)
    try:
        if os.fstat(descriptor).st_nlink > 1:  # a link that can't be told from the file
            raise InputError(
                f"{directory / LOCK} is a link, so the {what} can't be locked; remove it and give the command again"
            )
        taken = take(descriptor)
        if taken is False:
            holder = os.read(descriptor, 300).decode(errors="replace").strip() or "an unknown one"
            raise InputError(
                f"another process ({holder}) is at work in the {what} {directory}; wait until it has ended, or end it, "
                "and give the command again"
            )
        if taken:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield taken is not None
    finally:
        os.close(descriptor)
