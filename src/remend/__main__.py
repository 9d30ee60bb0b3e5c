"""A process of the command line, from its first line to its end: whatever the moment, a signal ends it with 130 or 143.

Nothing is half-written before the command line has been read and after it has ended, so the process ends at once then.
Between the two, `training/stopping.py` says what a signal does.
"""

from __future__ import annotations

import atexit
import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Entry point."""
    for number in SIGNALS:
        signal.signal(number, _end)
    atexit.register(_deaf)  # what is registered first is called last
    from remend.cli import main as command_line  # takes a while

    command_line()


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    os._exit(128 + number)


def _deaf() -> None:
    """The exit code is settled: while Python takes itself down, no handler of its own would be called any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
