"""--import MODULE, which may stand anywhere on the command line: what it registers is known before words are parsed."""

from __future__ import annotations

from remend.errors import InputError

OPTION = "--import"


def taken_out(words: list[str]) -> tuple[list[str], list[str]]:
    """The words without --import and what follows it, and the modules that were named.

    Raises InputError where no module follows.
    """
    rest: list[str] = []
    modules: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if word == "--":
            return [*rest, word, *left], modules
        if name != OPTION:
            rest.append(word)
            continue
        module = value if equals else next(left, "")
        if not module or module.startswith("-"):
            raise InputError("--import names no module; write --import my_losses for a file my_losses.py")
        modules.append(module)
    return rest, modules
