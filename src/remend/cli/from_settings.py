"""Commands made from settings models: an option for every field, with its name, type, default and description.

| field | option |
| --- | --- |
| a number, a text, a choice | --name VALUE |
| bool | --name / --no-name |
| list of texts | --name VALUE, repeatable |
| list of numbers or choices | --name 1,2,3 |
| one or a list of them | --name 5, or --name 1,2,3; with a comma it is a list |
| other settings | an option for each of theirs, --name-theirs |
| anything else | none: only Python and YAML can give it |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from remend.errors import InputError
from remend.files.settings import Settings, merged, parse_value

Values = dict[str, Any]
"""What stands on the command line, by parameter or field."""


@dataclass(frozen=True)
class Option:
    """A parameter of a command, and the path of the field that it sets.

    part: what reads a part of a list with commas; None for all else. single: whether one value may stand in its place.
    as_yaml: the value is read as a recipe's is.
    """

    path: tuple[str, ...]
    parameter: inspect.Parameter
    part: type[int | float | str] | None
    single: bool
    as_yaml: bool = False

    def read(self, value: Any) -> object:
        """What the field gets. Raises InputError for a list of numbers that is none."""
        if self.as_yaml and isinstance(value, str):
            return parse_value(".".join(self.path), value)
        if self.part is None:
            return list(value) if isinstance(value, list | tuple) else value
        try:
            parts = [self.part(part.strip()) for part in value.split(",") if part.strip()]
        except ValueError:
            name = self.path[-1].replace("_", " ")
            what = "neither a number nor a list like 23,24,25" if self.single else "no list of numbers like 0,1,2,5"
            raise InputError(f'{name} "{value}" is {what}') from None
        return parts[0] if self.single and parts and "," not in value else parts

    def values(self, value: Any) -> Values:
        """The field with its value, below the settings that it is in."""
        *outer, last = self.path
        result: Values = {last: self.read(value)}
        for name in reversed(outer):
            result = {name: result}
        return result


def options_of(
    model: type[Settings],
    *,
    only: Sequence[str] | None = None,
    renamed: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
    hidden: bool = False,
) -> list[Option]:
    """The options for a model's fields, those of the model itself before those that it inherits.

    Args:
        model: its fields have descriptions.
        only: these fields; by default all.
        renamed: other names for some of them.
        also: second names that some options are understood by.
        hidden: leave them out of the help.
    """
    options: list[Option] = []
    for field in _names(model) if only is None else only:
        name = (renamed or {}).get(field, field)
        options += _options((name,), model.model_fields[field], hidden, inside=False, also=(also or {}).get(field))
    return options


def recipe_options(model: type[Settings]) -> list[Option]:
    """An option for every key of a recipe, by the headings of `model.groups`; values are read as a recipe's are.

    None stands for what the command line does not name: the recipe has it, or the model's default holds, which the help
    tells. A key's other names are understood and not shown. Settings inside settings have options of their own.
    """
    options: list[Option] = []
    for heading, fields in model.groups.items():
        for name in fields:
            options += _recipe_option((name,), model.model_fields[name], heading)
    return options + [_other_name((other,)) for other in model.aliases]


def _recipe_option(path: tuple[str, ...], field: FieldInfo, heading: str) -> Iterator[Option]:
    kinds = list(_kinds(field.annotation))
    default = field.get_default(call_default_factory=True)
    untold = field.is_required() or default is None or isinstance(default, bool | Settings)
    told = "" if untold else f"  [default: {default if isinstance(default, str) else repr(default)}]"
    help_text = _sentence(field.description or "", "") + told
    inner = next((one for one in kinds if isinstance(one, type) and issubclass(one, Settings)), None)
    if inner and inner.model_config.get("extra") == "allow":
        inner = None  # its keys depend on what is named, so it is given as a whole
    kind: Any = bool | None
    how = typer.Option(help=help_text, rich_help_panel=heading, show_default=False)
    if kinds != [bool]:
        shown = {int: "<int>", float: "<float>"}.get(kinds[0], "<str>") if len(kinds) == 1 else "<value>"
        kind = str | None
        how = typer.Option(help=help_text, rich_help_panel=heading, metavar=shown, hidden=inner is not None)
    yield Option(path, parameter("_".join(path), kind, how, None), None, True, as_yaml=True)
    if inner:
        for name in _names(inner):
            yield from _recipe_option((*path, name), inner.model_fields[name], heading)
        for other in inner.aliases:
            yield _other_name((*path, other))


def _other_name(path: tuple[str, ...]) -> Option:
    """A key by another name: understood, and not shown."""
    return Option(
        path, parameter("_".join(path), str | None, typer.Option(hidden=True), None), None, True, as_yaml=True
    )


def command(
    fixed: Sequence[inspect.Parameter],
    options: Sequence[Option],
    run: Callable[[Values, Values], None],
    about: str,
) -> Callable[..., None]:
    """A function for typer.

    Args:
        fixed: parameters that are no settings, see `parameter`.
        options: of the settings.
        run: called with the values of `fixed`, and those settings that stand on the command line: the model has the
            defaults.
        about: the help.
    """

    def called(_context: typer.Context, **values: Any) -> None:
        given: Values = {}
        for option in options:
            name = option.parameter.name
            if str(_context.get_parameter_source(name)).endswith("COMMANDLINE"):
                given = merged(given, option.values(values[name]))
        run({one.name: values[one.name] for one in fixed}, given)

    first = inspect.Parameter("_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    called.__signature__ = inspect.Signature([first, *fixed, *(o.parameter for o in options)])  # type: ignore[attr-defined]
    called.__doc__ = about
    return called


def parameter(name: str, kind: object, how: Any, default: object = inspect.Parameter.empty) -> inspect.Parameter:
    """A parameter of a command: its type, and typer.Option or typer.Argument with the help."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how])


