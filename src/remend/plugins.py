"""Code from outside the package that registers something here: a loss, a teacher, a task and so on.

Two ways lead in. An installed package names a module under the entry point `remend.plugins`; whoever installs it has
asked for it. A module that is not installed is named on the command line, `remend --import MODULE …`; a recipe can't
name one. A run's manifest and a study keep the names, and both ask for them when they go on: files never let code run.
The workers of a study are told what its command named.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from remend.errors import InputError, RemendError

GROUP = "remend.plugins"
"""Of entry points; each names a module."""

HOOK = "__editable__"
"""Begins entries of Python's path that are no places: setuptools' finders for packages in development."""

asked_for: list[str] = []
"""Modules that were imported because a user named them, in order."""


def import_modules(names: Iterable[str]) -> None:
    """Import modules that a user named; a module in the working directory is found too.

    Raises InputError for a module that is not there, or that fails.
    """
    keep_places()
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that no file here hides an installed module
    for name in names:
        _import(name, f"--import {name}")
        if name not in asked_for:
            asked_for.append(name)


def keep_places() -> None:
    """Relative places in Python's path mean what they mean now, wherever the process goes: a run's directory may be a
    stranger's, and what lies there is nobody's module."""
    sys.path[:] = [p if p.startswith(HOOK) else str(Path(p).absolute()) for p in sys.path]


def import_installed() -> None:
    """Import what installed packages name. Raises InputError for a module that fails."""
    for entry in entry_points(group=GROUP):
        _import(entry.value, f"the installed plugin {entry.name}")


def not_imported(names: Iterable[str]) -> str:
    """Those of these modules that are not imported, as the options that name them; empty where all are."""
    return options_of(name for name in names if name not in sys.modules)


def options_of(names: Iterable[str]) -> str:
    """The options that name these modules."""
    return " ".join(f"--import {name}" for name in names)


def _import(name: str, whose: str) -> None:
    try:
        importlib.import_module(name)
    except RemendError as error:  # what it registers can't be used, and the message says why
        raise InputError(f"{whose}: {error}") from error
    except Exception as error:  # a plugin may fail in any way, and the user must hear which one did
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{whose} can't be imported: {type(error).__name__}: {reason}. A module is named as Python names it "
            "(my_losses for a file my_losses.py), from the working directory or from what is installed"
        ) from error
