"""What can go wrong, in the words of the person who can mend it.

Every error that a user can cause derives from RemendError and from the standard type that fits, so that library
users can catch either. The command line prints the message alone and exits with code 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class RemendError(Exception):
    """Base of every error that remend raises on purpose."""


class InputError(RemendError, ValueError):
    """A value, a key, a row or a model that can't be used."""


class FileError(RemendError, OSError):
    """A file or directory that can't be read or written."""

    def __str__(self) -> str:  # OSError would print an errno pair
        return str(self.args[0]) if self.args else ""


class TrainingError(RemendError, ArithmeticError):
    """Training can't go on: the loss or the gradient is not finite, or processes hold different weights."""


class CheckError(InputError):
    """One or more problems found before training; `problems` lists them all."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as ' Did you mean "x"?', or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
"""Characters that steer a terminal or turn the order of what it shows; a line's end and a tab are none of them."""


def printable(text: str) -> str:
    """A text as a terminal may be given it: what would steer it, and half characters, become a question mark."""
    return CONTROL.sub("?", text).encode(errors="replace").decode()


def shortened(value: object, length: int = 200) -> str:
    """A value in one line of at most `length` characters, for a message."""
    text = " ".join(str(value)[: 4 * length].split())
    return text if len(text) <= length else f"{text[:length]} …"
