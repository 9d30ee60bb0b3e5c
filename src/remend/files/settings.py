"""Typed settings from YAML: unknown keys refused, every problem listed at once, key=value overrides."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from remend.errors import InputError, did_you_mean, shortened
from remend.files.yaml_files import yaml_of


def as_number(value: object) -> object:
    """A float where a whole number or its text was given: YAML 1.1 reads 1e-4 as a text (it wants 1.0e-4)."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    try:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    except OverflowError:
        raise ValueError("it is larger than a number with a decimal point can be") from None


def finite(value: float | None) -> float | None:
    """The number. Raises ValueError for infinity, which no file can hold, and for what is no number."""
    if value is not None and not math.isfinite(value):
        raise ValueError("allowed: a finite number")
    return value


MOST_TOKENS = 1_000_000
"""Of an answer: no model has a longer context, and a larger number is a slip."""

Number = Annotated[float, BeforeValidator(as_number), AfterValidator(finite)]


def _no_float16(value: object) -> object:
    if value in ("float16", "fp16", "half"):
        raise ValueError(NO_FLOAT16)
    return value


NO_FLOAT16 = (
    "float16 is for inference alone: training in it needs loss scaling, which remend does not bring. Use bfloat16, or "
    "float32 where the GPU has no bfloat16 (auto chooses)"
)


Placement = Literal["auto", "device", "host", "disk"]

PLACEMENT = (
    "where weights are: device, all of them; disk or host, in the files or in the CPU's memory, from where blocks come "
    "one by one; auto: device where that fits into the free memory, else disk where the files can be read so"
)

Arithmetic = Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(_no_float16)]
"""The dtype of a training's arithmetic."""


def shard_size(value: object) -> str:
    """The size of a file as transformers reads it: 5GB, 500MB. Raises ValueError for what is none."""
    text = value.strip().upper() if isinstance(value, str) else ""
    if re.fullmatch(r"[1-9]\d*\s?[KMGT]B", text):
        return text.replace(" ", "")
    raise ValueError("allowed: a size such as 5GB or 500MB")


@dataclass(frozen=True)
class Gone:
    """A key that used to exist: its default then, and since when and why it is gone, from "since …".

    others: all further values that it had, where these are few; None for any.
    """

    default: object
    why: str
    others: tuple[object, ...] | None = None


class Settings(BaseModel):
    """Frozen settings of a known type: unknown keys are refused, and values are not converted into another type.

    gone: keys that used to exist. A directory written by an older version names every key of its time, so one that
        has its old default is left out without a word. Any other value is refused with the reason.
    aliases: other names of keys, as other tools have them, where they mean exactly the same.
    hints: keys that other tools have and that are none here, with what is to be done instead.
    groups: the keys by heading, as help texts show them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    gone: ClassVar[Mapping[str, Gone]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    hints: ClassVar[Mapping[str, str]] = {}
    groups: ClassVar[Mapping[str, Sequence[str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_gone(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        values = cls.own_names(values, "")
        return {k: v for k, v in values.items() if k not in cls.gone or v != cls.gone[k].default}

    @classmethod
    def own_names(cls, values: Mapping[str, Any], origin: str) -> dict[str, Any]:
        """The values under the keys' own names, those of settings inside too. Raises InputError where a key is given
        by two names."""
        for other, own in cls.aliases.items():
            if other in values and own in values:
                where = f"{origin}: " if origin else ""
                raise InputError(f"{where}{other} is another name of {own}, and both are given; leave one of them out")
        return {cls.aliases.get(k, k): cls._renamed(cls.aliases.get(k, k), v, origin) for k, v in values.items()}

    @classmethod
    def _renamed(cls, key: str, value: object, origin: str) -> object:
        """A key's value, where it holds settings or a mapping of them, under their own names."""
        kind: Any = cls.model_fields[key].annotation if key in cls.model_fields else None
        inner = settings_in(kind)
        if inner is None or not isinstance(value, Mapping):
            return value
        if any(get_origin(part) is dict for part in (kind, *get_args(kind))):
            return {k: inner.own_names(v, origin) if isinstance(v, Mapping) else v for k, v in value.items()}
        return inner.own_names(value, origin)

    @classmethod
    def missing(cls, values: Mapping[str, object]) -> list[str]:
        """What `values`, under the keys' own names, lacks beside the fields that have no default, or has in vain; a
        problem each."""
        return []


Config = TypeVar("Config", bound=Settings)


def build(model: type[Config], values: Mapping[str, object], origin: str) -> Config:
    """Validate `values` as `model`; a path counts as its text, and a sequence as a list.

    Raises InputError that lists every problem, not the first only.
    """
    values = model.own_names({key: _plain(value) for key, value in values.items()}, origin)
    problems, built = model.missing(values), None
    try:
        built = model(**values)
    except ValidationError as error:
        problems += [_explain(model, item) for item in error.errors()]
    if problems or built is None:
        raise InputError("\n".join(f"{origin}: {p}" for p in problems))
    return built


MOST_BITS = 14_000
"""Of a whole number: Python refuses to write those with over 4,300 digits."""


