"""The command line: parses, calls one function a verb, prints."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

import remend
from remend.cli import degrading, listing, measuring, planning, recovering
from remend.cli.from_settings import recipe_options
from remend.cli.help import Verb, Verbs
from remend.cli.show import print_line
from remend.console import console
from remend.errors import InputError, RemendError, printable, shortened
from remend.evaluation.settings import EvaluateSettings
from remend.files.launch import go_alone, rank
from remend.plugins import import_installed, import_modules
from remend.recovery.settings import RecoverConfig
from remend.training.stopping import code_of, ending_on_signals

STORY: Mapping[str, Sequence[str]] = {
    "Start here": ("demo", "recipes", "tasks"),
    "Make a damaged model": ("degrade",),
    "Find the damage": ("diagnose",),
    "Bring it back": ("plan", "check", "recover", "prompts", "cache-teacher"),
    "Verify": ("eval", "compare", "report", "track"),
    "Serve": ("export", "push"),
    "Many runs": ("study", "correlate"),
    "About": ("version",),
}
"""Every verb, in the order of the help."""


class InOrder(Verbs):
    """A group whose help lists the verbs in the order of STORY."""

    def list_commands(self, ctx: Any) -> list[str]:
        """See click."""
        order = [verb for verbs in STORY.values() for verb in verbs]
        return sorted(super().list_commands(ctx), key=order.index)


def build_app() -> typer.Typer:
    """The command line, with a verb for everything that is registered by now."""
    app = typer.Typer(
        help="Bring a degraded language model back, with its own healthy past as the teacher.",
        epilog="--quiet, --verbose and --import may stand anywhere on the line.",
        cls=InOrder,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_anywhere)
    for family in (recovering, planning, degrading, measuring, listing):
        family.add_to(app)
    panels = {verb: panel for panel, verbs in STORY.items() for verb in verbs}
    for command in app.registered_commands:
        command.name = str(command.name or getattr(command.callback, "__name__", ""))
        command.rich_help_panel = panels[command.name]
        command.cls = Verb
    for group in app.registered_groups:
        group.rich_help_panel, group.cls = panels[str(group.name)], Verbs
        for command in group.typer_instance.registered_commands if group.typer_instance else ():
            command.cls = Verb
    return app


def _told(asked: bool) -> None:
    if asked:
        print_line(remend.__version__)
        raise typer.Exit


def _anywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_told, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress; warnings and results stay.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the libraries log, and where an error came from.")
    ] = False,
    import_: Annotated[
        str | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import a module of yours that registers a loss, a teacher, a task, …; repeatable.",
        ),
    ] = None,
) -> None:
    """The options that belong to no verb. `taken_out` has read them before typer sees the line."""


@dataclass
class Anywhere:
    """The line as `taken_out` splits it: the other words, the modules that --import named, and how much is printed."""

    words: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    quiet: bool = False
    verbose: bool = False


def taken_out(words: Sequence[str]) -> Anywhere:
    """Split off the options that may stand anywhere before a --.

    What a module registers must be known before the other words are parsed. A key inside another, --lora.r 8, is the
    word lora.r=8. Raises InputError for an --import alone, and for an option of another tool, with what to do instead.
    """
    read, keys = Anywhere(), list[str]()
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if word == "--":
            read.words += [word, *left]
        elif word in ("-q", "--quiet"):
            read.quiet = True
        elif word in ("-v", "--verbose"):
            read.verbose = True
        elif name == "--import":
            module = value if equals else next(left, "")
            if not module or module.startswith("-"):
                raise InputError("--import names no module; write --import my_losses for a file my_losses.py")
            read.modules.append(module)
        elif name.startswith("--") and "." in name:
            keys.append(f"{name[2:].replace('-', '_')}={value if equals else next(left, '')}")
        elif hint := _hint(read.words[:1], name):
            raise InputError(f"{name} is no option here: {hint}")
        else:
            dashed = name.startswith("--")  # --batch_size is --batch-size, as other tools have it
            read.words.append(f"{name.replace('_', '-')}{equals}{value}" if dashed else word)
    end = read.words.index("--") if "--" in read.words else len(read.words)
    read.words[end:end] = keys  # a recipe stands before them
    return read


HINTS: Mapping[str, Mapping[str, str]] = {
    "recover": RecoverConfig.hints,
    "check": RecoverConfig.hints,
    "eval": EvaluateSettings.hints,
}
"""Keys of other tools, by the verb whose options they might be."""


def _hint(verb: Sequence[str], name: str) -> str | None:
    """What to do in place of an option of another tool; None for one that is an option here, as --lora-alpha is."""
    key = name.removeprefix("--").replace("-", "_")
    hint = HINTS.get("".join(verb), {}).get(key) if name.startswith("--") else None
    known = hint and any(option.parameter.name == key for option in recipe_options(RecoverConfig))
    return None if known else hint


SHARED = ("recover", "diagnose")
"""Verbs that several processes carry out together."""


def main() -> None:
    """Carry out the line. What a user can mend is printed without a traceback, with exit code 2.

    A signal ends it, with exit code 130 after Ctrl-C and 143 after SIGTERM; whatever else was made of it on its way. Of
    several processes all but the first end at once where a verb has nothing for them to do.
    """
    read = Anywhere()
    try:
        with ending_on_signals():
            read = taken_out(sys.argv[1:])
            console.quiet = read.quiet or rank() > 0
            verb = "".join(read.words[:1])
            if rank() and verb not in SHARED:
                raise SystemExit(0)
            if verb not in (*SHARED, "check"):  # which says what all of them would do
                go_alone()
            if read.verbose:
                logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
                os.environ["TRANSFORMERS_VERBOSITY"] = "info"  # it has a setting of its own
            import_installed()
            import_modules(read.modules)
            build_app()(args=read.words)
    except BaseException as error:
        if code := code_of(error):  # typer makes 130 of every KeyboardInterrupt
            raise SystemExit(code) from None
        if not isinstance(error, (RemendError, OSError)):
            raise
        if read.verbose:
            traceback.print_exc()
        # of the system's: a name that is too long, a place that may not be read
        text = str(error) if isinstance(error, RemendError) else _of_system(error)
        if rank():  # what all of them found is said by the first, upon whose end a launcher ends the others
            time.sleep(PATIENCE)
        who = f" in process {rank()}" if rank() else ""
        for line in text.split("\n"):
            sys.stderr.write(f"error{who}: {printable(line if len(line) <= LONGEST else line[:LONGEST] + ' …')}\n")
        raise SystemExit(2) from None


PATIENCE = 10
"""Seconds."""

LONGEST = 2000
"""Characters of a line of an error."""


def _of_system(error: OSError) -> str:
    """What the system said of a file, and of which."""
    name = f"{shortened(error.filename)}: " if error.filename else ""
    return f"{name}{error.strerror or error}; give another path, or mend that (--verbose shows where it happened)"
