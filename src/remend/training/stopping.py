"""Ctrl-C and SIGTERM: training ends where a round of sampling does, with a checkpoint; all other work ends at once.

A scheduler sends SIGTERM some seconds before it kills. A second signal ends training at once too.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from remend.console import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended the work. `code` is the process's exit code: 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    raise Stopped(number)


def code_of(error: BaseException | None) -> int | None:
    """The exit code of the signal that an error came from, or None."""
    while error is not None:
        if isinstance(error, Stopped):
            return error.code
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let both signals raise Stopped within the block, so that what is half-written is removed."""
    with _handled(_end):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set them
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


class Wish:
    """Whether somebody wants training to end."""

    def __init__(self) -> None:
        self.number = 0

    def __bool__(self) -> bool:
        return bool(self.number)


@contextmanager
def at_the_end_of_a_round() -> Iterator[Wish]:
    """Within the block the first signal is a wish; the second raises Stopped."""
    wish = Wish()

    def heard(number: int, frame: FrameType | None) -> None:
        if wish:
            _end(number, frame)
        wish.number = number
        name = signal.Signals(number).name
        with suppress(RuntimeError):  # it came in the middle of a line that is being written, which can't be entered
            console.print(f"\n{name}: training ends with this round of sampling, and saves; once more ends it at once")

    with _handled(heard):
        yield wish