MODEL = "The healthy model: a directory, GGUF file, hub id[@revision], smollm2."
FIXED = (
    parameter("model", str, typer.Argument(help=MODEL)),
    parameter("out", str, typer.Option(help="A new directory.")),
)
"""Of verbs that make something of a healthy model."""


def _names(model: type[Settings]) -> Iterator[str]:
    seen: set[str] = set()
    for base in model.__mro__:
        for name in inspect.get_annotations(base):
            if name in model.model_fields and name not in seen:
                seen.add(name)
                yield name


def _options(
    path: tuple[str, ...], field: FieldInfo, hidden: bool, inside: bool, also: str | None = None
) -> Iterator[Option]:
    kinds = list(_kinds(field.annotation))
    inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)
    if inner:
        for name in _names(inner):
            yield from _options((*path, name), inner.model_fields[name], hidden, inside=True)
        return
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if any(kind not in (bool, int, float, str, *lists) for kind in kinds):
        return
    parts = [part for kind in lists for part in get_args(kind)]
    single = len(lists) < len(kinds)
    repeatable = parts == [str] and not single
    separated: type[int | float | str] | None = None
    if lists and not repeatable:
        separated = parts[0] if parts[0] in (int, float) else str
    kind: Any = list[str] if repeatable else kinds[0] if not lists and len(kinds) == 1 else str
    default: Any = None if inside or repeatable else field.get_default(call_default_factory=True)
    if field.is_required() and not inside:
        default = inspect.Parameter.empty
    elif default is None or default == []:
        default, kind = None, kind | None
    elif kind is str:
        default = ",".join(map(str, default)) if isinstance(default, list) else str(default)
    more = "; repeatable" if repeatable else "; with commas between" if separated and not single else ""
    name = "_".join(path)
    names = (f"--{name}".replace("_", "-"), f"--{also}") if also else ()
    how = typer.Option(
        *names, help=_sentence(field.description or "", more), hidden=hidden, show_default=default is not False
    )
    yield Option(path, parameter(name, kind, how, default), separated, single)


def _sentence(description: str, more: str) -> str:
    """A description as the help shows it. One that begins with a value, as "auto, cpu", keeps its first letter."""
    if description.partition(" ")[0].rstrip(":").isalpha():
        description = description[:1].upper() + description[1:]
    return description + more + ("" if description.endswith("…") and not more else ".")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type: choices count as texts, None is left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif origin is Literal or (origin is dict and get_args(annotation) == (str, str)):
        yield str  # such a mapping is read from a text by its own validator
    elif annotation is not NoneType:
        yield annotation
