"""Write docs/reference/cli.md and docs/reference/recipe.md from the code.

python benchmarks/reference.py          (make docs calls it; a test says when the pages are out of date)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from remend.cli import STORY, build_app
from remend.models.lora import LoraConfig
from remend.recovery.settings import AlignmentConfig, EmaConfig, LossConfig, RecoverConfig, StreamConfig

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
MADE = "<!-- Written by benchmarks/reference.py from the code. Change the help texts there, then run make docs. -->"

PARTS: Mapping[str, tuple[type[BaseModel], str]] = {
    "streams": (StreamConfig, "Of each stream: `streams: {NAME: {…}}`. [What streams are for](streams.md)."),
    "ema": (EmaConfig, "Of the teacher `ema`."),
    "loss": (LossConfig, "The loss by name; beside the name stand its own parameters."),
    "lora": (LoraConfig, "Of the adapter that is trained."),
    "alignment": (AlignmentConfig, "Of the second signal, beside the divergence."),
}


SAME = {"lora.r": "lora.rank", "lora.lora_alpha": "lora.alpha", "lora.target_modules": "lora.targets"} | {
    "lora.lora_dropout": "lora.dropout",
    "bf16: true": "dtype: bfloat16",
}
"""Other names inside a key, and of a key with its value."""


def cell(text: str) -> str:
    """Text for a cell of a table: one line, with nothing that Markdown or HTML would take for its own."""
    line = " ".join(text.split())
    for sign, instead in (("|", r"\|"), ("<", "&lt;"), ("*", r"\*"), ("_", r"\_")):
        line = line.replace(sign, instead)
    return line


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, with an empty line after it."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def kind_of(annotation: Any) -> str:
    """A type as a user would say it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind_of(part) for part in inside if part is not NoneType))
    if origin in (dict, list, Mapping):
        return {list: "list", dict: "mapping", Mapping: "mapping"}[origin]
    if inside:  # Annotated
        return kind_of(inside[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, "text")


def default_of(field: Any) -> str:
    """A field's default as it would stand in a recipe."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return f"`{{{', '.join(f'{name}: {part}' for name, part in value.model_dump().items())}}}`"
    told = str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
    return "none" if value is None else f"`{told}`"


def fields(model: type[BaseModel], names: Sequence[str]) -> Iterator[str]:
    """The table of a settings model's keys."""
    rows = []
    for name in names:
        field = model.model_fields[name]
        rows.append([f"`{name}`", kind_of(field.annotation), default_of(field), cell(field.description or "")])
    yield from table(["key", "type", "default", "meaning"], rows)


def recipe() -> str:
    """The page about recipe keys."""
    lines = [
        *("# Recipe keys", "", MADE, ""),
        "A recipe is a YAML file with these keys. On the command line each key is an option (`--batch-size 4`;",
        "`lora`, `ema` and `alignment` one for each part, `--lora-rank 16`) or a word (`batch_size=4`), for",
        "`remend recover` and for `remend check`; what is given there goes over the recipe.",
        "Unknown keys are errors. [Where the defaults come from](../explanation/defaults.md) has the source of each,",
        "and what was measured.",
        "",
    ]
    for group, names in RecoverConfig.groups.items():
        lines += [f"## {group}", "", *fields(RecoverConfig, names)]
    for key, (model, meaning) in PARTS.items():
        lines += [f"## Inside `{key}`", "", meaning, "", *fields(model, list(model.model_fields))]
    lines += ["## Other names", "", "Names that other tools use are understood:", ""]
    lines += table(["you write", "it is"], [[f"`{a}`", f"`{b}`"] for a, b in {**RecoverConfig.aliases, **SAME}.items()])
    lines += [
        "Keys of other tools that are none here, with what to do instead; a recipe that has one is told so:",
        "",
    ]
    lines += table(["you write", "do this"], [[f"`{a}`", cell(b)] for a, b in RecoverConfig.hints.items()])
    return "\n".join(lines).rstrip() + "\n"


def option_default(parameter: Any) -> str:
    """An option's default as the page shows it; an option that is off, or that has none, shows nothing."""
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(value, bool):
        return "on" if value else ""
    return "" if value is None or callable(value) or value == () else f"`{value}`"


def verb(name: str, command: Any, keys: set[str]) -> Iterator[str]:
    """A verb's part of the page: what it does, its arguments, its options, and the verbs below it."""
    arguments, options, from_recipe = [], [], False
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            arguments.append((parameter.metavar or str(parameter.name).upper()).strip("[]"))
            help_text = cell(getattr(parameter, "help", None) or "")
            options.append([f"`{arguments[-1]}`", "", help_text])
        elif parameter.name in keys:
            from_recipe = True
        else:
            flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
            options.append([flags, option_default(parameter), cell(parameter.help or "")])
    children = getattr(command, "commands", None) or {}
    yield from (f"{'###' if name.count(' ') == 0 else '####'} remend {name}", "", cell(command.help or ""), "")
    if not children:
        words = [f"remend {name}", *arguments, "[OPTIONS]"]
        yield from ("```text", " ".join(words), "```", "")
    if from_recipe:
        yield from (
            "Every [recipe key](recipe.md) is an option too, with dashes for underscores: `--batch-size 4`.",
            "",
        )
    if options:
        yield from table(["argument or option", "default", "meaning"], options)
    for child, below in children.items():
        if not below.hidden:
            yield from verb(f"{name} {child}", below, keys)


def command_line() -> str:
    """The page about verbs and options."""
    app = typer.main.get_command(build_app())
    commands: dict[str, Any] = app.commands  # type: ignore[attr-defined]  # it is a group
    lines = ["# Command line", "", MADE, "", "`remend VERB --help` shows the same in a terminal.", ""]
    lines += ["## Options that may stand anywhere", ""]
    rows = [
        [", ".join(f"`{flag}`" for flag in parameter.opts), cell(getattr(parameter, "help", None) or "")]
        for parameter in app.params
        if parameter.name != "help"
    ]
    lines += table(["option", "meaning"], [*rows, ["`-h`, `--help`", "Show the help of a verb."]])
    for panel, names in STORY.items():
        shown = [name for name in names if name in commands and not commands[name].hidden]
        if shown:
            lines += [f"## {panel}", ""]
        for name in shown:
            keys = set(RecoverConfig.model_fields) if name in ("recover", "check") else set()
            lines += verb(name, commands[name], keys)
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"cli.md": command_line, "recipe.md": recipe}


def main() -> None:
    """See the module."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
