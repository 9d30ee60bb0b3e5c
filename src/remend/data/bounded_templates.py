"""Templates are code from somebody else, in a sandbox that counts neither time nor memory: here both have bounds.

The first text that a template writes is written in a child process beforehand, which the system stops when it takes too
much of either. Every later one is written under a clock; a template that, for later messages alone, takes too much
memory or does one thing of Python's that never ends is not found by it.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from remend.errors import InputError

SECONDS = 5
"""Of processor time that one text may take; templates take milliseconds."""

MEMORY = 2**30
"""Bytes that a trial may take beyond what the process has."""

LONGEST = 2**24
"""Characters of a text that a template may write: no model has a context of so many."""

_TOO_LONG = 3
"""Exit code of a child whose text was too long, or had no place in memory."""

_tried: set[str] = set()


class Unbounded(InputError):
    """A template takes more time or memory than any needs."""


def bounded(template: str, write: Callable[[], str], *, called: str = "the chat template") -> str:
    """What `write` gives, within the bounds of this module.

    Args:
        template: its text; one that was never seen is tried in a child process first.
        write: writes what the template makes of some messages. What it raises goes on.
        called: how a message calls the template.

    Raises Unbounded where it takes too much time or memory, or writes too long a text.
    """
    if template not in _tried:
        _require_end(write, called)
        _tried.add(template)
    with _clock(called):
        text = write()
    if len(text) > LONGEST:
        raise _refusal(called, "is too much for the memory")
    return text


def _refusal(called: str, why: str) -> Unbounded:
    return Unbounded(f"{called} can't be used: what it writes {why}. Look at its text")


def _no_end(called: str) -> Unbounded:
    return _refusal(called, f"does not come to an end within {SECONDS} seconds")


@contextmanager
def _clock(called: str) -> Iterator[None]:
    """Raises Unbounded inside after SECONDS of processor time; signals come to the main thread alone."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise _no_end(called)

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _require_end(write: Callable[[], str], called: str) -> None:
    child = os.fork()
    if child == 0:
        _try(write)
    began = time.monotonic()
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended:
        if time.monotonic() - began > 6 * SECONDS:  # it waits for something, or the machine is very busy
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status)
    if code == _TOO_LONG:
        raise _refusal(called, "is too much for the memory")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _no_end(called)


def _try(write: Callable[[], str]) -> None:
    """In the child: write under limits, and end without a word."""
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        spent = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + SECONDS, int(spent) + SECONDS + 1))
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    except (OSError, ValueError):  # another system than Linux
        pass
    try:
        code = _TOO_LONG if len(write()) > LONGEST else 0
    except MemoryError:
        code = _TOO_LONG
    except BaseException:  # the caller writes again, and says what is wrong
        code = 0
    os._exit(code)
