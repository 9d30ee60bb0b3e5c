"""The command line: parses, calls one function a verb, prints."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import remend
from remend.cli import degrading, listing, measuring, recovering
from remend.cli.show import print_line
from remend.errors import InputError, RemendError
from remend.plugins import import_installed, import_modules


def build_app() -> typer.Typer:
    """The command line, with a verb for everything that is registered by now."""
    app = typer.Typer(
        help="Bring a degraded language model back, with its own healthy past as the teacher.",
        epilog="--import MODULE, anywhere: import a module of yours that registers a loss, a teacher, a task, …",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_version)
    for family in (recovering, degrading, measuring, listing):
        family.add_to(app)
    return app


def _told(asked: bool) -> None:
    if asked:
        print_line(remend.__version__)
        raise typer.Exit


def _version(
    version: Annotated[
        bool, typer.Option("--version", callback=_told, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Takes the options that stand before a verb."""


def taken_out(words: list[str]) -> tuple[list[str], list[str]]:
    """The words without --import MODULE, which may stand anywhere, and the modules that were named.

    What these register must be known before the other words are parsed. Raises InputError where no module follows.
    """
    rest: list[str] = []
    modules: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if word == "--":
            return [*rest, word, *left], modules
        if name != "--import":
            rest.append(word)
            continue
        module = value if equals else next(left, "")
        if not module or module.startswith("-"):
            raise InputError("--import names no module; write --import my_losses for a file my_losses.py")
        modules.append(module)
    return rest, modules


def main() -> None:
    """Entry point: errors that a user can mend are printed without a traceback, with exit code 2."""
    try:
        words, modules = taken_out(sys.argv[1:])
        import_installed()
        import_modules(modules)
        build_app()(args=words)
    except RemendError as error:
        for line in str(error).split("\n"):
            sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2) from None