def _plain(value: object) -> object:
    """A value of Python's as YAML would have it."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(part) for part in value]
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise InputError(f"a whole number of {value.bit_length()} binary digits is larger than any that is of use here")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{shortened(repr(value))} holds a zero byte, which no path and no text may; take it out")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{shortened(repr(value))} holds half a character, which can't be written; write it whole")
    return os.fspath(value) if isinstance(value, os.PathLike) else value


CODE = {"trust_remote_code": "--trust-remote-code", "allow_code": "--allow-code"}
"""Keys that let code run that somebody else wrote, and the options that say so."""


def require_said(values: Mapping[str, object], origin: str, said: Mapping[str, object]) -> None:
    """Raise InputError where a file lets code run and the command does not: a file never does.

    Args:
        values: the file's.
        origin: the file, as messages name it.
        said: what the command itself gives.
    """
    for place, key in _code_in(values):
        if said.get(key) is not True:
            raise InputError(
                f"{origin}: {place} is set, and a file never lets code run, whoever wrote it. Look at the code, and if "
                f"you trust it say {CODE[key]} with the command (Python: {key}=True)"
            )


def _code_in(values: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if key in CODE and value not in (False, None):
            yield f"{above}{key}", key
        elif isinstance(value, Mapping):
            yield from _code_in(value, f"{above}{key}.")


Function = TypeVar("Function", bound=Callable[..., object])


def takes(model: type[Settings], *, over_recipe: bool = False) -> Callable[[Function], Function]:
    """Decorator for a function whose **overrides are fields of `model`: help() and editors show them.

    The signature gets each field that is no parameter already, with its type and default. The docstring gets the
    descriptions. With `over_recipe` a recipe may give what has no default, and `...` stands for it.
    """

    def documented(function: Function) -> Function:
        signature, types = inspect.signature(function), get_type_hints(model)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = {name: field for name, field in model.model_fields.items() if name not in signature.parameters}
        for name, field in fields.items():
            default = field.get_default(call_default_factory=True)
            if field.is_required():
                default = ... if over_recipe else inspect.Parameter.empty
            parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            own.append(parameter.replace(annotation=types[name]))
        function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        lines = "".join(f"    {name}: {field.description}\n" for name, field in fields.items())
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nSettings:\n{lines}"
        return function

    return documented


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `overrides` on top; a mapping over a mapping changes the keys that it names.

    A mapping whose `name` is another one takes the place of the whole: what it had belongs to the old name.
    """
    result = dict(values)
    for key, value in overrides.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            name = value.get("name")
            renamed = isinstance(name, str) and name != below.get("name", name)
            value = value if renamed else merged(below, value)
        result[key] = value
    return result


def _explain(model: type[Settings], item: Any) -> str:
    key, last = shortened(".".join(str(part) for part in item["loc"])), str(item["loc"][-1])
    if item["type"] == "extra_forbidden":
        settings = _settings_at(model, item["loc"][:-1])
        if last in settings.gone:
            gone = settings.gone[last]
            if gone.others is None or item["input"] in gone.others:
                return f'"{key}" is gone {gone.why}'
            had = ", ".join(map(str, (gone.default, *gone.others)))
            value = shortened(repr(item["input"]))
            return f'"{key}" is {value}: it used to be one of {had}, and the key is gone; leave it out'
        if last in settings.hints:
            return f'"{key}" is no key here: {settings.hints[last]}'
        known = list(settings.model_fields)
        return f'unknown key "{key}".{did_you_mean(last, known)} Known: {", ".join(known)}'
    if item["type"] == "missing":
        field = _settings_at(model, item["loc"][:-1]).model_fields[last]
        return f'"{key}" is missing ({field.description})'
    message = item["msg"].removeprefix("Value error, ")
    return f'"{key}" is {shortened(repr(item["input"]))}: {message[:1].lower()}{message[1:]}'


def _settings_at(model: type[Settings], place: Sequence[Any]) -> type[Settings]:
    """The settings in which a key stands, for the path of keys that leads there."""
    for part in place:
        field = model.model_fields.get(str(part))
        inner = settings_in(field.annotation) if field else None  # another part is a name that the user gave
        model = inner or model
    return model


def settings_in(annotation: Any) -> type[Settings] | None:
    """The settings that a field of this type holds, or None for another type."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := settings_in(part))), None)


def parse_value(key: str, text: str) -> Any:
    """A key's value on the command line, read as YAML. Raises InputError for what is none."""
    try:
        return yaml_of(text)
    except InputError:
        raise InputError(f'the value of "{shortened(key)}" can\'t be read: {shortened(repr(text))}') from None


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """'steps=20' 'lora.rank=8' → values, read as YAML; a dot opens a mapping. Raises InputError without a '='."""
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InputError(f'"{shortened(word)}" is not of the form key=value, e.g. steps=20')
        value = parse_value(key, text)
        for part in reversed(key.split(".")[1:]):
            value = {part: value}
        values = merged(values, {key.split(".")[0]: value})
    return values
