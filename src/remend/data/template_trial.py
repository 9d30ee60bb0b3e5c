"""Does a chat template come to an end? It is code from a model, in a sandbox that counts neither time nor memory.

The first text that a template writes is written in a child process beforehand, which the system stops when it takes too
much of either. A template that only loops for other messages is not found by this.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from remend.errors import InputError

SECONDS = 5
"""Of processor time that a trial may take; templates take milliseconds."""

MEMORY = 2**30
"""Bytes that it may take beyond what the process has."""

LONGEST = 2**24
"""Characters of a text that a template may write: no model has a context of so many."""

_TOO_LONG = 3
"""Exit code of a child whose text was too long, or had no place in memory."""

_tried: set[str] = set()


def require_end(template: str, write: Callable[[], str]) -> None:
    """Raise InputError where a template takes too much time or memory, or writes too long a text; each is tried once.

    Args:
        template: its text.
        write: writes what it makes of some messages. Whatever it raises is no matter here.
    """
    if template in _tried:
        return
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
    if code in (_TOO_LONG, -signal.SIGXCPU, -signal.SIGKILL):
        why = "is too much for the memory" if code == _TOO_LONG else f"does not come to an end within {SECONDS} seconds"
        raise InputError(f"the chat template can't be used: what it writes {why}. Look at the model's chat_template")
    _tried.add(template)


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
