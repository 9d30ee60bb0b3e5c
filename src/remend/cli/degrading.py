"""The verbs of `remend degrade`: one for each kind of damage that is registered."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable

import typer

from remend.cli.from_settings import FIXED, Option, Values, command, options_of
from remend.cli.show import show_damage
from remend.degrade import DEGRADATIONS
from remend.degrade.kinds import Calibrated, degrade
from remend.errors import InputError

OLDER = {"depth": {"layers": "layers", "method": "by"}, "width": {"ffn": "ffn", "heads": "heads"}}
"""Kinds that `prune --method KIND` still makes, with the names that their fields have as its options."""


def add_to(app: typer.Typer) -> None:
    """Put a verb into the command line for each kind that is registered by now."""
    group = typer.Typer(help="Make a damaged student from a healthy model.", no_args_is_help=True)
    for kind in DEGRADATIONS.names():
        model = DEGRADATIONS.get(kind)
        options, run = options_of(model), _runs(kind)
        if kind == "prune":
            options, run = [*options, *_older_options()], _prune
        about = inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0]
        group.command(kind)(command(FIXED, options, run, about))
    app.add_typer(group, name="degrade")


def _runs(kind: str) -> Callable[[Values, Values], None]:
    def run(fixed: Values, given: Values) -> None:
        began = time.monotonic()
        done = degrade(kind, fixed["model"], fixed["out"], given)
        show_damage(fixed["model"], fixed["out"], done, time.monotonic() - began)

    return run


def _older_options() -> list[Option]:
    return [
        option
        for kind, names in OLDER.items()
        for option in options_of(DEGRADATIONS.get(kind), only=list(names), renamed=names, hidden=True)
    ]


def _prune(fixed: Values, given: Values) -> None:
    """`prune`, and what it was called with before depth and width had verbs of their own."""
    method = given.get("method", "magnitude")
    names = OLDER.get(method)
    common = {*Calibrated.model_fields, "method"}
    own = [name for name in DEGRADATIONS.get("prune").model_fields if name not in common]
    taken = list(names.values()) if names else own
    idle = [f"--{name}" for name in given if name not in common and name not in taken]
    if idle:
        raise InputError(
            f"{', '.join(idle)} has no effect with --method {method}, which takes --{', --'.join(taken)}; leave it out"
        )
    if not names:
        _runs("prune")(fixed, given)
        return
    layers = given.get("layers")
    if "by" in given and isinstance(layers, list):
        text = f"{layers[0]}," if len(layers) == 1 else ",".join(map(str, layers))
        raise InputError(f"--by chooses layers, and --layers {text} names them; leave one of them out")
    fields = {option: field for field, option in names.items()}
    _runs(method)(fixed, {fields.get(name, name): value for name, value in given.items() if name != "method"})
